"""The cache layer of a block that processes some tokens only: every row has its own positions.

Shape suffixes: B batch, H key/value heads, K stored entries, S new entries, E head width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)

from mmskip.hf.routing.frames import seen_before


class SlotCacheLayer(CacheLayerMixin):
    """Keys and values of the tokens a block processed, with the slot of each in its row.

    A *slot* is the index of a token in its (padded) row, counted from the start of the stream; windows and
    `crop` are measured in slots, never in stored entries. Lengths reported to transformers are those of the
    stream, as a dense layer would report them; `keys.shape[-2]` entries are stored.

    Attributes:
        keys, values: [B, H, K, E]
        slots: LongTensor [B, K]
        valid: BoolTensor [B, K], False on padding
        host_valid: `valid` on the host, where it is known there; else None
        total: tokens of the stream so far
        frames: LongTensor [B, F, 3], the frames seen, see `mmskip.hf.routing.frames`; None: none
        cropped: whether tokens were removed since the last update
    """

    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.slots: Tensor | None = None
        self.valid: Tensor | None = None
        self.host_valid: np.ndarray | None = None
        self.frames: Tensor | None = None
        self.cropped = False
        self.total = 0
        self.all_valid = True
        # (entries, end) of each update, and the end of the last one dropped: the host knows the stored entries
        self._chunks: list[tuple[int, int]] = []
        self._floor = 0
        self._pending: tuple[Tensor, Tensor, int, bool, Tensor | None, np.ndarray | None] | None = None

    def begin(
        self,
        slots: Tensor,
        valid: Tensor | None,
        total: int,
        frames: Tensor | None,
        host_valid: np.ndarray | None = None,
    ) -> tuple[Tensor, Tensor, bool, np.ndarray | None]:
        """Announce the entries of the next `update`.

        Args:
            slots: LongTensor [B, S].
            valid: BoolTensor [B, S]; None: all valid.
            total: length of the stream after this forward.
            frames: LongTensor [B, F, 3], the frames seen after it; None: none.
            host_valid: bool [B, S], `valid` on the host; None where it is not known there.

        Returns:
            Of the keys attention will see: slots [B, K + S], validity [B, K + S], whether all are valid, and validity
            on the host (or None).
        """
        if valid is None:
            valid_S, all_valid = torch.ones_like(slots, dtype=torch.bool), self.all_valid
        else:
            valid_S, all_valid = valid, False
        if self.slots is not None and self.valid is not None:
            slots = torch.cat([self.slots, slots], dim=1)
            valid_S = torch.cat([self.valid, valid_S], dim=1)
            known = host_valid is not None and self.host_valid is not None
            host_valid = np.concatenate([self.host_valid, host_valid], axis=1) if known else None
        self._pending = (slots, valid_S, total, all_valid, frames, host_valid)
        return slots, valid_S, all_valid, host_valid

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[..., :0, :]
        self.values = value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the entries announced by `begin`, and return all keys and values, [B, H, K + S, E]."""
        if self._pending is None:
            raise RuntimeError(
                "this cache belongs to a routed block: it was updated by a model without mmskip. Use a fresh cache, "
                "or the model it was filled by."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.keys, self.values = keys, values
        self.slots, self.valid, self.total, self.all_valid, self.frames, self.host_valid = self._pending
        self._pending, self.cropped = None, False
        self._chunks.append((key_states.shape[-2], self.total))
        self._drop_before_window()
        return keys, values

    def _drop_before_window(self) -> None:
        if self.window is None or self.record_past:
            return
        drop = 0
        while self._chunks and self._chunks[0][1] <= self.total - self.window + 1:
            count, self._floor = self._chunks.pop(0)
            drop += count
        if drop:
            self._keep(slice(drop, None))

    def _keep(self, columns: slice) -> None:
        assert self.keys is not None and self.values is not None
        assert self.slots is not None and self.valid is not None
        self.keys, self.values = self.keys[..., columns, :], self.values[..., columns, :]
        self.slots, self.valid = self.slots[:, columns], self.valid[:, columns]
        self.host_valid = None if self.host_valid is None else self.host_valid[:, columns]

    def get_seq_length(self) -> int:
        return self.total

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.window is None or self.total < self.window:
            return self.total + query_length, 0
        return self.window - 1 + query_length, self.total - self.window + 1

    def activate_past_recording(self) -> None:
        """Keep entries that left the window until the next `crop` (assisted decoding rolls back)."""
        self.record_past = True

    def reset(self) -> None:
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of the stream (a value <= 0, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop got {tokens_to_remove}; expected a negative number of tokens to remove, as for the cache layers "
                "of transformers."
            )
        if self.slots is None or self.valid is None:
            return
        if tokens_to_remove == 0:
            self._drop_before_window()
            return
        total = max(self.total + tokens_to_remove, 0)
        if self.window is not None and max(total - self.window + 1, 0) < self._floor:
            raise RuntimeError(
                f"crop would need entries that left the sliding window of {self.window} tokens; call "
                "activate_past_recording() on the cache before the forwards to be rolled back."
            )
        self.total = total
        self.valid = self.valid & (self.slots < total)
        self.host_valid = self.valid.cpu().numpy()
        kept = int(np.flatnonzero(self.host_valid.any(0)).max(initial=-1)) + 1
        self._keep(slice(0, kept))
        self.all_valid = bool(self.host_valid.all())
        self.cropped = True
        if self.frames is not None:
            self.frames = seen_before(self.frames, total)
        self._crop_chunks(kept, total)
        self._drop_before_window()

    def _crop_chunks(self, kept: int, total: int) -> None:
        chunks, seen = [], 0
        for count, end in self._chunks:
            count = min(count, kept - seen)
            seen += count
            if count:
                chunks.append((count, min(end, total)))
        self._chunks = chunks

    def _rows(self, pick: Any) -> None:
        if self.keys is None or self.values is None:
            return
        self.keys, self.values = pick(self.keys), pick(self.values)
        self.slots, self.valid = pick(self.slots), pick(self.valid)
        self.frames = pick(self.frames) if self.frames is not None else None
        if self.host_valid is not None:
            # equal rows, the common case, stay equal in any order: then nothing has to be read from the device
            equal = bool((self.host_valid == self.host_valid[:1]).all())
            first = np.repeat(self.host_valid[:1], len(self.keys), axis=0)
            self.host_valid = first if equal else pick(torch.from_numpy(self.host_valid)).numpy()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices.to(t.device)])


def check_cache(cache: Any) -> None:
    """Check that routed blocks can keep their entries in `cache` (None: no cache).

    Raises:
        ValueError: a static, quantized, offloaded or encoder-decoder cache.
    """
    if cache is None:
        return
    kind = type(cache).__name__
    if isinstance(cache, EncoderDecoderCache):
        raise ValueError(
            f"past_key_values is an {kind}; routed blocks have no cross-attention and need a DynamicCache."
        )
    if cache.offloading:
        kind = f"{kind} offloaded to the CPU"
    elif not isinstance(cache, (StaticCache, QuantizedCache)) and not getattr(cache, "is_compileable", False):
        return
    raise ValueError(
        f"past_key_values is a {kind}; routed blocks store another number of tokens in every row, which static, "
        "quantized and offloaded caches cannot hold. Use a DynamicCache: in generate, leave cache_implementation out "
        "or set it to 'dynamic'."
    )


def slot_layer(cache: Cache, layer_idx: int, window: int | None) -> SlotCacheLayer:
    """Return the cache layer of a routed block, which replaces that of transformers on first use.

    Raises:
        ValueError: the cache cannot hold rows of different lengths, or holds entries of a forward without mmskip.
    """
    check_cache(cache)
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    present: Any = cache.layers[layer_idx]
    if isinstance(present, SlotCacheLayer):
        return present
    if type(present) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"layer {layer_idx} of past_key_values is a {type(present).__name__}; routed blocks store another number "
            "of tokens in every row and need a DynamicCache."
        )
    if present.get_seq_length() > 0:
        raise ValueError(
            f"layer {layer_idx} of past_key_values holds {present.get_seq_length()} tokens of a forward without "
            "mmskip; start from an empty cache after apply_. (peft's prefix tuning fills the cache like this and "
            "does not work with routed blocks; use LoRA, or prompt tuning.)"
        )
    fresh = SlotCacheLayer(window)
    # a cache without a config has no sliding layers; transformers reads mask sizes from the first sliding layer
    fresh.is_sliding = present.is_sliding
    fresh.record_past = getattr(present, "record_past", False)
    cache.layers[layer_idx] = fresh
    return fresh
