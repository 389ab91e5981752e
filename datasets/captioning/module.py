"""The DataModule of captioning and visual entailment: the embedded set, or files of COCO and SNLI-VE.

For batches see `mmskip.datasets.captioning.batch`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer

from mmskip.datasets.captioning.batch import (
    ANSWERS,
    CAPTION_PROMPT,
    ENTAILMENT_PROMPT,
    CaptionCollate,
    PictureDataset,
    PictureEntry,
)
from mmskip.datasets.captioning.coco import find_images, read_split
from mmskip.datasets.captioning.snli_ve import EntailmentPair, find_pair_images, read_pairs
from mmskip.datasets.common.module import BaseData
from mmskip.datasets.common.report import LoadReport
from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.common.tokenizer import word_tokenizer
from mmskip.datasets.synthetic.captions import SceneCaptionsConfig, generate_captions, scene_texts
from mmskip.utils.pretrained import pretrained

TASKS = ("caption", "entailment")
_EMBEDDED = SceneCaptionsConfig()


class CaptionData(BaseData):
    """Images with captions, entailment pairs, or both.

    Without `captions` and `pairs` it is the embedded set, written under `root` on first use. Images that are missing or
    do not decode are left out, counted and reported.

    Args:
        root: folder of the generated files.
        generated: settings of the embedded set.
        captions: per split ("train", "val", "test") COCO's caption annotations, or Karpathy's `dataset_coco.json`.
        caption_images: folder of their images; or one per split.
        pairs: per split a SNLI-VE file.
        pair_images: as `caption_images`.
        tokenizer: name or folder of a tokenizer of transformers; None: words of the embedded set, or of the training
            captions and pairs.
        tasks: which of "caption" and "entailment" are served.
        image_size: side of the inputs, pixels; None: that of the embedded set.
        resize: short side before the middle is cut out; None: the uncropped image is resized.
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
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        for name, value in (("max_tokens", max_tokens), ("image_size", image_size or 1)):
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
        self.check_images, self.blank = check_images, blank
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
            known = self.entries("train")
            texts = [*ANSWERS.values(), *(text for entry in known for text in entry.captions)]
            texts += [pair.hypothesis for entry in known for pair in entry.pairs]
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
            captioned, left_out = read_split(file, split)
            pictures = find_images(captioned, images, left_out, check)
            report.merge(left_out)
            return [PictureEntry(str(p.image_id), p.path, p.captions) for p in pictures if p.path is not None]
        if not self.generated.pairs and self.embedded:
            return []
        questions = _questions(self.folder / "train" / "questions.jsonl") if self.embedded and split == "train" else {}
        pairs, left_out = read_pairs(file)
        grouped: dict[Path, list[EntailmentPair]] = {}
        for pair in find_pair_images(pairs, images, left_out, check):
            assert pair.path is not None
            grouped.setdefault(pair.path, []).append(pair)
        report.merge(left_out)
        return [
            PictureEntry(path.name, path, (), tuple(group), tuple(questions.get(path.name, ())))
            for path, group in grouped.items()
        ]

    def dataset(self, split: str) -> PictureDataset:
        """The images of a split."""
        return PictureDataset(self.entries(split), self.image_size, self.resize, self.blank)

    def collate(self) -> CaptionCollate:
        """Make the function that collates batches."""
        return CaptionCollate(self.tokenizer, *self.prompts, self.max_tokens)

    # --- batches ------------------------------------------------------------------------------------------------

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        return split in self.splits

    def collate_of(self, split: str) -> CaptionCollate:
        """Collate images and their texts."""
        return self.collate()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """`Texts` move as well."""
        return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


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


def _questions(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Questions with answers by the name of the picture."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["image"], []).append((row["question"], row["answer"]))
    return found
