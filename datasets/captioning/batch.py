"""Batches of images with all that is asked about them, so that an image is read and encoded once for all its texts.

| key | what |
|---|---|
| `images` | float [I, 3, S, S] in 0..1 |
| `image_ids` | names of the images |
| `caption`, `entailment`, `question` | a `Texts` each, or None where the batch has no such text |

Shapes: I images, R rows (texts), T prompt tokens, L answer tokens, S side of an image in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mmskip.datasets.captioning.coco import read_image
from mmskip.datasets.captioning.snli_ve import LABELS, EntailmentPair
from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.common.pixels import to_input

ANSWERS = dict(zip(LABELS, ("yes", "maybe", "no"), strict=True))
CAPTION_PROMPT = "what does the image describe?"
ENTAILMENT_PROMPT = 'does the image describe " {hypothesis} "?'


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
    """The questions about the images of a batch, and their answers.

    Attributes:
        image: LongTensor [R], number of the image in the batch.
        prompt, prompt_mask: LongTensor [R, T], padded on the right.
        labels: LongTensor [R, L], the answer and an eos; `IGNORE` after it.
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
        """Copy to another device."""
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
        """The rows of several, one after the other; prompts are filled up with `pad`."""
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
        max_tokens: longest prompt and longest answer; longer ones are cut.

    Raises:
        ValueError: the tokenizer has no pad or eos, the entailment prompt has no "{hypothesis}", or the tokenizer does
            not distinguish the three answers.
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
            raise ValueError(f"the tokenizer does not distinguish {', '.join(ANSWERS.values())}: {self.answers}")

    def answer_ids(self, text: str) -> list[int]:
        """The ids that are to be said for a text: as the tokenizer frames it, with one eos at the end."""
        ids: Any = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        eos = self.tokenizer.eos_token_id
        ids = ids[:-1] if ids and ids[-1] == eos else ids
        return [*ids[: self.max_tokens - 1], eos]

    def __call__(self, items: Sequence[tuple[PictureEntry, Tensor]]) -> dict[str, Any]:
        """One batch."""
        numbered = [(number, entry) for number, (entry, _) in enumerate(items)]
        captions = [(n, self.caption_prompt, text, entry.uid, -1) for n, entry in numbered for text in entry.captions]
        pairs = [
            (n, self._question(pair), ANSWERS[pair.label], pair.uid, LABELS.index(pair.label))
            for n, entry in numbered
            for pair in entry.pairs
        ]
        asked = [(n, question, answer, entry.uid, -1) for n, entry in numbered for question, answer in entry.questions]
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
