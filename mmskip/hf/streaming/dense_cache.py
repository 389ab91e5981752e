"""One stream over the cache that a model makes for itself: for models whose layers are not all attention, or that no
family knows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmskip.hf.calls import CACHE_NAME


class PlainCache:
    """What `mmskip.hf.streaming.cache.StreamCache` is to several bounded streams, for one stream without bounds, one
    frame per call.

    Args:
        config: of the language model.
        position_range: positions that the model has; None: its config's `max_position_embeddings`.
        device: where calls come from.
    """

    roll = None

    def __init__(self, config: Any, position_range: int | None, device: torch.device) -> None:
        self.range = position_range or getattr(config, "max_position_embeddings", None)
        self.totals, self.bases, self.device = [0], [0], device
        self._cache: Any = None

    def base_of(self, position: int) -> int:
        """0: positions are absolute."""
        return 0

    def begin(self, layout: np.ndarray, lengths: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the model's forward for one more call.

        Raises:
            ValueError: beyond the model's range; nothing has changed then.
        """
        total = self.totals[0] + lengths[0]
        if self.range is not None and total > self.range:
            raise ValueError(f"the stream would be {total} tokens long, the model has {self.range} positions")
        self.totals = [total]
        mask = torch.ones(1, total, dtype=torch.long, device=self.device)
        return {"attention_mask": mask, CACHE_NAME: self._cache, "use_cache": True}

    def end(self, output: Any) -> None:
        """Keep the cache of the model's output."""
        self._cache = getattr(output, CACHE_NAME)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the model's cache."""
        layers = getattr(self._cache, "layers", ())
        tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    reserved_bytes = stored_bytes

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Streams of such a model cannot be saved.

        Raises:
            ValueError: always.
        """
        raise ValueError("streams of this language model cannot be saved: its cache holds more than keys and values")
