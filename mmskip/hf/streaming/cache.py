"""The KV cache of running streams: several in one batch, each at its own position, optionally bounded by a window.

Every layer stores the tokens it processed and nothing else: no padding, no skipped token. Under a window a token sees
the last `window` positions, itself included, and the first `sinks` positions of its stream, whichever of them a layer
stores.

Shape suffixes: B streams, T tokens of a call, S tokens a layer processes, K keys it sees, H heads, E head width.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mmskip.hf.calls import CACHE_NAME
from mmskip.hf.masks import build_mask
from mmskip.hf.streaming.rope import Rotation
from mmskip.hf.streaming.slot_ledger import SlotLedger, StorePlan, TokenRun, pieces_of
from mmskip.tokens.groups import TEXT, TokenGroups
from mmskip.tokens.selection import Selection

POSITIONS = ("absolute", "rolling")


class StreamLayer(CacheLayerMixin):
    """Keys and values of one layer in buffers that grow by an eighth; `keys` and `values` are views of the stored
    entries."""

    def __init__(self, index: int, ledger: SlotLedger, rotation: Rotation | None, sliding: bool) -> None:
        super().__init__()
        self.index, self.ledger, self.rotation, self.is_sliding = index, ledger, rotation, sliding
        self._buffers: list[Tensor] = []
        self._done = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._buffers = [x[:, :, :0].new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (key_states, value_states)]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the entries that the ledger announced, and return all keys and values, [B, H, K, E]."""
        plan = self.ledger.plan
        if plan is None or plan.number == self._done:
            raise RuntimeError(
                f"layer {self.index} of a stream's cache got a call that was not announced; feed streams only through "
                "mmskip.models.video_llm.streaming.engine.StreamEngine."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if plan.turn_BK is not None and self.rotation is not None and plan.turn_BK.shape[1]:
            stored = self._buffers[0][:, :, : plan.turn_BK.shape[1]]
            stored.copy_(self.rotation.turn(self.index, stored, plan.turn_BK.to(stored.device)))
        if plan.moves is not None:
            self._buffers = [_moved(buffer, plan) for buffer in self._buffers]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            _write(buffer, new, plan)
        self._done = plan.number
        self.keys, self.values = (buffer[:, :, : plan.length] for buffer in self._buffers)
        return self.keys, self.values

    def crop_view(self) -> None:
        """Update `keys` and `values` after the ledger was cropped."""
        self.keys, self.values = (buffer[:, :, : max(self.ledger.counts)] for buffer in self._buffers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored entries."""
        return self.ledger.entries * self.entry_bytes

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry: keys and values of all heads."""
        return sum(b.shape[1] * b.shape[3] * b.element_size() for b in self._buffers)

    def get_seq_length(self) -> int:
        return max(self.ledger.counts)

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers builds a mask itself only in a first call without padding or windows
        return query_length, 0

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values, [B, H, K, E], for saving."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def restore(self, keys: Tensor, values: Tensor) -> None:
        """Restore saved keys and values."""
        self.lazy_initialization(keys, values)
        self._buffers = [torch.cat([x, torch.zeros_like(x[:, :, :1])], dim=2) for x in (keys, values)]
        self.crop_view()


def _moved(buffer: Tensor, plan: StorePlan) -> Tensor:
    fresh = buffer.new_zeros(*buffer.shape[:2], plan.capacity + 1, buffer.shape[3])
    for row, (pinned, first, stop) in enumerate(plan.moves or ()):
        fresh[row, :, :pinned] = buffer[row, :, :pinned]
        fresh[row, :, pinned : pinned + stop - first] = buffer[row, :, first:stop]
    return fresh


def _write(buffer: Tensor, new_BHSE: Tensor, plan: StorePlan) -> None:
    if plan.columns_BS is None:
        buffer[:, :, plan.column : plan.column + new_BHSE.shape[2]] = new_BHSE
    else:
        rows_B1 = torch.arange(len(buffer), device=buffer.device)[:, None]
        buffer[rows_B1, :, plan.columns_BS.to(buffer.device)] = new_BHSE.transpose(1, 2)


class _Call:
    """The call in progress: its tokens, on the host and on the device."""

    def __init__(self, layout: np.ndarray, lengths: Sequence[int], starts: Sequence[int], device: torch.device) -> None:
        self.starts, self.lengths = list(starts), list(lengths)
        batch, length = layout.shape
        self.runs = [_runs(layout[row, : lengths[row]], starts[row]) for row in range(batch)]
        places = (
            np.minimum(np.arange(length), np.maximum(np.array(lengths)[:, None] - 1, 0)) + np.array(starts)[:, None]
        )
        self.positions_BT = torch.from_numpy(places).to(device)
        self.real_BT = None
        if min(lengths) < length:
            self.real_BT = torch.from_numpy(np.arange(length) < np.array(lengths)[:, None]).to(device)
        self.turns: list[int] | None = None
        self.plain = max(starts) == 0 and self.real_BT is None


def _runs(layout: np.ndarray, start: int) -> list[TokenRun]:
    if not len(layout):
        return []
    edges = [0, *(np.flatnonzero(np.diff(layout)) + 1).tolist(), len(layout)]
    return [TokenRun(start + begin, start + end, layout[begin] != TEXT) for begin, end in itertools.pairwise(edges)]


class StreamCache(Cache):
    """The cache of B streams of one decoder.

    Args:
        view: the decoder (`mmskip.families.decoder.DecoderView`).
        streams: B.
        window: positions a token looks back on, itself included; None: all.
        sinks: first positions of a stream that stay visible under a window.
        positions: `absolute`: a token's position is its index in the stream, and a stream longer than
            `position_range` is refused; `rolling`: before a stream reaches that range, its stored keys are rotated back
            by `roll` positions, all but those of the sinks.
        position_range: positions that the model has; None: its config's `max_position_embeddings`.
        unit_tokens: most tokens of a frame with the text before it, which is never split.
        device: of the calls' inputs.

    Raises:
        ValueError: an unknown `positions`; rolling positions without a window, or that do not fit the range or the
            model; a model with blocks other than attention.
    """

    def __init__(
        self,
        view: Any,
        streams: int,
        window: int | None = None,
        sinks: int = 0,
        positions: str = "absolute",
        position_range: int | None = None,
        unit_tokens: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.view, self.window, self.sinks = view, window, sinks if window is not None else 0
        if unknown := set(view.attention_types()) - {"full", "sliding"}:
            raise ValueError(
                f"{type(view.root).__name__} has blocks of kind {', '.join(sorted(unknown))}, which keep no keys and "
                "values; streams need a decoder of attention blocks only."
            )
        self.range = position_range or getattr(view.config, "max_position_embeddings", None)
        self.roll = _roll(positions, window, self.sinks, unit_tokens, self.range)
        self.totals = [0] * streams
        self.bases = [0] * streams
        self.device = torch.device(device)
        self._call: _Call | None = None
        self._rotation = Rotation(view) if self.roll is not None else None
        kinds = view.attention_types()
        self._dense = {kind: self._ledger(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        self._own = [
            StreamLayer(
                index,
                self._ledger(index) if index in view.routed else self._dense[kind],
                self._rotation,
                kind == "sliding",
            )
            for index, kind in enumerate(kinds)
        ]
        super().__init__(layers=list(self._own))

    def _ledger(self, index: int) -> SlotLedger:
        sliding = self.view.windows[index]
        limits = [limit for limit in (sliding, self.window) if limit is not None]
        sinks = self.sinks if sliding is None else 0
        return SlotLedger(len(self.totals), min(limits, default=None), sinks, self.device)

    # --- one call -----------------------------------------------------------------------------------------------

    def base_of(self, position: int) -> int:
        """Return the offset subtracted from the positions of a unit whose last token is at `position` of its stream."""
        if self.roll is None or self.range is None or position < self.range:
            return 0
        return ((position - self.range) // self.roll + 1) * self.roll

    def begin(self, layout: np.ndarray, lengths: Sequence[int], dtype: torch.dtype) -> dict[str, Any]:
        """Announce a call with the new tokens of every stream.

        Args:
            layout: integers [B, T], frame id of a vision token and -1 for text; the tokens of each stream first, then
                padding.
            lengths: tokens of each stream, 0 to T.
            dtype: of the hidden states.

        Returns:
            `attention_mask`, `position_ids`, the cache and `use_cache` for the model's forward.

        Raises:
            ValueError: absolute positions beyond the model's range; nothing has changed.
        """
        ends = [start + length for start, length in zip(self.totals, lengths, strict=True)]
        if self.roll is None and self.range is not None and max(ends) > self.range:
            raise ValueError(
                f"stream {ends.index(max(ends))} would be {max(ends)} tokens long, the model has {self.range} "
                "positions; stream with positions='rolling' and a window, or start a new stream."
            )
        call = _Call(layout, lengths, self.totals, self.device)
        call.plain &= layout.shape[1] <= min([w for w in (*self.view.windows, self.window) if w], default=1 << 60)
        bases = [
            self.base_of(end - 1) if length else base
            for end, length, base in zip(ends, lengths, self.bases, strict=True)
        ]
        if bases != self.bases:
            call.turns = [new - old for new, old in zip(bases, self.bases, strict=True)]
        self._call, self.totals, self.bases = call, ends, bases
        masks: dict[str, Any] = {}
        # models with one mask per kind use them as they are, and without a mask only sdpa is causal by itself
        plain = call.plain and (len(self._dense) == 1 or self.view.config._attn_implementation == "sdpa")
        for kind, ledger in self._dense.items():
            pieces = [pieces_of(runs, _all_of(runs), ledger.sinks) for runs in call.runs]
            ledger.announce(call.positions_BT, pieces, call.starts, call.turns)
            sliding = next(w for w, t in zip(self.view.windows, self.view.attention_types(), strict=True) if t == kind)
            keys_BK = ledger.positions_BK()
            mask = None if plain else self._mask(self.view.config, call.positions_BT, keys_BK, sliding, dtype)
            masks[f"{kind}_attention"] = mask
        bases_B1 = torch.tensor(bases, device=self.device)[:, None]
        return {
            "attention_mask": masks if len(masks) > 1 else next(iter(masks.values())),
            "position_ids": call.positions_BT - bases_B1,
            CACHE_NAME: self,
            "use_cache": True,
        }

    @property
    def real_BT(self) -> Tensor | None:
        """BoolTensor [B, T], False on the padding of the call in progress; None: no padding."""
        assert self._call is not None
        return self._call.real_BT

    def attend(
        self, index: int, config: Any, groups: TokenGroups, selection: Selection, x_BSD: Tensor
    ) -> tuple[Any, int]:
        """Announce the tokens of the call in progress that a routed block processes.

        Args:
            index: of the block.
            config: the config its attention reads.

        Returns:
            The mask over its stored entries, and their number K.
        """
        call, layer = self._call, self._own[index]
        assert call is not None
        if selection.kept_G is None:
            raise ValueError(
                f"block {index} selects tokens without `kept_G`, their number per frame, which streams need."
            )
        ledger = layer.ledger
        kept = [selection.kept_G[groups.group_rows == row].tolist() for row in range(len(call.runs))]
        pieces = [
            pieces_of(runs, counts.__getitem__, ledger.sinks) for runs, counts in zip(call.runs, kept, strict=True)
        ]
        positions_BS = call.positions_BT.to(x_BSD.device).gather(1, selection.index_BS)
        plan = ledger.announce(positions_BS.to(self.device), pieces, call.starts, call.turns)
        if call.plain and selection.valid_BS is None and config._attn_implementation == "sdpa":
            return None, plan.length
        keys_BK = ledger.positions_BK().to(x_BSD.device)
        return self._mask(config, positions_BS, keys_BK, self.view.windows[index], x_BSD.dtype), plan.length

    def _mask(self, config: Any, query_BS: Tensor, key_BK: Tensor, sliding: int | None, dtype: torch.dtype) -> Any:
        """Build the mask: a query sees entries at or before its own position, in the window or among the sinks."""
        window, sinks = self.window, self.sinks

        def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
            query, key = query_BS[b, q], key_BK[b, k]
            seen = key <= query
            if sliding is not None:
                seen = seen & (query - key < sliding)
            if window is not None:
                seen = seen & ((query - key < window) | (key < sinks))
            return seen

        return build_mask(config, allowed, query_BS, key_BK.shape[1], dtype)

    # --- between calls ------------------------------------------------------------------------------------------

    def crop_stream(self, row: int, position: int) -> None:
        """Forget the tokens of a stream from `position` on: the end of a frame of the last call, or inside its text.

        Raises:
            ValueError: a position before the last call, whose entries a window may have dropped.
        """
        if self._call is None or not self._call.starts[row] <= position <= self.totals[row]:
            raise ValueError(f"stream {row} cannot go back to token {position}: only its last call can be undone.")
        for ledger in {id(layer.ledger): layer.ledger for layer in self._own}.values():
            ledger.crop(row, position)
        for layer in self._own:
            layer.crop_view()
        self.totals[row] = position

    def use(self, index: int) -> tuple[int, int, int]:
        """Return, after a call, keys a dense block attends to, KV bytes stored, KV bytes a dense block stores."""
        layer, dense = self._own[index], self._dense[self.view.attention_types()[index]]
        return max(dense.counts), layer.stored_bytes, dense.entries * layer.entry_bytes

    @property
    def entry_bytes(self) -> tuple[int, ...]:
        """Bytes of one entry of each layer, after the first call."""
        return tuple(layer.entry_bytes for layer in self._own)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all stored keys and values."""
        return sum(layer.stored_bytes for layer in self._own)

    @property
    def reserved_bytes(self) -> int:
        """Bytes of the buffers that hold them."""
        return sum(layer.reserved_bytes for layer in self._own)

    # --- saving -------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state to save: a JSON-ready part, and tensors by name."""
        ledgers = self._ledgers()
        tensors = {f"positions.{name}": ledger.positions_BK().contiguous() for name, ledger in ledgers.items()}
        for index, layer in enumerate(self._own):
            if layer.is_initialized:
                keys, values = layer.tensors()
                tensors[f"keys.{index}"], tensors[f"values.{index}"] = keys.contiguous(), values.contiguous()
        states = {name: ledger.state() for name, ledger in ledgers.items()}
        return {"totals": self.totals, "bases": self.bases, "ledgers": states}, tensors

    def restore(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned, in a cache of the same settings."""
        self.totals, self.bases = list(state["totals"]), list(state["bases"])
        for name, ledger in self._ledgers().items():
            ledger.restore(state["ledgers"][name], tensors[f"positions.{name}"])
        for index, layer in enumerate(self._own):
            if f"keys.{index}" in tensors:
                device = next(self.view.blocks[index].parameters()).device
                layer.restore(*(tensors[f"{part}.{index}"].to(device) for part in ("keys", "values")))

    def _ledgers(self) -> dict[str, SlotLedger]:
        routed = {f"block.{index}": self._own[index].ledger for index in self.view.routed}
        return {**self._dense, **routed}


def _all_of(runs: Sequence[TokenRun]) -> Any:
    return [run.end - run.begin for run in runs if run.vision].__getitem__


def _roll(positions: str, window: int | None, sinks: int, unit: int, reach: int | None) -> int | None:
    """Return by how many positions a rolling stream is rotated back at a time; None: absolute positions."""
    if positions not in POSITIONS:
        raise ValueError(f"positions is {positions!r}; expected one of {', '.join(POSITIONS)}.")
    if positions == "absolute":
        return None
    if window is None or reach is None:
        raise ValueError("positions='rolling' needs a window and a model that states max_position_embeddings.")
    if sinks + window + unit >= reach:
        raise ValueError(
            f"a window of {window} tokens with {sinks} sinks and units of up to {unit} tokens does not fit into the "
            f"{reach} positions of the model; give a smaller window."
        )
    return reach - sinks - window - unit
