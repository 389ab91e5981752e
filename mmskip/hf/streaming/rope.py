"""Rotate cached keys back by some positions (rotary position embeddings), with the model's own functions.

Shape suffixes: B streams, H heads, K entries, E head width, R rotated part of it, D width.
"""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from mmskip.hf.calls import CACHE_ARGUMENTS
from mmskip.hf.structure import attention_of

_DYNAMIC = ("dynamic", "longrope")


class _KeyCapture:
    """A cache that keeps the keys of the last update."""

    key: Tensor

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.key = key
        return key, value


class Rotation:
    """Rotates the keys of a decoder's layers. Build it once per model: each layer is tried on a fixed token, so that
    keys of layers without rotary embeddings stay as they are and unknown rotations are refused.

    Args:
        view: the decoder (`mmskip.families.decoder.DecoderView`).

    Raises:
        ValueError: the keys of this model cannot be moved to other positions.
    """

    def __init__(self, view: Any) -> None:
        self._view = view
        self._rotary: Any = getattr(view.root, "rotary_emb", None)
        attention = attention_of(view.blocks[0])
        self._apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        name = type(view.root).__name__
        if self._rotary is None or self._apply is None:
            raise ValueError(
                f"{name} has no rotary position embeddings, so the keys of a stream cannot be moved to other "
                "positions; use positions='absolute'."
            )
        kinds = str(getattr(view.config, "rope_parameters", "") or "")
        if any(f"'{kind}'" in kinds for kind in _DYNAMIC):
            raise ValueError(
                f"the rotary frequencies of {name} change with the length ({kinds}), so keys cannot be moved to other "
                "positions; use positions='absolute'."
            )
        self._by_type = "layer_type" in inspect.signature(self._rotary.forward).parameters
        with torch.no_grad():
            self.turns = tuple(self._try(index) for index in range(len(view.blocks)))

    def turn(self, index: int, keys_BHKE: Tensor, turn_BK: Tensor) -> Tensor:
        """Rotate keys of block `index` back by `turn_BK` positions."""
        if not self.turns[index]:
            return keys_BHKE
        return self._turned(index, keys_BHKE, turn_BK)

    def _turned(self, index: int, keys_BHKE: Tensor, turn_BK: Tensor) -> Tensor:
        assert self._apply is not None
        cos_BKR, sin_BKR = self._embeddings(index, keys_BHKE.device, turn_BK)
        scale = self._embeddings(index, keys_BHKE.device, turn_BK[:1, :1] * 0)[0].max()
        width = cos_BKR.shape[-1]
        part = keys_BHKE[..., :width].float()
        part = self._apply(part, part, cos_BKR / scale, -sin_BKR / scale)[1]
        return torch.cat([part.to(keys_BHKE.dtype), keys_BHKE[..., width:]], dim=-1)

    def _embeddings(self, index: int, device: torch.device, positions_BK: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(1, device=device, dtype=torch.float32)
        kind = (self._view.config.layer_types[index],) if self._by_type else ()
        return self._rotary(like, positions_BK, *kind)

    def _try(self, index: int) -> bool:
        near, by = 3, 5
        keys = [self._key(index, position) for position in (near, near + by)]
        scale = keys[0].abs().max().clamp(min=1e-9)
        close = 1e-4 if keys[0].dtype == torch.float32 else 0.05
        if bool((keys[0] - keys[1]).abs().max() <= 1e-9 * scale):
            return False
        turned = self._turned(index, keys[1], torch.full((1, 1), by, device=keys[1].device))
        if bool((turned - keys[0]).abs().max() > close * scale):
            raise ValueError(
                f"block {index} of {type(self._view.root).__name__} rotates its keys in an unknown way; use "
                "positions='absolute'."
            )
        return True

    def _key(self, index: int, position: int) -> Tensor:
        """Return the key [1, H, 1, E] that the attention of a block computes for one fixed token at a position."""
        attention = attention_of(self._view.blocks[index])
        weight = next(p for p in attention.parameters() if p.is_floating_point())
        x_11D = torch.linspace(-1, 1, self._view.width, device=weight.device).sin().to(weight.dtype)[None, None]
        place = torch.full((1, 1), position, device=weight.device)
        capture = _KeyCapture()
        embeddings = tuple(part.to(weight.dtype) for part in self._embeddings(index, weight.device, place))
        given: dict[str, Any] = {
            "hidden_states": x_11D,
            "position_embeddings": embeddings,
            "attention_mask": None,
            **dict.fromkeys(CACHE_ARGUMENTS, capture),
            "position_ids": place,
        }
        known = inspect.signature(type(attention).forward).parameters
        attention(**{name: value for name, value in given.items() if name in known})
        return capture.key
