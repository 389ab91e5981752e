"""The DataModule of captioning and visual entailment: the embedded set, or files of COCO and SNLI-VE.

An item is an image with all that is asked about it, so that an image is read and encoded once for all its texts. A
batch:

| key | what |
|---|---|
| `images` | float [I, 3, S, S] in 0..1 |
| `image_ids` | names of the images |
| `caption`, `entailment`, `question` | a `Texts` each, or None where the batch has no such text |

Shapes: I images, R rows (texts), T prompt tokens, L answer tokens, S side of an image in pixels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmskip.datasets.captioning.coco import find_images, read_image, read_split
from mmskip.datasets.captioning.snli_ve import LABELS, EntailmentPair, find_pair_images, read_pairs
from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.common.pixels import to_input
from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.common.resumable import ResumableLoader
from mmskip.datasets.common.samplers import UnrepeatedSampler
from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.common.tokenizer import word_tokenizer
from mmskip.datasets.synthetic.captions import SceneCaptionsConfig, generate_captions, scene_texts
from mmskip.utils.pretrained import pretrained

TASKS = ("caption", "entailment")
ANSWERS = dict(zip(LABELS, ("yes", "maybe", "no"), strict=True))
CAPTION_PROMPT = "what does the image describe?"
ENTAILMENT_PROMPT = 'does the image describe " {hypothesis} "?'
_EMBEDDED = SceneCaptionsConfig()


@dataclass(frozen=True)
class PictureEntry:
    """An image and its texts.

    Attributes:
        uid: name of the image: COCO's number as text, or the name of its file.
        path: its file.
        captions: may be empty.
        pairs: may be empty.
        questions: with answers; the embedded training set has some.
    """

    uid: str
    path: Path
    captions: tuple[str, ...] = ()
    pairs: tuple[EntailmentPair, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()


@dataclass
class Texts:
    """What is asked about the images of a batch, and the answers.

    Attributes:
        image: LongTensor [R], number of the image in the batch.
        prompt, prompt_mask: LongTensor [R, T], padded on the right.
        labels: LongTensor [R, L], the answer and an eos; `IGNORE` behind it.
        uids: name of the pair, or of the image.
        label: of each pair, a place in `LABELS`; empty for captions.
    """

    image: Tensor
    prompt: Tensor
    prompt_mask: Tensor
    labels: Tensor
    uids: list[str]
    label: list[int]

    def to(self, device: Any) -> "Texts":
        """The same on another device."""
        return self._changed(lambda tensor: tensor.to(device), self.uids, self.label)

    def _changed(self, change: Callable[[Tensor], Tensor], uids: list[str], label: list[int]) -> "Texts":
        return Texts(
            change(self.image), change(self.prompt), change(self.prompt_mask), change(self.labels), uids, label
        )

    def rows(self, numbers: Sequence[int]) -> "Texts":
        """Some of the rows."""
        uids, label = [self.uids[n] for n in numbers], [self.label[n] for n in numbers if self.label]
        return self._changed(lambda tensor: tensor[list(numbers)], uids, label)

    @staticmethod
    def joined(parts: Sequence["Texts"], pad: int) -> "Texts":
        """The rows of several, one behind the other; prompts are filled up with `pad`."""
        if len(parts) == 1:
            return parts[0]
        fills = {"prompt": pad, "prompt_mask": 0, "labels": IGNORE}
        width = {name: max(getattr(part, name).shape[1] for part in parts) for name in fills}
        found = {
            name: torch.cat([_widened(getattr(part, name), width[name], fill) for part in parts])
            for name, fill in fills.items()
        }
        image = torch.cat([part.image for part in parts])
        uids, label = [uid for part in parts for uid in part.uids], [one for part in parts for one in part.label]
        return Texts(image, **found, uids=uids, label=label)

    def first_of_each(self) -> "Texts":
        """The first row of every image."""
        seen: dict[str, int] = {}
        for number, uid in enumerate(self.uids):
            seen.setdefault(uid, number)
        return self.rows(list(seen.values()))


class PictureDataset(Dataset[tuple[PictureEntry, Tensor]]):
    """Images with their texts, read on access.

    Args:
        entries: the images.
        size, resize: see `mmskip.datasets.images.to_input`.
        blank: all pixels zero (the control that sees no image).
    """

    def __init__(
        self, entries: Sequence[PictureEntry], size: int, resize: int | None = None, blank: bool = False
    ) -> None:
        self.entries, self.size, self.resize, self.blank = entries, size, resize, blank

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[PictureEntry, Tensor]:
        entry = self.entries[index]
        image = to_input(read_image(entry.path), self.resize, self.size)
        return entry, torch.zeros_like(image) if self.blank else image


class CaptionCollate:
    """Makes batches of images and their texts.

    Args:
        tokenizer: has pad and eos.
        caption_prompt, entailment_prompt: what is asked; "{hypothesis}" (and "{caption}", where the pairs have one) is
            that of the pair.
        max_tokens: longest prompt and longest answer; what is longer is cut.

    Raises:
        ValueError: the tokenizer has no pad or eos, the entailment prompt has no "{hypothesis}", or the tokenizer does
            not tell the three answers apart.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        caption_prompt: str = CAPTION_PROMPT,
        entailment_prompt: str = ENTAILMENT_PROMPT,
        max_tokens: int = 64,
    ) -> None:
        for name in ("pad_token_id", "eos_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}, which answers need")
        if "{hypothesis}" not in entailment_prompt:
            raise ValueError(f"entailment_prompt is {entailment_prompt!r}; it must hold {{hypothesis}}")
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.caption_prompt, self.entailment_prompt = caption_prompt, entailment_prompt
        self.answers = [self.answer_ids(word) for word in ANSWERS.values()]
        if len(set(map(tuple, self.answers))) < len(LABELS):
            raise ValueError(f"the tokenizer does not tell {', '.join(ANSWERS.values())} apart: {self.answers}")

    def answer_ids(self, text: str) -> list[int]:
        """The ids that are to be said for a text: as the tokenizer frames it, with one eos at the end."""
        ids: Any = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        eos = self.tokenizer.eos_token_id
        ids = ids[:-1] if ids and ids[-1] == eos else ids
        return [*ids[: self.max_tokens - 1], eos]

    def __call__(self, items: Sequence[tuple[PictureEntry, Tensor]]) -> dict[str, Any]:
        """One batch."""
        told = [(number, entry) for number, (entry, _) in enumerate(items)]
        captions = [(n, self.caption_prompt, text, entry.uid, -1) for n, entry in told for text in entry.captions]
        pairs = [
            (n, self._question(pair), ANSWERS[pair.label], pair.uid, LABELS.index(pair.label))
            for n, entry in told
            for pair in entry.pairs
        ]
        asked = [(n, question, answer, entry.uid, -1) for n, entry in told for question, answer in entry.questions]
        return {
            "images": torch.stack([image for _, image in items]),
            "image_ids": [entry.uid for entry, _ in items],
            "caption": self._texts(captions),
            "entailment": self._texts(pairs),
            "question": self._texts(asked),
        }

    def _question(self, pair: EntailmentPair) -> str:
        text = self.entailment_prompt.replace("{hypothesis}", pair.hypothesis)
        if "{caption}" in text and pair.caption is None:
            raise ValueError(f"entailment_prompt asks for {{caption}}, and pair {pair.uid} has none (sentence1)")
        return text.replace("{caption}", pair.caption or "")

    def _texts(self, rows: Sequence[tuple[int, str, str, str, int]]) -> Texts | None:
        if not rows:
            return None
        image, prompts, answers, uids, label = zip(*rows, strict=True)
        cut: dict[str, Any] = {"max_length": self.max_tokens, "truncation": True}
        asked = [self.tokenizer(prompt, **cut)["input_ids"] for prompt in prompts]
        pad: Any = self.tokenizer.pad_token_id
        return Texts(
            torch.tensor(image),
            _padded(asked, pad),
            _padded([[1] * len(ids) for ids in asked], 0),
            _padded([self.answer_ids(answer) for answer in answers], IGNORE),
            list(uids),
            [value for value in label if value >= 0],
        )


def _widened(rows: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=fill)


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


class CaptionData(LightningDataModule):
    """Images with captions, entailment pairs, or both.

    Without `captions` and `pairs` it is the embedded set, written under `root` on first use. Images that are missing or
    do not decode are left out, counted and reported.

    Args:
        root: folder for what is made here.
        generated: settings of the embedded set.
        captions: per split ("train", "val", "test") COCO's caption annotations, or Karpathy's `dataset_coco.json`.
        caption_images: folder of their images; or one per split.
        pairs: per split a SNLI-VE file.
        pair_images: as `caption_images`.
        tokenizer: name or folder of a tokenizer of transformers; None: words of the embedded set, or of the training
            captions and pairs.
        tasks: which of "caption" and "entailment" are served.
        image_size: side of the inputs, pixels; None: that of the embedded set.
        resize: short side before the middle is cut out; None: the whole image is resized.
        caption_prompt, entailment_prompt, max_tokens: see `CaptionCollate`.
        batch_size, eval_batch_size: images per batch and rank, in training and else (None: the same).
        num_workers: loader processes.
        check_images: decode every image once before training; else a broken one stops the run that meets it.
        blank: show black images (control).
        seed: of the order of training images.

    Raises:
        ValueError: contradicting or impossible arguments, or missing files; before work starts.
    """

    def __init__(
        self,
        root: str = "data",
        generated: SceneCaptionsConfig = _EMBEDDED,
        captions: dict[str, str] | None = None,
        caption_images: str | dict[str, str] | None = None,
        pairs: dict[str, str] | None = None,
        pair_images: str | dict[str, str] | None = None,
        tokenizer: str | None = None,
        tasks: Sequence[str] = TASKS,
        image_size: int | None = None,
        resize: int | None = None,
        caption_prompt: str = CAPTION_PROMPT,
        entailment_prompt: str = ENTAILMENT_PROMPT,
        max_tokens: int = 64,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        check_images: bool = True,
        blank: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("image_size", image_size or 1)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not tasks or not set(tasks) <= set(TASKS):
            raise ValueError(f"tasks is {list(tasks)}; expected some of {', '.join(TASKS)}")
        self.embedded = captions is None and pairs is None
        if not self.embedded and image_size is None:
            raise ValueError("files need image_size, the side of the inputs in pixels")
        self.files = {"caption": captions, "entailment": pairs}
        self.images = {"caption": caption_images, "entailment": pair_images}
        for task in TASKS:
            _check_files(task, self.files[task], self.images[task])
        self.tasks = [task for task in tasks if self.embedded or self.files[task]]
        if not self.tasks:
            raise ValueError(f"tasks is {list(tasks)}, and there is no file for them")
        self.root, self.generated, self.tokenizer_name = Path(root), generated, tokenizer
        self.folder = self.root / f"captions-{generated.id}"
        self.image_size, self.resize = image_size or generated.image_size, resize
        self.prompts, self.max_tokens = (caption_prompt, entailment_prompt), max_tokens
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.check_images, self.blank, self.seed = num_workers, check_images, blank, seed
        self.reports: dict[str, LoadReport] = {}
        self._entries: dict[str, list[PictureEntry]] = {}
        self._tokenizer: Any = None

    # --- data ---------------------------------------------------------------------------------------------------

    @property
    def splits(self) -> list[str]:
        """The splits there are."""
        return [s for s in SPLITS if self.embedded or any(s in (self.files[task] or {}) for task in self.tasks)]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: there is no such tokenizer, or no training split to take words from.
        """
        if self._tokenizer is None:
            name, load = self.tokenizer_name, AutoTokenizer.from_pretrained
            self._tokenizer = self._own_words() if name is None else pretrained("tokenizer", name, load)
        return self._tokenizer

    def _own_words(self) -> Any:
        if self.embedded:
            texts = [*scene_texts(), *ANSWERS.values()]
        elif "train" in self.splits:
            told = self.entries("train")
            texts = [*ANSWERS.values(), *(text for entry in told for text in entry.captions)]
            texts += [pair.hypothesis for entry in told for pair in entry.pairs]
        else:
            raise ValueError("without a training split there are no words for a tokenizer; give tokenizer")
        return word_tokenizer([*texts, *(prompt.replace("{", "").replace("}", "") for prompt in self.prompts)])

    def prepare_data(self) -> None:
        """Write the embedded set. Lightning calls it on one rank."""
        if self.embedded:
            generate_captions(self.folder, self.generated)

    def entries(self, split: str) -> list[PictureEntry]:
        """The images of a split with their texts, after `prepare_data`.

        Raises:
            ValueError: there is no such split, or nothing usable in it.
        """
        if split not in self.splits:
            raise ValueError(f"there is no split {split!r}; there are {', '.join(self.splits)}")
        if split not in self._entries:
            report, found = LoadReport(), dict[Path, PictureEntry]()
            for task in self.tasks:
                for entry in self._read(task, split, report):
                    known = found.get(entry.path, PictureEntry(entry.uid, entry.path))
                    found[entry.path] = PictureEntry(
                        known.uid,
                        known.path,
                        known.captions + entry.captions,
                        known.pairs + entry.pairs,
                        known.questions + entry.questions,
                    )
            rank_zero_info(f"{split}: {len(found)} images; {report}")
            self._entries[split], self.reports[split] = list(found.values()), report
        return self._entries[split]

    def _read(self, task: str, split: str, report: LoadReport) -> list[PictureEntry]:
        if self.embedded:
            file = self.folder / split / ("captions.json" if task == "caption" else "pairs.jsonl")
            images: Any = self.folder / split / "images"
        else:
            named, folders = self.files[task] or {}, self.images[task]
            if split not in named:
                return []
            file, images = Path(named[split]), folders[split] if isinstance(folders, dict) else folders
        check = self.check_images and not self.embedded
        if task == "caption":
            told, left_out = read_split(file, split)
            pictures = find_images(told, images, left_out, check)
            _merge(report, left_out)
            return [PictureEntry(str(p.image_id), p.path, p.captions) for p in pictures if p.path is not None]
        if not self.generated.pairs and self.embedded:
            return []
        questions = _questions(self.folder / "train" / "questions.jsonl") if self.embedded and split == "train" else {}
        pairs, left_out = read_pairs(file)
        grouped: dict[Path, list[EntailmentPair]] = {}
        for pair in find_pair_images(pairs, images, left_out, check):
            assert pair.path is not None
            grouped.setdefault(pair.path, []).append(pair)
        _merge(report, left_out)
        return [
            PictureEntry(path.name, path, (), tuple(group), tuple(questions.get(path.name, ())))
            for path, group in grouped.items()
        ]

    def dataset(self, split: str) -> PictureDataset:
        """The images of a split."""
        return PictureDataset(self.entries(split), self.image_size, self.resize, self.blank)

    def collate(self) -> CaptionCollate:
        """What makes batches."""
        return CaptionCollate(self.tokenizer, *self.prompts, self.max_tokens)

    # --- loaders ------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches; the order is a function of seed and epoch."""
        dataset = self.dataset("train")
        sampler: DistributedSampler = DistributedSampler(dataset, *self._ranks(), shuffle=True, seed=self.seed)
        return self._loader(dataset, sampler, self.batch_size)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation batches, in order; ranks share them without repeats."""
        return self._in_order("val") if "val" in self.splits else []

    def test_dataloader(self) -> DataLoader:
        """Test batches, in order; ranks share them without repeats."""
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader:
        """The test images (of val, where there is no test)."""
        return self._in_order("test" if "test" in self.splits else "val")

    def _in_order(self, split: str) -> DataLoader:
        dataset = self.dataset(split)
        return self._loader(dataset, UnrepeatedSampler(dataset, *self._ranks()), self.eval_batch_size)

    def _loader(self, dataset: PictureDataset, sampler: Any, batch_size: int) -> DataLoader:
        return ResumableLoader(
            dataset, batch_size=batch_size, sampler=sampler, num_workers=self.num_workers, collate_fn=self.collate()
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """`Texts` move as well."""
        return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)


def _check_files(task: str, files: dict[str, str] | None, images: str | dict[str, str] | None) -> None:
    name, folder = ("captions", "caption_images") if task == "caption" else ("pairs", "pair_images")
    if files is None:
        if images is not None:
            raise ValueError(f"{folder}={images!r} needs {name} as well")
        return
    if not files or set(files) - set(SPLITS):
        raise ValueError(f"{name} has the splits {sorted(files)}; expected some of {', '.join(SPLITS)}")
    folders = images if isinstance(images, dict) else dict.fromkeys(files, images or "")
    for split, path in files.items():
        if not Path(path).is_file():
            raise ValueError(f"{name}[{split!r}]: there is no file {path}")
        if not folders.get(split) or not Path(folders[split]).is_dir():
            raise ValueError(f"{folder} for {split!r}: there is no folder {folders.get(split)!r}")


def _merge(report: LoadReport, other: LoadReport) -> None:
    for reason, count in other.counts.items():
        for example in other.examples[reason]:
            report.add(reason, example, count)
            count = 0


def _questions(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions with answers by the name of the picture."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["image"], []).append((row["question"], row["answer"]))
    return found
