"""COIN's annotations as published (`COIN.json`), as questions about parts of a video that a video LLM answers.

Five tasks, as VideoLLM-online and VideoLLM-MoD (arXiv 2408.16730) evaluate them. All but `task` watch one step:

| task | question | answer |
|---|---|---|
| `step` | which step is shown? | the step |
| `task` | what is done in the video? | the video's class |
| `next` | which step comes next? | the next step |
| `procedure` | which steps come next? | up to five steps, one a line |
| `procedure+` | the same, with the video's class given | the same |

Schema: https://coin-dataset.github.io/.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.narration.module import NarrationData
from mmskip.datasets.narration.parsing import Moment, MomentReader, NarratedVideo, dicts, is_time, read_json
from mmskip.datasets.narration.turns import Narration, Turn, frame_index
from mmskip.datasets.narration.windows import Entry, NarrationDataset
from mmskip.datasets.video.files import find_videos

TASKS = ("step", "task", "next", "procedure", "procedure+")
PROCEDURE_STEPS = 5
SUBSETS = {"train": "training", "val": "testing", "test": "testing"}
_QUESTIONS = {
    "step": "Name the step that is shown in the video.",
    "task": "Name the task that is done in the video.",
    "next": "Name the step that comes next in the video.",
    "procedure": "List the {count} steps that come next in the video, one per line.",
    "procedure+": "The task is to {task}. List the {count} steps that come next in the video, one per line.",
}
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z]|\d|\b)|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class CoinVideo:
    """One annotated video.

    Attributes:
        uid: the video's id, which is its file name.
        task: the activity, in words: "put on hair extensions".
        subset: "training" or "testing".
        start_s, end_s: where the task is done, seconds.
        steps: in the order of time.
    """

    uid: str
    task: str
    subset: str
    start_s: float
    end_s: float
    steps: tuple[Moment, ...]


@dataclass(frozen=True)
class CoinQuestion:
    """One question about one part of a video.

    Attributes:
        uid: "<video>/<task>/<number>".
        task: one of `TASKS`.
        question: the question to the model.
        start_s, end_s: the part of the video, seconds.
        answers: the right answer: one text, or up to five for procedures.
    """

    uid: str
    task: str
    question: str
    start_s: float
    end_s: float
    answers: tuple[str, ...]

    @property
    def text(self) -> str:
        """The answers as the model is to give them: one as it is, several as numbered lines."""
        if len(self.answers) == 1:
            return _sentence(self.answers[0])
        return "\n".join(f"{number}. {_sentence(answer)}" for number, answer in enumerate(self.answers, 1))


def read_coin(path: str | Path) -> tuple[list[CoinVideo], LoadReport]:
    """Read `COIN.json`: `database[video] = {class, subset, start, end, duration, annotation: [{segment, label}]}`.

    Returns:
        The videos by uid, and a report of skipped and repaired records, as
        `mmskip.datasets.narration.index.read_annotations` counts it ("no steps": videos without a usable step).

    Raises:
        ValueError: no such file, or another schema.
    """
    path = Path(path)
    content = read_json(path)
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict) or not all(_is_video(video) for video in database.values()):
        raise ValueError(
            f"{path}: not COIN's schema; expected {{'database': {{video: {{'class': ..., 'subset': ..., "
            "'annotation': [{'segment': [start, end], 'label': ...}]}}}"
        )
    report = LoadReport()
    found = []
    for uid, video in sorted(database.items()):
        reader = MomentReader(uid, report)
        for record in dicts(video["annotation"], uid, report):
            segment = record.get("segment")
            start_s, end_s = segment if isinstance(segment, list) and len(segment) == 2 else (None, None)
            reader.add(start_s, end_s, record.get("label"))
        steps = reader.done()
        if not steps:
            report.add("no steps", uid)
            continue
        start_s = video.get("start") if is_time(video.get("start")) else steps[0].start_s
        end_s = video.get("end") if is_time(video.get("end")) else steps[-1].end_s
        found.append(CoinVideo(uid, _task_words(video["class"]), video["subset"], start_s, end_s, steps))
    return found, report


def _is_video(video: Any) -> bool:
    named = isinstance(video, dict) and all(isinstance(video.get(key), str) for key in ("class", "subset"))
    return named and isinstance(video.get("annotation"), list)


def _task_words(name: str) -> str:
    """ "PutOnHairExtensions" -> "put on hair extensions"; acronyms stay ("ReplaceSIMCard" -> "replace SIM card")."""
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in _WORDS.findall(name))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def questions(video: CoinVideo, tasks: Sequence[str] = TASKS) -> Iterator[CoinQuestion]:
    """The questions of some tasks about one video."""
    labels = [step.text for step in video.steps]
    for task in tasks:
        if task == "task":
            yield CoinQuestion(f"{video.uid}/task/0", task, _QUESTIONS[task], video.start_s, video.end_s, (video.task,))
            continue
        for index, step in enumerate(video.steps):
            following = tuple(labels[index + 1 : index + 1 + (1 if task == "next" else PROCEDURE_STEPS)])
            answers = (labels[index],) if task == "step" else following
            if answers:
                question = _QUESTIONS[task].format(count=len(answers), task=video.task)
                yield CoinQuestion(f"{video.uid}/{task}/{index}", task, question, step.start_s, step.end_s, answers)


class CoinData(NarrationData):
    """COIN's questions as samples: the question after `<bos>`, the frames of the part it is about, the answer.

    Arguments as `NarrationData`, whose `annotations` are `COIN.json` for every split: "train" takes its training
    subset, "val" and "test" its testing subset. A part longer than `max_frames` loses its earliest frames.

    Args:
        tasks: the tasks to ask, see `TASKS`; None: all.
        **kwargs: of `NarrationData`.

    Raises:
        ValueError: an unknown task, no annotations, and as `NarrationData`.
    """

    def __init__(self, tasks: list[str] | None = None, **kwargs: Any) -> None:
        unknown = sorted(set(tasks or ()) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks has {', '.join(unknown)}; expected some of {', '.join(TASKS)}")
        super().__init__(**kwargs)
        if self.annotations is None:
            raise ValueError("CoinData needs annotations and video_dir: it has no embedded set")
        self.tasks = tuple(tasks or TASKS)
        self.questions: dict[str, CoinQuestion] = {}
        self._videos: dict[str, tuple[list[CoinVideo], LoadReport]] = {}

    def categories(self) -> dict[str, tuple[str, ...]]:
        """The classes an answer is matched with, by task: all tasks, or all steps, of all annotation files."""
        videos = [video for path in sorted(set((self.annotations or {}).values())) for video in self._read(path)[0]]
        steps = tuple(sorted({step.text for video in videos for step in video.steps}))
        tasks = tuple(sorted({video.task for video in videos}))
        return {task: tasks if task == "task" else steps for task in TASKS}

    def _read(self, path: str) -> tuple[list[CoinVideo], LoadReport]:
        if path not in self._videos:
            self._videos[path] = read_coin(path)
        return self._videos[path]

    def _subset(self, split: str) -> list[CoinVideo]:
        return [video for video in self._read((self.annotations or {})[split])[0] if video.subset == SUBSETS[split]]

    def _load(self, split: str) -> list[NarratedVideo]:
        if not self.has(split):
            return []
        folder = Path(self.video_dir[split])
        files, known = find_videos(folder), self._encoded
        report = copy.deepcopy(self._read((self.annotations or {})[split])[1])
        loaded = []
        for video in self._subset(split):
            if video.uid not in files and video.uid not in known:
                report.add("video missing", video.uid)
                continue
            # the words of questions and answers are those the tokenizer has to know
            asked = [text for item in questions(video, self.tasks) for text in (item.question, item.text)]
            texts = tuple(Narration(video.start_s, text) for text in asked)
            loaded.append(NarratedVideo(video.uid, files.get(video.uid, folder / f"{video.uid}.mp4"), texts))
        self.counts[split], self.reports[split] = Counter(report.counts), report
        if not loaded:
            raise ValueError(
                f"{(self.annotations or {})[split]} with videos in {folder}: no video of the {SUBSETS[split]} subset "
                f"is there ({report}); videos must be named <video id>.mp4"
            )
        return loaded

    def _dataset(self, split: str) -> NarrationDataset:
        paths = {video.uid: video.path for video in self._load(split)}
        counts = self.counts[split]
        entries: list[Entry] = []
        for video in self._subset(split):
            features = self._feature_name(split, video.uid)
            frames = self._count_frames(split, video.uid, paths[video.uid]) if video.uid in paths else None
            if frames is None:
                continue
            for item in questions(video, self.tasks):
                part = self._part(item, frames, counts)
                if part is not None:
                    self.questions[item.uid] = item
                    turn = Turn((part[0] + 1, part[1]), item.text, item.end_s)
                    entries.append(Entry(item.uid, features, (turn,), paths[video.uid], item.question))
        if not entries:
            raise ValueError(f"split {split!r} has no usable question ({dict(counts)}); run prepare_data first")
        if counts:
            report = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
            rank_zero_info(f"{split}: {len(entries)} questions; left out or changed: {report}")
        return NarrationDataset(entries, self.store, self.tokens, self.blank)

    def _part(self, item: CoinQuestion, frames: int, counts: Counter[str]) -> tuple[int, int] | None:
        """Frame range [start, stop) of a question's part: at least two, one that opens and one that is asked about."""
        start = frame_index(item.start_s, self.fps)
        stop = min(frame_index(item.end_s, self.fps) + 1, frames)
        if start >= frames or stop < 2:
            counts["past the end"] += 1
            return None
        start = min(start, stop - 2)
        if self.max_frames is not None and stop - start > self.max_frames:
            counts["shortened"] += 1
            start = stop - self.max_frames
        return start, stop


def nearest(text: str, classes: Sequence[str]) -> str:
    """The class a generated text stands for: that of the least edit distance (of equal ones the first), upper and lower
    case, numbers of a list and full stops not counted."""
    return classes[int(edit_distances(_plain(text), [_plain(name) for name in classes]).argmin())]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"^\s*\d+\s*\.", "", text).lower().rstrip(" .").split())


def edit_distances(text: str, others: Sequence[str]) -> np.ndarray:
    """Levenshtein distances: the fewest insertions, deletions and replacements of characters from `text` to each of the
    others, int [K]."""
    lengths = np.array([len(other) for other in others])
    chars = np.zeros((len(others), int(lengths.max(initial=0))), dtype=np.int64)
    for row, other in enumerate(others):
        chars[row, : len(other)] = [ord(char) for char in other]
    # the distance from the text read so far to the first j characters of each of the others
    distance = np.tile(np.arange(chars.shape[1] + 1), (len(others), 1))
    for char in text:
        before = distance.copy()
        distance[:, 0] += 1
        for j in range(1, distance.shape[1]):
            replaced = before[:, j - 1] + (chars[:, j - 1] != ord(char))
            distance[:, j] = np.minimum(np.minimum(before[:, j], distance[:, j - 1]) + 1, replaced)
    return distance[np.arange(len(others)), lengths]


def correct_answers(said: str, answers: Sequence[str], classes: Sequence[str]) -> list[bool]:
    """For each right answer whether the model gave it, in its place: each line of the text is matched with a class."""
    lines = [line for line in said.splitlines() if line.strip()] or [""]
    lines = lines[:1] if len(answers) == 1 else lines
    given = [nearest(line, classes) for line in lines[: len(answers)]]
    return [index < len(given) and given[index] == answer for index, answer in enumerate(answers)]
