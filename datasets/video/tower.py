"""Vision towers from timm, open_clip and transformers, frozen or trained: frames in, CLS + pooled grid tokens out.

Shapes: F frames, H and W pixels, G grid side, N = 1 + G * G tokens per frame, C channels.
"""

import difflib
import json
import math
from hashlib import sha256
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel


class VisionTower(nn.Module):
    """An image encoder that turns each frame into N = 1 + G * G tokens; frozen, unless it is to be trained.

    The first token is the model's CLS token (its attention pool where it has one, as SigLIP does; the mean of the
    patches where it has neither); the others are the patch grid, average-pooled to G x G, row by row.

    Args:
        name: `timm/<model>`, `open_clip/<model>[/<pretrained tag>]`, or `hf/<name or folder>` of a vision model of
            transformers (`hf/<model_type>`: from scratch, `tower_kwargs` are its configuration).
        pretrained: load the published weights (timm; for open_clip the tag in the name, or the model's first). They
            must be in the local cache, or a network must be there. Otherwise weights are random by `seed`.
        grid: G, at least 1 and at most the model's own patch grid.
        image_size: side of the square input, pixels; None: the model's own.
        tower_kwargs: further arguments of `timm.create_model` or `open_clip.create_model`, or of a configuration.
        seed: of random weights.
        trained: let the weights be trained: they get gradients, and the tower follows `train()`.

    Raises:
        ValueError: unknown library or model name (near names are listed), weights that cannot be had, or a grid finer
            than the model's.
    """

    mean: Tensor
    std: Tensor
    model: Any

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        grid: int = 3,
        image_size: int | None = None,
        tower_kwargs: dict[str, Any] | None = None,
        seed: int = 0,
        trained: bool = False,
    ) -> None:
        super().__init__()
        library, model_name, tag = check_tower_name(name)
        if grid < 1:
            raise ValueError(f"grid must be at least 1, got {grid}")
        kwargs = tower_kwargs or {}
        self.grid, self.trained = grid, trained
        self.features_id = tower_id(name, pretrained, grid, image_size, tower_kwargs, seed)
        load = pretrained or tag is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if library == "timm":
                model, size, mean, std = _timm_model(model_name, load, image_size, kwargs)
            elif library == "hf":
                model, size, mean, std = _hf_model(model_name, image_size, kwargs)
            else:
                model, size, mean, std = _open_clip_model(model_name, load, tag, image_size, kwargs)
        self.model = model
        self.image_size: int = size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(trained)
        self.eval()
        with torch.no_grad():
            cls, patches = self._features(torch.zeros(1, 3, size, size))
        if grid > min(patches.shape[-2:]):
            raise ValueError(
                f"grid={grid} is finer than the {patches.shape[-2]}x{patches.shape[-1]} patches of {name} at "
                f"{size} pixels; give a smaller grid or a larger image_size"
            )
        self.dim: int = cls.shape[-1]

    @property
    def num_tokens(self) -> int:
        """N, tokens per frame."""
        return 1 + self.grid**2

    def train(self, mode: bool = True) -> "VisionTower":
        """A frozen tower stays in evaluation mode."""
        return super().train(mode and self.trained)

    def forward(self, frames: Tensor) -> Tensor:
        """Encode frames.

        Args:
            frames: [F, 3, H, W], uint8 in 0..255 or float in 0..1; resized where it is not `image_size`.

        Returns:
            [F, N, C] in the dtype of the tower.
        """
        if frames.ndim != 4 or frames.shape[1] != 3:
            raise ValueError(f"frames must be [F, 3, H, W], got {tuple(frames.shape)}")
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return self._tokens(frames)

    def _tokens(self, frames: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        images = frames.to(dtype).div(255) if frames.dtype == torch.uint8 else frames.to(dtype)
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
        cls, patches = self._features((images - self.mean.to(dtype)) / self.std.to(dtype))
        pooled = adaptive_avg_pool2d(patches, self.grid).flatten(2).transpose(1, 2)
        return torch.cat([cls.unsqueeze(1), pooled], dim=1)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """CLS [F, C] and patches [F, C, h, w] of normalised images."""
        if isinstance(self.model, PreTrainedModel):
            return _hf_features(self.model(pixel_values=images).last_hidden_state)
        if not hasattr(self.model, "forward_features"):
            out = self.model.forward_intermediates(
                images, indices=1, normalize_intermediates=True, intermediates_only=True, output_extra_tokens=True
            )
            patches = out["image_intermediates"][0]
            prefix = out.get("image_intermediates_prefix")
            return (patches.mean((2, 3)) if prefix is None else prefix[0][:, 0]), patches
        out = self.model.forward_features(images)
        if out.ndim == 4:
            patches = out if out.shape[1] == self.model.num_features else out.permute(0, 3, 1, 2)
            return patches.mean((2, 3)), patches
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        side = math.isqrt(out.shape[1] - prefix)
        patches = out[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
        if getattr(self.model, "attn_pool", None) is not None:
            return self.model.attn_pool(out), patches
        return (out[:, 0] if prefix else patches.mean((2, 3))), patches


def tower_id(
    name: str,
    pretrained: bool = False,
    grid: int = 3,
    image_size: int | None = None,
    tower_kwargs: dict[str, Any] | None = None,
    seed: int = 0,
) -> str:
    """Sixteen characters that name weights, input size and grid: equal ids, equal features. Builds nothing."""
    weights = "pretrained" if pretrained else f"seed {seed}"
    parts = [name, weights, grid, image_size, tower_kwargs or {}]
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_tower_name(name: str) -> tuple[str, str, str | None]:
    """Split and check a tower name without building anything.

    Returns:
        Library ("timm", "open_clip" or "hf"), model name and pretrained tag (None where none is given).

    Raises:
        ValueError: a name that the library does not know; near names are listed.
    """
    library, _, rest = name.partition("/")
    if library == "timm":
        model_name, tag = rest, None
        known = timm.list_models() if timm.is_model(rest) is False else [rest]
        found = timm.is_model(rest)
    elif library == "open_clip":
        model_name, _, given = rest.partition("/")
        tag = given or None
        known = open_clip.list_models()
        found = model_name in known
    elif library == "hf" and rest:
        return library, rest, None  # known once its configuration is read
    else:
        raise ValueError(
            f"unknown vision tower {name!r}: write timm/<model>, open_clip/<model>[/<pretrained tag>] or hf/<name>"
        )
    if not found:
        near = difflib.get_close_matches(model_name, known, n=5, cutoff=0.4)
        raise ValueError(f"{library} has no model {model_name!r}; near names: {', '.join(near) or 'none'}")
    if tag is not None and tag not in open_clip.list_pretrained_tags_by_model(model_name):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model_name)) or "none"
        raise ValueError(f"open_clip model {model_name!r} has no weights {tag!r}; it has: {tags}")
    return library, model_name, tag


def _unavailable(name: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"vision tower {name} cannot be made ({reason}); its weights are not in the local cache and could not be "
        "fetched, or its arguments do not fit. Fetch them once where there is a network, or set pretrained to false"
    )


def _timm_model(
    name: str, pretrained: bool, image_size: int | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, int, tuple, tuple]:
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    except Exception as error:  # any library between us and the weights may fail
        raise _unavailable(f"timm/{name}", error) from error
    cfg = model.pretrained_cfg
    size = image_size or cfg["input_size"][-1]
    if hasattr(model, "set_input_size") and not kwargs.get("img_size"):
        model.set_input_size(img_size=size)
    elif kwargs.get("img_size"):
        size = kwargs["img_size"]
    return model, size, cfg["mean"], cfg["std"]


def _open_clip_model(
    name: str, pretrained: bool, tag: str | None, image_size: int | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, int, tuple, tuple]:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained and tag is None:
        if not tags:
            raise ValueError(f"open_clip model {name!r} has no published weights; set pretrained to false")
        tag = tags[0]
    try:
        visual = open_clip.create_model(
            name, pretrained=tag, pretrained_text=False, force_image_size=image_size, **kwargs
        ).visual
    except Exception as error:
        raise _unavailable(f"open_clip/{name}", error) from error
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    mean, std = visual.image_mean, visual.image_std
    return getattr(visual, "trunk", visual), size, mean, std


def _hf_model(name: str, image_size: int | None, kwargs: dict[str, Any]) -> tuple[nn.Module, int, tuple, tuple]:
    """A vision model of transformers: by name or folder with its weights, by model type from scratch."""
    mean = std = (0.5, 0.5, 0.5)
    size = {} if image_size is None else {"image_size": image_size}
    try:
        if name in CONFIG_MAPPING:
            model: Any = AutoModel.from_config(AutoConfig.for_model(name, **{**size, **kwargs}))
        else:
            model = AutoModel.from_pretrained(name, **kwargs)
            processor = AutoImageProcessor.from_pretrained(name)
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except Exception as error:
        raise _unavailable(f"hf/{name}", error) from error
    model = getattr(model, "vision_model", model)
    own = getattr(model.config, "image_size", None)
    own = own[0] if isinstance(own, list | tuple) else own
    if image_size is not None and own not in (None, image_size):
        raise ValueError(f"hf/{name} takes images of {own} pixels, image_size is {image_size}; omit image_size")
    return model, image_size or own or 224, mean, std


def _hf_features(states: Tensor) -> tuple[Tensor, Tensor]:
    """CLS [F, C] (the mean of the patches where there is none) and patches [F, C, h, w] of last hidden states."""
    if states.ndim == 4:
        return states.mean((2, 3)), states
    side = math.isqrt(states.shape[1])
    prefix = states.shape[1] - side**2  # CLS and registers
    patches = states[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    return (states[:, 0] if prefix else patches.mean((2, 3))), patches
