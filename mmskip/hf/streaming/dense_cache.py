"""One stream over the model's own cache: for models with layers other than attention, or that no family fits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmskip.hf.calls import CACHE_NAME


class DenseCache:
    """Counterpart of `mmskip.hf.streaming.cache.StreamCache` for one stream without a window, one frame per call.

    Args:
        config: of the language model.
        position_range: positions that the model has; None: its config's `max_position_embeddings`.
        device: of the calls' inputs.
    """

    roll = None

    def __init__(self, config: Any, position_range: int | None, device: torch.device) -> None:
        self.range = position_range or getattr(config, "max_position_embeddings", None)
        self.totals, self.bases, self.device = [0], [0], device
        self._cache: Any = None

    def base_of(self, position: int) -> int:
        """Return 0: positions are absolute."""
        return 0

    def begin(self, layout: np.ndarray, lengths: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
        """Announce a call, and return arguments for the model's forward; see `StreamCache.begin`.

        Raises:
            ValueError: positions beyond the model's range; nothing has changed.
        """
        total = self.totals[0] + lengths[0]
        if self.range is not None and total > self.range:
            raise ValueError(f"the stream would be {total} tokens long, the model has {self.range} positions")
        self.totals = [total]
        mask = torch.ones(1, total, dtype=torch.long, device=self.device)
        return {"attention_mask": mask, CACHE_NAME: self._cache, "use_cache": True}

    def end(self, output: Any) -> None:
        """Keep the cache in the model's output."""
        self._cache = getattr(output, CACHE_NAME)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the model's cache."""
        layers = getattr(self._cache, "layers", ())
        tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    reserved_bytes = stored_bytes

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Refuse to save: the cache of such a model may hold more than keys and values.

        Raises:
            ValueError: always.
        """
        raise ValueError("streams of this language model cannot be saved: its cache holds more than keys and values")
