"""Cache entries of blocks that exited tokens skip, and of blocks that run on some rows of a batch.

Shape suffixes: B batch, N rows that run, H heads, T tokens of the call, S stored tokens, E head width, D width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from mmskip.hf.calls import StoredError

PerToken = dict[str, Any]
"""Arguments of a block that hold a value per token: tensors [B, T, ...] or tuples of them."""


class ExitLayer(DynamicLayer):
    """Cache layer of a block that exited tokens skip: their entries are copied, masked, or computed later.

    Attributes:
        valid: boolean [B, S], False for masked entries; None: there are none.
        copy_from: source of the entries of exited tokens in the call under way: the active tokens [B, T], and the
            layer below; None: nothing is copied.
        row_exits, all_exit: decisions that hold for a row, see `mmskip.exits.rules.Memory`.
        deferred: states [B, T, D] of the latest tokens, whose keys and values are not computed yet, with the block's
            arguments per token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.valid: Tensor | None = None
        self.copy_from: tuple[Tensor, DynamicLayer] | None = None
        self.row_exits: Tensor | None = None
        self.all_exit: bool | None = None
        self.deferred: list[tuple[Tensor, PerToken]] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries; those of exited tokens come from `copy_from`, if given."""
        if self.copy_from is not None:
            active_B1T1 = self.copy_from[0][:, None, :, None]
            below = last_entries(self.copy_from[1], key_states.shape[-2])
            key_states = torch.where(active_B1T1, key_states, below[0])
            value_states = torch.where(active_B1T1, value_states, below[1])
        return super().update(key_states, value_states, *args, **kwargs)

    def defer(self, x_BTD: Tensor, per_token: PerToken) -> None:
        """Keep states whose keys and values are computed when the block runs again, if it ever does."""
        self.deferred.append((x_BTD, per_token))

    def pop_deferred(self) -> tuple[Tensor, PerToken]:
        """Return all deferred states [B, T, D] with their arguments per token, and forget them."""
        deferred, self.deferred = self.deferred, []
        if len(deferred) == 1:
            return deferred[0]
        states, arguments = zip(*deferred, strict=True)
        return torch.cat(states, 1), {name: _join([given[name] for given in arguments]) for name in arguments[0]}

    def get_seq_length(self) -> int:
        return super().get_seq_length() + sum(x_BTD.shape[1] for x_BTD, _ in self.deferred)

    def mark(self, active_BT: Tensor | None, count: int, batch: int, device: torch.device) -> None:
        """Note which of the next `count` entries are active."""
        if active_BT is None and self.valid is None:
            return
        stored = self.get_seq_length()
        old_BS = self.valid
        if old_BS is None:
            old_BS = torch.ones(batch, stored, dtype=torch.bool, device=device)
        new_BT = torch.ones(batch, count, dtype=torch.bool, device=device) if active_BT is None else active_BT
        self.valid = torch.cat([old_BS, new_BT], dim=1)

    def reset(self) -> None:
        super().reset()
        self.valid, self.row_exits, self.deferred = None, None, []

    def crop(self, tokens_to_remove: int) -> None:
        # in some versions a positive number is the length to keep
        cut = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        if self.valid is not None and cut:
            self.valid = self.valid[:, :-cut]
        while cut and self.deferred:
            (x_BTD, per_token) = self.deferred.pop()
            kept = max(0, x_BTD.shape[1] - cut)
            cut -= x_BTD.shape[1] - kept
            if kept:
                self.deferred.append((x_BTD[:, :kept], _map(per_token, lambda t, kept=kept: t[:, :kept])))
        if cut:  # some versions take 0 as the length to keep
            super().crop(-cut)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._permute(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._permute(lambda tensor: tensor[indices])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._permute(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def _permute(self, pick: Any) -> None:
        """Apply `pick` to the rows of all tensors."""
        if super().get_seq_length():
            assert self.keys is not None and self.values is not None
            self.keys, self.values = pick(self.keys), pick(self.values)
        if self.valid is not None:
            self.valid = pick(self.valid)
        if self.row_exits is not None:
            self.row_exits = pick(self.row_exits)
        if self.deferred:
            x_BTD, per_token = self.pop_deferred()
            self.defer(pick(x_BTD), _map(per_token, pick))


def _join(values: list[Any]) -> Any:
    if isinstance(values[0], tuple):
        return tuple(_join(list(parts)) for parts in zip(*values, strict=True))
    return torch.cat(values, 1)


def _map(per_token: PerToken, change: Any) -> PerToken:
    return {
        name: tuple(map(change, value)) if isinstance(value, tuple) else change(value)
        for name, value in per_token.items()
    }


def last_entries(layer: DynamicLayer, count: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values [B, H, count, E] that were stored last."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys[..., -count:, :], layer.values[..., -count:, :]


def exit_layer(cache: Any, index: int) -> DynamicLayer:
    """Return the self-attention entry of a block, an `ExitLayer` except for the first block.

    Raises:
        ValueError: a cache whose entries cannot differ from token to token.
    """
    own: Cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layers = own.layers
    if index < len(layers) and type(layers[index]) is ExitLayer and not own.offloading:
        return layers[index]  # type: ignore[return-value]
    if own.layer_class_to_replicate is not None:
        while len(layers) <= index:
            layers.append(own.layer_class_to_replicate())
    layer: Any = layers[index]
    if type(layer) is not DynamicLayer or own.offloading:
        raise ValueError(
            f"layer {index} of past_key_values is a {type(layer).__name__}{' (offloaded)' if own.offloading else ''}; "
            "early exit needs a DynamicCache: in generate, leave cache_implementation out or set it to 'dynamic'."
        )
    if index:
        fresh: Any = ExitLayer()
        if layer.is_initialized:
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None
            fresh.lazy_initialization(keys, values)
            fresh.keys, fresh.values = keys, values
        layers[index] = layer = fresh
    return layer


# --- stand-ins for a cache ------------------------------------------------------------------------------------------


class _Capture(DynamicLayer):
    """Takes the keys and values of a block and stops it there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        raise StoredError


def capture(cache: Any, index: int) -> tuple[Any, DynamicLayer]:
    """Return a cache of the type of `cache` that stops block `index` at its update, and the layer that then holds the
    block's keys and values."""
    layer = _Capture()
    own = DynamicCache()
    own.layers = [*[DynamicLayer() for _ in range(index)], layer]
    return (EncoderDecoderCache(own, DynamicCache()) if isinstance(cache, EncoderDecoderCache) else own), layer


class _RowLayer(DynamicLayer):
    """Replaces the entry of all rows in a call of some rows.

    Args:
        entry: of all rows.
        rows: indices [N] of the rows of the call.
        others: indices of the other rows, and their keys and values; None: zeros, which nothing reads.
    """

    def __init__(self, entry: DynamicLayer, rows: Tensor, others: tuple[Tensor, Tensor, Tensor] | None) -> None:
        super().__init__()
        self._entry, self._rows, self._others = entry, rows, others

    def get_seq_length(self) -> int:
        return self._entry.get_seq_length()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store entries of all rows; return those [N, H, S, E] of the rows of the call."""
        assert self._entry.keys is not None
        stored = []
        for position, part in enumerate((key_states, value_states)):
            all_BHTE = part.new_zeros(self._entry.keys.shape[0], *part.shape[1:])
            all_BHTE[self._rows] = part
            if self._others is not None:
                all_BHTE[self._others[0]] = self._others[1 + position]
            stored.append(all_BHTE)
        keys, values = self._entry.update(*stored)
        return keys[self._rows], values[self._rows]


def row_cache(
    cache: Any, entry: DynamicLayer, index: int, rows: Tensor, others: tuple[Tensor, Tensor, Tensor] | None
) -> Any:
    """Return a cache of the type of `cache` with which block `index` runs on some rows; arguments as `_RowLayer`."""
    own = DynamicCache()
    own.layers = [*[DynamicLayer() for _ in range(index)], _RowLayer(entry, rows, others)]
    if not isinstance(cache, EncoderDecoderCache):
        return own
    pair = EncoderDecoderCache(own, DynamicCache())
    crossed: Any = cache.cross_attention_cache.layers[index]
    few = DynamicLayer()
    few.keys, few.values, few.is_initialized = crossed.keys[rows], crossed.values[rows], True
    pair.cross_attention_cache.layers = [*[DynamicLayer() for _ in range(index)], few]
    pair.is_updated[index] = True
    return pair


def serves_rows(cache: Any, entry: DynamicLayer | None, index: int) -> bool:
    """Return whether block `index` can run on some rows of a batch: all rows have entries, those of cross-attention
    included."""
    if cache is None:
        return True
    if isinstance(cache, EncoderDecoderCache) and not cache.is_updated.get(index):
        return False
    return entry is not None and entry.is_initialized and entry.keys is not None and entry.keys.numel() > 0
