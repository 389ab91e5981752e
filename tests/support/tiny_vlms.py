"""Tiny random vision-language models, and batches in the form of their processors' output."""

import copy
import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel
from vlm_configs import ANYRES, BREAK, END, GRIDS, IMAGE, MROPE, START, VIDEO, VLMS, WITH_VIDEO


def tiny_vlm(name: str) -> PreTrainedModel:
    """A tiny random VLM in evaluation mode, fp32, always the same."""
    return copy.deepcopy(_build(name))


@functools.cache
def _build(name: str) -> PreTrainedModel:
    settings = {**VLMS[name]}
    attention = settings.pop("attn", "sdpa")
    config_class = CONFIG_MAPPING[settings.pop("model_type", name)]
    config = config_class(**settings)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # some towers and projectors start at zero or very small, which would make every picture alike
            if "language_model" not in key and "text_model" not in key and parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


@dataclass
class Row:
    """One row of a batch.

    Attributes:
        ids, layout, types: per token: id, group (-1 text), and 1 on image, 2 on video tokens.
        images, videos: per picture or video, the tensors that the processor would give it.
    """

    ids: list[int] = field(default_factory=list)
    layout: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    images: list[dict[str, Tensor]] = field(default_factory=list)
    videos: list[dict[str, Tensor]] = field(default_factory=list)

    def text(self, *ids: int) -> None:
        self.ids += ids
        self.layout += [-1] * len(ids)
        self.types += [0] * len(ids)

    def vision(self, token: int, count: int, same: bool = False) -> None:
        """`count` placeholders of one picture: of a new one, or of the `same` as the last."""
        name = max(self.layout) if same else max(self.layout, default=-1) + 1
        self.ids += [token] * count
        self.layout += [name] * count
        self.types += [1 if token == IMAGE else 2] * count

    def newline(self, token: int) -> None:
        self.ids.append(token)
        self.layout.append(-1)
        self.types.append(1 if token == IMAGE else 2)


def joined(first: Row, second: Row) -> Row:
    """Two turns of a conversation as one row."""
    shift = max(first.layout, default=-1) + 1
    layout = [name + shift if name >= 0 else -1 for name in second.layout]
    return Row(
        first.ids + second.ids,
        first.layout + layout,
        first.types + second.types,
        first.images + second.images,
        first.videos + second.videos,
    )


def _grid_picture(name: str, row: Row, kind: str, frames: int, size: tuple[int, int]) -> None:
    height, width = size
    depth = 1 if name == "video_llama_3" else 2
    merge = 2 if name != "video_llama_3" or kind == "video" else 1
    token = IMAGE if kind == "image" else VIDEO
    grid = torch.tensor([[frames, height, width]])
    picture = {"pixels": torch.randn(frames * height * width, 3 * depth * 16), "grid": grid}
    picture["merge"] = torch.tensor([merge])
    (row.images if kind == "image" else row.videos).append(picture)
    tokens = height * width // merge**2
    apart = name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "video_llama_3") and kind == "video"
    if not apart:
        row.text(START)
    for frame in range(frames):
        if apart:
            row.text(10 + frame, START)
        row.vision(token, tokens)
        if apart:
            row.text(END)
    if not apart:
        row.text(END)


def _anyres_image(row: Row, size: tuple[int, int]) -> None:
    """Tiles of 16 x 16 pixels, 4 x 4 tokens each: the base view, then the tiles in rows that end with a newline."""
    height, width = size
    tiles = height // 16 * (width // 16)
    row.images.append({"pixels": torch.randn(1 + tiles, 3, 16, 16), "size": torch.tensor([[height, width]])})
    row.vision(IMAGE, 16)
    for _ in range(height // 4):
        row.vision(IMAGE, width // 4, same=True)
        row.newline(IMAGE)


def _pooled_video(name: str, row: Row, frames: int) -> None:
    row.videos.append({"pixels": torch.randn(1, frames, 3, 16, 16)})
    for _ in range(frames):
        row.vision(VIDEO, 4)
    if name == "llava_onevision":
        row.newline(VIDEO)


def _tiles(name: str, row: Row, count: int) -> None:
    tokens = 16 if name in ("paligemma", "paligemma2", "llava") else 4
    row.images.append({"pixels": torch.randn(count, 3, 16, 16)})
    apart = name in ("smolvlm", "idefics2", "idefics3", "aya_vision")
    row.text(START)
    for tile in range(count):
        if apart:
            row.text(20 + tile)
        row.vision(IMAGE, tokens)
    row.text(END)


def _row_ends(row: Row, size: tuple[int, int]) -> None:
    height, width = size
    row.images.append({"pixels": torch.randn(1, 3, 32, 32), "size": torch.tensor([[height, width]])})
    for line in range(height // 8):
        row.vision(IMAGE, width // 8, same=line > 0)
        row.text(BREAK if line + 1 < height // 8 else END)


def add_image(name: str, row: Row, variant: int = 0) -> None:
    """An image of one of two sizes."""
    if name in GRIDS:
        _grid_picture(name, row, "image", 1, [(4, 4), (4, 8)][variant])
    elif name in ANYRES:
        _anyres_image(row, [(16, 32), (32, 32)][variant])
    elif name in ("mistral3", "llava_pixtral"):
        _row_ends(row, [(16, 24), (32, 16)][variant])
    else:
        cuts_tiles = name in ("internvl", "smolvlm", "idefics2", "idefics3", "aya_vision", "cohere2_vision")
        _tiles(name, row, [1, 3][variant] if cuts_tiles else 1)


def add_video(name: str, row: Row, frames: int = 3) -> None:
    """A video; models without videos get its frames as images."""
    if name in GRIDS:
        _grid_picture(name, row, "video", frames, (4, 4))
    elif name in WITH_VIDEO and name in ANYRES:
        _pooled_video(name, row, frames)
    else:
        for _ in range(frames):
            row.text(5)
            add_image(name, row)


def example_rows(name: str) -> list[Row]:
    """A row with an image and a video, one with two adjacent images of two sizes, one of text, one with a video."""
    torch.manual_seed(7)
    first, second, third, fourth = Row(), Row(), Row(), Row()
    first.text(1, 11, 12)
    add_image(name, first)
    first.text(13)
    add_video(name, first)
    first.text(14, 15)
    second.text(1)
    add_image(name, second)
    add_image(name, second, 1)
    second.text(16, 17, 18, 19)
    third.text(1, *range(20, 30))
    fourth.text(1, 31)
    add_video(name, fourth)
    fourth.text(32)
    return [first, second, third, fourth]


def collate(name: str, rows: list[Row], side: str = "right") -> tuple[dict[str, Tensor], Tensor]:
    """The call that the processor would give, and the layout [B, T] that should follow from it."""
    length = max(len(row.ids) for row in rows)

    def pad(values: list[int], fill: int) -> list[int]:
        rest = [fill] * (length - len(values))
        return values + rest if side == "right" else rest + values

    call = {
        "input_ids": torch.tensor([pad(row.ids, 0) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row.ids), 0) for row in rows]),
    }
    if name in MROPE:
        call["mm_token_type_ids"] = torch.tensor([pad(row.types, 0) for row in rows])
    if name == "gemma3":
        call["token_type_ids"] = torch.tensor([pad(row.types, 0) for row in rows])
    if name.startswith("paligemma"):
        call["token_type_ids"] = torch.zeros_like(call["input_ids"])
    if name in ("smolvlm", "idefics2", "idefics3"):
        call |= _padded_pictures(rows)
    else:
        for kind, suffix in (("image", ""), ("video", "_videos")):
            pictures = [picture for row in rows for picture in getattr(row, kind + "s")]
            if pictures:
                call |= _stacked(name, pictures, kind, suffix)
    return call, torch.tensor([pad(row.layout, -1) for row in rows])


def _padded_pictures(rows: list[Row]) -> dict[str, Tensor]:
    pictures = [
        torch.cat([p["pixels"] for p in row.images]) if row.images else torch.zeros(0, 3, 16, 16) for row in rows
    ]
    most = max(len(p) for p in pictures)
    if not most:
        return {}
    pixels = torch.stack([torch.cat([p, torch.zeros(most - len(p), 3, 16, 16)]) for p in pictures])
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(len(rows), most, 16, 16, dtype=torch.long)}


def _stacked(name: str, pictures: list[dict[str, Tensor]], kind: str, suffix: str) -> dict[str, Tensor]:
    pixels = [p["pixels"] for p in pictures]
    if name in ANYRES and kind == "image":
        most = max(len(p) for p in pixels)
        pixels = [torch.cat([p, torch.zeros(most - len(p), 3, 16, 16)])[None] for p in pixels]
    call = {f"pixel_values{suffix}": torch.cat(pixels)}
    if name in GRIDS:
        call[f"{kind}_grid_thw"] = torch.cat([p["grid"] for p in pictures])
    if name == "video_llama_3":
        call[f"{kind}_merge_sizes"] = torch.cat([p["merge"] for p in pictures])
    if "size" in pictures[0]:
        call["image_sizes"] = torch.cat([p["size"] for p in pictures])
    return call


def as_groups(layout: Tensor) -> list[list[tuple[int, ...]]]:
    """Per row, the positions of each group, whatever the groups are called."""
    return [sorted(tuple((row == name).nonzero()[:, 0].tolist()) for name in row[row >= 0].unique()) for row in layout]
