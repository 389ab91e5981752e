"""From conversations to batches for a VLM of transformers: media are read, the processor is called, tokens are
labelled.

Shapes: B rows, T tokens, F frames, H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmskip.datasets.chat.format import Chat
from mmskip.datasets.chat.labels import ChatLabels
from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.video.reader import read_video, video_info

NOT_INPUTS = ("labels", "uid", "answer")


@dataclass(frozen=True)
class Loaded:
    """A conversation with its media.

    Attributes:
        chat: the conversation.
        text: rendered, placeholders unexpanded.
        runs: learned part, see `ChatLabels.runs`; empty in a prompt.
        images: RGB.
        videos: uint8 [F, 3, H, W] each.
        rates: frames per second of the videos.
    """

    chat: Chat
    text: str
    runs: list[tuple[list[int], list[bool]]]
    images: list[Image.Image]
    videos: list[Tensor]
    rates: list[float]


class ChatLoader:
    """Reads the media of conversations and renders their text.

    Args:
        labels: of the processor.
        fps: frames per second at which videos are sampled, > 0.
        max_frames: most frames of a video; longer videos are sampled more sparsely.
        blank: show black pictures instead (the control that sees nothing).
        prompt: cut the last answer and all after it, to have it generated.
    """

    def __init__(
        self, labels: ChatLabels, fps: float, max_frames: int, blank: bool = False, prompt: bool = False
    ) -> None:
        self.labels, self.fps, self.max_frames, self.blank, self.prompt = labels, fps, max_frames, blank, prompt

    def __call__(self, chat: Chat) -> Loaded:
        """Read one conversation.

        Raises:
            ValueError: a file is missing or broken, or the template does not mark the assistant's words.
        """
        if self.prompt:
            chat = before_last_answer(chat)
        text = self.labels.render(chat.messages, prompt=self.prompt)
        runs = [] if self.prompt else self.labels.runs(chat, text)
        images = [self._image(path) for path in chat.of("image")]
        videos = [self._video(path) for path in chat.of("video")]
        return Loaded(chat, text, runs, images, [video for video, _ in videos], [rate for _, rate in videos])

    def _image(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except OSError as error:
            raise ValueError(f"image {path} is missing or broken ({error})") from error
        return Image.new("RGB", image.size) if self.blank else image

    def _video(self, path: Path) -> tuple[Tensor, float]:
        """Frames, at most `max_frames`, and their rate."""
        duration = video_info(path).duration_s
        rate = min(self.fps, self.max_frames / duration)
        frames = read_video(path, rate).frames[: self.max_frames]
        tensor = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        return (torch.zeros_like(tensor) if self.blank else tensor), rate


def before_last_answer(chat: Chat) -> Chat:
    """The conversation up to its last assistant turn, without it."""
    last = max(index for index, message in enumerate(chat.messages) if message["role"] == "assistant")
    kept = chat.messages[:last]
    places = sum(part["type"] != "text" for message in kept for part in message["content"])
    return Chat(chat.uid, kept, chat.media[:places])


def last_answer(chat: Chat) -> str:
    """The text of the last assistant turn."""
    turns = [message for message in chat.messages if message["role"] == "assistant"]
    return "".join(part.get("text", "") for part in turns[-1]["content"])


class ChatCollate:
    """Turns loaded conversations into a batch: what the processor returns, and `labels` [B, T] (-100: not learned) and
    `uid`.

    Args:
        labels: of the processor.
        arguments: further arguments of the processor's call, such as `max_pixels`.
        padding_side: "right" or "left".
        pack: the conversations of a row follow one another. Each begins at position 0, by which transformers and
            mmskip distinguish them; there is no attention mask then, and padding is a separate sequence.
    """

    def __init__(
        self,
        labels: ChatLabels,
        arguments: Mapping[str, Any] | None = None,
        padding_side: str = "right",
        pack: bool = False,
    ) -> None:
        self.labels, self.arguments = labels, dict(arguments or {})
        self.padding_side, self.pack = padding_side, pack

    def __call__(self, rows: Sequence[Sequence[Loaded]]) -> dict[str, Any]:
        """The batch of rows of conversations (without packing, one each).

        Raises:
            ValueError: the processor refuses the media or texts.
        """
        items = [item for row in rows for item in row]
        out = self._process(items)
        tensors = {key: value for key, value in out.items() if isinstance(value, Tensor)}
        tensors["labels"] = self._labels(items, tensors["input_ids"], tensors["attention_mask"])
        uids = ["+".join(item.chat.uid for item in row) for row in rows]
        batch: dict[str, Any] = self._packed(tensors, [len(row) for row in rows]) if self.pack else tensors
        return batch | {"uid": uids}

    def _process(self, items: Sequence[Loaded]) -> Mapping[str, Any]:
        processor = self.labels.processor
        arguments: dict[str, Any] = {**self.arguments}
        if any(item.images for item in items):
            arguments["images"] = [item.images for item in items]
        if any(item.videos for item in items):
            arguments["videos"] = [item.videos for item in items]
            arguments["video_metadata"] = [_metadata(item) for item in items]
            arguments["do_sample_frames"] = False
        processor.tokenizer.padding_side = self.padding_side
        try:
            out: Mapping[str, Any] = processor(
                text=[item.text for item in items],
                padding=True,
                return_tensors="pt",
                add_special_tokens=self.labels.special_tokens(items[0].text),
                **arguments,
            )
        except ValueError as error:
            uids = ", ".join(item.chat.uid for item in items)
            raise ValueError(
                f"{type(processor).__name__} cannot make a batch of {uids}: {error} (a smaller batch_size, or batches "
                "of one kind of media, may help)"
            ) from error
        return out

    def _labels(self, items: Sequence[Loaded], ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        labels_BT = torch.full_like(ids_BT, IGNORE)
        for row, item in enumerate(items):
            if item.runs:
                real = mask_BT[row].bool()
                labels = self.labels.label(item.chat.uid, ids_BT[row][real].tolist(), item.runs)
                labels_BT[row][real] = torch.tensor(labels)
        return labels_BT

    def _packed(self, tensors: dict[str, Tensor], counts: Sequence[int]) -> dict[str, Tensor]:
        """Lay the sequences of `tensors` into rows of `counts` sequences each. Media stay in their order."""
        if "token_type_ids" in tensors:
            raise ValueError(
                f"pack=true does not serve {type(self.labels.processor).__name__}: its model masks by token_type_ids, "
                "which know nothing of packed sequences; use pack=false"
            )
        mask_NT = tensors.pop("attention_mask").bool()
        pad = self.labels.tokenizer.pad_token_id
        fill = {"input_ids": 0 if pad is None else pad, "labels": IGNORE}
        per_token = [key for key, value in tensors.items() if value.shape == mask_NT.shape]
        lengths = mask_NT.sum(1).tolist()
        first = [sum(counts[:row]) for row in range(len(counts))]
        spans = [range(start, start + count) for start, count in zip(first, counts, strict=True)]
        width = max(sum(lengths[i] for i in span) for span in spans)
        packed = {key: value for key, value in tensors.items() if key not in per_token}
        for key in per_token:
            rows = tensors[key].new_full((len(counts), width), fill.get(key, 0))
            for row, span in enumerate(spans):
                line = torch.cat([tensors[key][i][mask_NT[i]] for i in span])
                rows[row, : len(line)] = line
            packed[key] = rows
        positions = []
        for span in spans:
            used = [lengths[i] for i in span]
            positions.append(torch.cat([torch.arange(length) for length in [*used, width - sum(used)]]))
        return packed | {"position_ids": torch.stack(positions)}


class PromptCollate(ChatCollate):
    """Collate conversations to be answered: padded left, without labels; `answer` holds the truth."""

    def __init__(self, labels: ChatLabels, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(labels, arguments, padding_side="left")

    def __call__(self, rows: Sequence[Sequence[Loaded]]) -> dict[str, Any]:
        """The batch."""
        batch = super().__call__(rows)
        del batch["labels"]
        return batch


def _metadata(item: Loaded) -> list[dict[str, Any]]:
    return [
        {"total_num_frames": len(video), "fps": rate, "frames_indices": list(range(len(video)))}
        for video, rate in zip(item.videos, item.rates, strict=True)
    ]
