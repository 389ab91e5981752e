"""The layout of a call of a vision-language model: which tokens belong to one picture, read from the model's inputs.

A *picture* is one frame of a video, one image, or one tile where a processor cuts an image into tiles that the
language model sees one after the other. Tiles that the model stitches together again (the anyres of LLaVA-NeXT)
are one picture with the base view. Newline, separator and row-end tokens are text.

The model fills the placeholder tokens of a batch with the features of its pictures in order. A reader divides those
features into pictures by grids, sizes and tensor shapes, never by ids alone.

Shape suffixes: B batch, T tokens, N features of one modality in the batch.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmskip.tokens.groups import TEXT

PASS_LAYOUT = "pass layout=, an integer tensor [batch, tokens] with the frame id of each vision token and -1 for text"


@dataclass(frozen=True)
class Pictures:
    """The division of the features of one modality into pictures.

    Attributes:
        picture_N: number of the picture of each feature, -1 for a newline.
        run_N: number of the run of each feature; the tokens of a run are adjacent in one row.
    """

    picture_N: np.ndarray
    run_N: np.ndarray

    @classmethod
    def of_sizes(cls, sizes: Any) -> "Pictures":
        """Build pictures of the given numbers of features (a sequence of integers), each one run."""
        numbers = np.repeat(np.arange(len(sizes)), np.asarray(sizes, np.int64))
        return cls(numbers, numbers)

    @classmethod
    def of_parts(cls, parts: Sequence[np.ndarray]) -> "Pictures":
        """Build one run per part; a part holds picture numbers and -1."""
        runs = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return cls(np.concatenate(parts) if parts else np.zeros(0, np.int64), runs)


Reader = Callable[[Any, dict[str, Any], np.ndarray, str], Pictures]
"""(VLM module, arguments of its call, placeholders [B, T], modality) -> the pictures of that modality."""


def _host(value: Any, name: str) -> np.ndarray:
    if value is None:
        raise ValueError(
            f"{name} is missing, which divides the tokens into frames and images; pass it, or {PASS_LAYOUT}."
        )
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def grids(root: Any, call: dict[str, Any], mask_BT: np.ndarray, modality: str) -> Pictures:
    """Read Qwen-VL and Video-LLaMA 3: `*_grid_thw` [pictures, 3] before merging; t pictures of h * w / merge^2 each."""
    grid = _host(call.get(f"{modality}_grid_thw"), f"{modality}_grid_thw")
    merge: Any = root.config.vision_config
    if f"{modality}_merge_sizes" in inspect.signature(type(root).forward).parameters:
        merge = _host(call.get(f"{modality}_merge_sizes"), f"{modality}_merge_sizes")
    else:
        merge = np.full(len(grid), merge.spatial_merge_size)
    sizes = np.repeat(grid[:, 1] * grid[:, 2] // merge**2, grid[:, 0])
    pictures = Pictures.of_sizes(sizes)
    kept = call.get("video_compression_mask") if modality == "video" else None
    if kept is None:
        return pictures
    kept_N = _host(kept, "video_compression_mask").astype(bool)
    if len(kept_N) != len(pictures.picture_N):
        raise ValueError(
            f"video_compression_mask has {len(kept_N)} entries, video_grid_thw and video_merge_sizes give "
            f"{len(pictures.picture_N)} tokens; they must agree, or {PASS_LAYOUT}."
        )
    return Pictures(pictures.picture_N[kept_N], pictures.run_N[kept_N])


def equal_pictures(root: Any, call: dict[str, Any], mask_BT: np.ndarray, modality: str) -> Pictures:
    """Read towers that turn every picture of `pixel_values` [pictures, C, H, W] into equally many tokens: their number
    follows from the placeholders, which the model checks against its features."""
    pixels = call["pixel_values"]
    if pixels.dim() not in (4, 5):
        raise ValueError(f"pixel_values has shape {tuple(pixels.shape)}; expected 4 or 5 dimensions, or {PASS_LAYOUT}.")
    total = int(mask_BT.sum())
    count = pixels.shape[0]
    if pixels.dim() == 5:
        # [rows, pictures of the fullest row, C, H, W]; other rows are padded with zeros, which the model skips
        real = (pixels != 0).flatten(2).any(-1).cpu().numpy()
        real.reshape(-1)[0] |= not real.any()
        count = int(real.sum())
        placeholders = mask_BT.sum(1)
        if count and len(real) == len(mask_BT) and (placeholders * count != real.sum(1) * total).any():
            raise ValueError(
                f"rows hold {placeholders.tolist()} image tokens for {real.sum(1).tolist()} pictures of equal size in "
                f"pixel_values; they must agree, or {PASS_LAYOUT}."
            )
    if count == 0 or total % count or total == 0:
        raise ValueError(
            f"input_ids hold {total} image tokens for {count} pictures of equal size in pixel_values; expected equally "
            f"many for each, or {PASS_LAYOUT}."
        )
    return Pictures.of_sizes([total // count] * count)


def image_rows(root: Any, call: dict[str, Any], mask_BT: np.ndarray, modality: str) -> Pictures:
    """Read Pixtral towers: `image_sizes` [images, 2] in pixels; row-end tokens divide the rows of an image."""
    sizes = call.get("image_sizes")
    if sizes is None and "spatial_merge_size" not in root.config.to_dict():
        return equal_pictures(root, call, mask_BT, modality)
    patch = root.config.vision_config.patch_size * getattr(root.config, "spatial_merge_size", 1)
    cells = _host(sizes, "image_sizes") // patch
    widths = np.repeat(cells[:, 1], cells[:, 0])
    picture_N = np.repeat(np.arange(len(cells)), cells.prod(1))
    return Pictures(picture_N, Pictures.of_sizes(widths).run_N)


def anyres(root: Any, call: dict[str, Any], mask_BT: np.ndarray, modality: str) -> Pictures:
    """Read LLaVA-NeXT and LLaVA-OneVision: images of `image_sizes` [images, 2], whose tiles the model stitches together
    with newlines between rows; videos of `pixel_values_videos` [videos, frames, C, H, W]."""
    side = root.config.vision_config.image_size // root.config.vision_config.patch_size
    if modality == "video":
        return _pooled_video(root, call, side)
    sizes = torch.as_tensor(_host(call.get("image_sizes"), "image_sizes"))
    module = sys.modules[type(root).__module__]
    count_patches: Any = module.image_size_to_num_patches
    images = call.get("batch_num_images")
    untiled = [False] * len(sizes) if images is None else [int(n) != 1 for n in images for _ in range(int(n))]
    config = root.config
    tiles = [
        1 if one else count_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        for size, one in zip(sizes, untiled, strict=True)
    ]
    # the model's own packing, with features 0 and newlines 1
    settings = {"image_newline": torch.ones(1)}
    for name in ("vision_feature_select_strategy", "vision_aspect_ratio"):
        if name in inspect.signature(root.pack_image_features).parameters:
            settings[name] = getattr(config, name)
    packed, _ = root.pack_image_features([torch.zeros(n, side * side, 1) for n in tiles], sizes, **settings)
    return Pictures.of_parts([np.where(features[:, 0].numpy() > 0.5, TEXT, i) for i, features in enumerate(packed)])


def _pooled_video(root: Any, call: dict[str, Any], side: int) -> Pictures:
    pixels = call.get("pixel_values_videos")
    if pixels is None:
        raise ValueError(f"pixel_values_videos is missing, whose shape gives the frames; pass it, or {PASS_LAYOUT}.")
    videos, frames = pixels.shape[:2]
    resampler = getattr(root, "vision_resampler", None)
    if resampler is None:
        tokens, newline = (-(-side // 2)) ** 2, [TEXT]
    else:
        tokens, newline = (side // root.config.spatial_pool_stride) ** 2, []
    parts = [
        np.concatenate([np.repeat(np.arange(frames) + frames * video, tokens), np.array(newline, np.int64)])
        for video in range(videos)
    ]
    return Pictures.of_parts(parts)


READERS: dict[str, Reader] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "video_llama_3"), grids),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), anyres),
    **dict.fromkeys(
        ("paligemma", "gemma3", "internvl", "idefics2", "idefics3", "smolvlm", "aya_vision", "cohere2_vision"),
        equal_pictures,
    ),
    **dict.fromkeys(("llava", "mistral3"), image_rows),
}
"""Readers by `config.model_type`. A model without one needs `layout=` in every call."""

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
_TEXT_ARGUMENTS = {
    *("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position"),
    *("labels", "logits_to_keep", "token_type_ids", "mm_token_type_ids"),
}


def layout_of_call(root: Any, call: dict[str, Any], start: int = 0) -> Tensor | None:
    """Return the layout [B, T] of a call of the VLM module `root`; None where only the language model can know it.

    The id of a picture is the number of real tokens before it in its row, so it does not depend on padding, on other
    rows, or on how a stream is divided into calls.

    Args:
        call: arguments by name, of the forward or of `generate`.
        start: tokens already in the cache.

    Raises:
        ValueError: the groups are ambiguous, or grids, shapes and placeholders disagree.
    """
    ids, embeds = call.get("input_ids"), call.get("inputs_embeds")
    present = [m for m in _PIXELS if _has(call, m)]
    reader = READERS.get(root.config.model_type)
    foreign = [] if reader else [k for k, v in call.items() if isinstance(v, Tensor) and k not in _TEXT_ARGUMENTS]
    if reader is None and (present or foreign):
        raise ValueError(
            f"mmskip does not know how {type(root).__name__} divides {', '.join(foreign or present)} into frames and "
            f"images; {PASS_LAYOUT}."
        )
    inputs = embeds if ids is None else ids
    if inputs is None or (ids is None and not present):
        return None
    layout_BT = np.full(tuple(inputs.shape[:2]), TEXT, np.int64)
    if reader is None or not present:
        return torch.from_numpy(layout_BT).to(inputs.device)
    for modality in present:
        if call.get(_PIXELS[modality]) is None and call.get(f"{modality}_grid_thw") is None:
            raise ValueError(
                f"mm_encoder_outputs holds {modality} features, which do not show where a frame ends. For generate, "
                "which encodes first, call mmskip.apply_ on the model that has generate, not on the one inside; else "
                f"{PASS_LAYOUT}."
            )
    before_BT = _tokens_before(call.get("attention_mask"), layout_BT.shape, start)
    for modality in present:
        mask_BT = _placeholders(root, ids, embeds, modality)
        pictures = reader(root, call, mask_BT, modality)
        _place(layout_BT, mask_BT, pictures, before_BT, modality)
    return torch.from_numpy(layout_BT).to(inputs.device)


def _has(call: dict[str, Any], modality: str) -> bool:
    encoded = call.get("mm_encoder_outputs")
    if isinstance(encoded, dict) and encoded.get(modality) is not None:
        return True
    return call.get(_PIXELS[modality]) is not None


def _tokens_before(mask: Any, shape: tuple[int, ...], start: int) -> np.ndarray:
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= shape[1]:
        real = mask.cpu().numpy().astype(np.int64)
        return (real.cumsum(1) - real)[:, -shape[1] :]
    return np.broadcast_to(np.arange(start, start + shape[1]), shape)


def _placeholders(root: Any, ids: Tensor | None, embeds: Any, modality: str) -> np.ndarray:
    token = getattr(root.config, f"{modality}_token_id")
    if ids is not None:
        return (ids == token).cpu().numpy()
    # same rule as the models without ids
    wanted = root.get_input_embeddings()(torch.tensor(token, device=embeds.device))
    return (embeds == wanted.to(embeds.dtype)).all(-1).cpu().numpy()


def _place(
    layout_BT: np.ndarray, mask_BT: np.ndarray, pictures: Pictures, before_BT: np.ndarray, modality: str
) -> None:
    """Write the pictures of one modality into the layout, in the order in which the model fills placeholders."""
    places = np.flatnonzero(mask_BT)
    if len(places) != len(pictures.picture_N):
        raise ValueError(
            f"input_ids hold {len(places)} {modality} tokens, the {modality}s of the call fill "
            f"{len(pictures.picture_N)}; they must agree, or {PASS_LAYOUT}."
        )
    _check_places(places, mask_BT.shape[1], pictures, modality)
    order = np.flatnonzero(pictures.picture_N >= 0)
    firsts = order[np.concatenate([[True], np.diff(pictures.picture_N[order]) != 0])] if len(order) else order
    names = before_BT.reshape(-1)[places[firsts]]
    layout_BT.reshape(-1)[places[order]] = np.repeat(
        names, np.diff(np.append(np.searchsorted(order, firsts), len(order)))
    )


def _check_places(places: np.ndarray, length: int, pictures: Pictures, modality: str) -> None:
    """Raise ValueError if placeholders [N], positions in rows of `length`, divide a run, or a picture between rows."""
    rows = places // length
    same_run = pictures.run_N[1:] == pictures.run_N[:-1]
    order = np.flatnonzero(pictures.picture_N >= 0)
    same_picture = np.diff(pictures.picture_N[order]) == 0
    torn = (same_run & ((np.diff(places) != 1) | (np.diff(rows) != 0))).any()
    if torn or (same_picture & (np.diff(rows[order]) != 0)).any():
        raise ValueError(
            f"the {modality} tokens of input_ids do not match the sizes of the {modality}s: a picture would be split. "
            f"Check their order, or {PASS_LAYOUT}."
        )
