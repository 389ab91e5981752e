"""Family `hf_encoder_decoder`: encoder-decoders of transformers, found by structure, whose layers can be left early.

A decoder token that has exited keeps its state; layers above still owe its keys and values to later tokens. A layer
that some tokens of a call still need runs on all of them, and the exited ones keep their state; a layer that none needs
is left out, and only fills its cache entry:

| policy | entry of an exited token in the layers above |
|---|---|
| `project` | the layer's own keys and values of the state at the exit |
| `copy` | keys and values of the last layer that ran |
| `hole` | none: later tokens do not attend to it there (a masked place is kept, so that positions stay) |

Shape suffixes: B batch, H heads, T tokens of the call, S stored tokens, E head width, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from mmskip.exits import TiedHead
from mmskip.families.hf_blocks import CACHE_NAME, arguments_of
from mmskip.swap import Change, bind, state_of

POLICIES = ("project", "copy", "hole")
_FINAL_NORMS = ("final_layer_norm", "layer_norm", "ln_f", "norm", "layernorm")
_DECODER_ARGUMENTS = {"hidden_states", "attention_mask", "encoder_hidden_states", CACHE_NAME}


class ExitRule(Protocol):
    """What a method says: at which layers states may exit, and when.

    Attributes:
        points: numbers of layers that have run (from 1) at which an exit is possible, below the depth.
        policy: one of `POLICIES`; None for an encoder.
    """

    @property
    def points(self) -> tuple[int, ...]:
        """Numbers of layers."""

    @property
    def policy(self) -> str | None:
        """Of exited tokens' keys and values."""

    def begin(self, mask_BT: Tensor | None, past: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Called once per forward; the result is called behind each layer in `points` with the states behind and before
        it, [B, T, D], and says which states exit: boolean [B, T], or [B] for an encoder.

        Args:
            mask_BT: of an encoder, False on padding; None: no padding.
            past: tokens before the first one of the call.
        """


@dataclass
class Run:
    """One forward of a stack, shared by its blocks.

    Attributes:
        depth: layers.
        exits: layers that ran for each state, [B, T] or [B], of the latest forward.
        active: boolean of the same shape, True where layers still run; None: everywhere.
        left: how many states are active.
        visited: layers of the latest forward that ran.
        tail: what the blocks return beside the states.
        past: tokens before the call.
        cache: stands in for the model's where it was asked for none.
    """

    depth: int
    exits: Tensor | None = None
    active: Tensor | None = None
    left: int = 0
    visited: int = 0
    tail: tuple[Any, ...] | None = None
    past: int = 0
    cache: EncoderDecoderCache | None = None
    decide: Any = None

    def start(self, shape: torch.Size, device: torch.device, decide: Any, past: int = 0) -> None:
        """Forget the forward before."""
        self.exits = torch.full(shape, self.depth, device=device)
        self.active, self.left, self.visited = None, self.exits.numel(), 0
        self.tail, self.past, self.cache, self.decide = None, past, None, decide

    def keep(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """New states where layers still run, old ones elsewhere."""
        if self.active is None:
            return y_BTD
        return torch.where(self.active.view(*self.active.shape, *(1,) * (3 - self.active.dim())), y_BTD, x_BTD)

    def stop(self, layers: int, after_BTD: Tensor, before_BTD: Tensor) -> None:
        """Let states exit behind layer number `layers`."""
        assert self.exits is not None
        exits = self.decide(after_BTD, before_BTD)
        if self.active is not None:
            exits = exits & self.active
        count = int(exits.sum())  # the host decides which layers are called
        if count:
            self.exits = torch.where(exits, layers, self.exits)
            self.active = ~exits if self.active is None else self.active & ~exits
            self.left -= count


@dataclass(frozen=True)
class BlockState:
    """State of `DecoderExit` and `EncoderExit` on one block."""

    index: int
    rule: ExitRule
    run: Run

    @property
    def is_point(self) -> bool:
        """Whether states may exit behind this block."""
        return self.index + 1 in self.rule.points


def _output(run: Run, x_BTD: Tensor) -> Any:
    """What a block that is left out returns."""
    return x_BTD if run.tail is None else (x_BTD, *run.tail)


def _read(run: Run, output: Any) -> Tensor:
    run.visited += 1
    run.tail = tuple(output[1:]) if isinstance(output, tuple) else None
    return output[0] if isinstance(output, tuple) else output


class EncoderExit:
    """Mixin of an encoder block: every sample stops on its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, EncoderExit)  # type: ignore[arg-type]
        if self.training:  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values, run = bind(self, args, kwargs), state.run  # type: ignore[arg-type]
        x_BTD = values["hidden_states"]
        if state.index == 0:
            decide = state.rule.begin(_real(values.get("attention_mask"), x_BTD), 0)
            run.start(x_BTD.shape[:1], x_BTD.device, decide)
        if not run.left:
            return _output(run, x_BTD)
        y_BTD = run.keep(_read(run, super().forward(*args, **kwargs)), x_BTD)  # type: ignore[misc]
        if state.is_point:
            run.stop(state.index + 1, y_BTD, x_BTD)
        return _output(run, y_BTD)


def _real(mask: Tensor | None, x_BTD: Tensor) -> Tensor | None:
    """Which tokens are no padding, from the mask that blocks get: [B, 1, T, T], boolean or added to the scores."""
    if mask is None:
        return None
    if mask.dim() != 4:
        raise ValueError(
            f"the encoder's attention mask is {tuple(mask.shape)}; early exit reads padding from [B, 1, T, T] masks, "
            "which the attention implementations 'eager' and 'sdpa' use."
        )
    row_BT = mask[:, 0, 0]
    real_BT = row_BT if row_BT.dtype == torch.bool else row_BT > torch.finfo(row_BT.dtype).min / 2
    return real_BT.expand(x_BTD.shape[0], -1)


# --- decoder --------------------------------------------------------------------------------------------------------


class _FilledError(Exception):
    """Raised behind the cache update of a block that is only called for its keys and values."""


class ExitLayer(DynamicLayer):
    """Cache layer of a block that exited tokens pass over: they may get other keys and values, or none.

    Attributes:
        valid: boolean [B, S], False for holes; None: there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.valid: Tensor | None = None
        self.swap: tuple[Tensor, DynamicLayer] | None = None
        self.only_fill = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries; those of exited tokens come from the layer below if `swap` says so."""
        if self.swap is not None:
            active_B1T1 = self.swap[0][:, None, :, None]
            below = last_entries(self.swap[1], key_states.shape[-2])
            key_states = torch.where(active_B1T1, key_states, below[0])
            value_states = torch.where(active_B1T1, value_states, below[1])
        found = super().update(key_states, value_states, *args, **kwargs)
        if self.only_fill:
            raise _FilledError
        return found

    def mark(self, active_BT: Tensor | None, count: int, batch: int, device: torch.device) -> None:
        """Note which of the `count` entries that come next are no holes."""
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
        self.valid = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.valid is not None and tokens_to_remove:
            self.valid = self.valid[:, : -abs(tokens_to_remove)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))


def last_entries(layer: DynamicLayer, count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, count, E] that were stored last."""
    assert layer.keys is not None and layer.values is not None
    return layer.keys[..., -count:, :], layer.values[..., -count:, :]


def _layer(cache: Any, index: int) -> DynamicLayer:
    """The self-attention entry of a block, as an `ExitLayer` above the first block.

    Raises:
        ValueError: a cache whose entries cannot differ from token to token.
    """
    own: Cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if own.layer_class_to_replicate is not None:
        while len(own.layers) <= index:
            own.layers.append(own.layer_class_to_replicate())
    layer: Any = own.layers[index]
    if type(layer) not in (DynamicLayer, ExitLayer) or own.offloading:
        raise ValueError(
            f"layer {index} of past_key_values is a {type(layer).__name__}{' (offloaded)' if own.offloading else ''}; "
            "early exit needs a DynamicCache: in generate, leave cache_implementation out or set it to 'dynamic'."
        )
    if index and type(layer) is DynamicLayer:
        fresh: Any = ExitLayer()
        if layer.is_initialized:
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None
            fresh.lazy_initialization(keys, values)
            fresh.keys, fresh.values = keys, values
        own.layers[index] = layer = fresh
    return layer


class DecoderExit:
    """Mixin of a decoder block: every token stops on its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: BlockState = state_of(self, DecoderExit)  # type: ignore[arg-type]
        if self.training:  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        values, run, index = bind(self, args, kwargs), state.run, state.index  # type: ignore[arg-type]
        x_BTD, cache = values["hidden_states"], values.get(CACHE_NAME)
        if index == 0:
            past = 0 if cache is None else _layer(cache, 0).get_seq_length()
            run.start(x_BTD.shape[:2], x_BTD.device, state.rule.begin(None, past), past)
        if cache is None and state.rule.policy == "copy":
            run.cache = run.cache or EncoderDecoderCache(DynamicCache(), DynamicCache())
            cache = values[CACHE_NAME] = run.cache
        entry = None if cache is None else _layer(cache, index)
        if index and state.rule.policy == "hole":
            values["attention_mask"] = _with_holes(values.get("attention_mask"), entry, run, x_BTD)
        if not run.left:
            if entry is not None:
                self._fill(state, entry, cache, values)
            return _output(run, x_BTD)
        if isinstance(entry, ExitLayer) and state.rule.policy == "copy" and run.active is not None:
            entry.swap = run.active, _layer(cache, index - 1)
        try:
            y_BTD = run.keep(_read(run, super().forward(**values)), x_BTD)  # type: ignore[misc]
        finally:
            if isinstance(entry, ExitLayer):
                entry.swap = None
        if state.is_point:
            run.stop(index + 1, y_BTD, x_BTD)
        return _output(run, y_BTD)

    def _fill(self, state: BlockState, entry: DynamicLayer, cache: Any, values: dict[str, Any]) -> None:
        """Store what the policy asks for, for tokens that have all exited."""
        assert isinstance(entry, ExitLayer)
        if state.rule.policy == "project":
            entry.only_fill = True
            try:
                super().forward(**values)  # type: ignore[misc]
            except _FilledError:
                return
            finally:
                entry.only_fill = False
            raise RuntimeError(f"{type(self).__name__} stored no keys and values in its entry of the cache.")
        keys, values_BHTE = last_entries(_layer(cache, state.index - 1), values["hidden_states"].shape[1])
        if state.rule.policy == "hole":
            keys, values_BHTE = torch.zeros_like(keys), torch.zeros_like(values_BHTE)
        entry.update(keys, values_BHTE)


def _with_holes(mask: Tensor | None, entry: DynamicLayer | None, run: Run, x_BTD: Tensor) -> Tensor | None:
    """The attention mask of a block without the places of tokens that left before it. (A token that left sees itself:
    nothing reads its result, and a row without any key would not be a number.)"""
    batch, count = x_BTD.shape[:2]
    if isinstance(entry, ExitLayer):
        entry.mark(run.active, count, batch, x_BTD.device)
        valid_BS = entry.valid
    else:
        valid_BS = run.active
    if valid_BS is None:
        return mask
    stored = valid_BS.shape[1]
    place_S = torch.arange(stored, device=x_BTD.device)
    query_T1 = place_S[stored - count :, None]
    seen_BTS = valid_BS[:, None] | (place_S == query_T1)
    if mask is None:
        return (seen_BTS & (place_S <= query_T1))[:, None]
    if mask.dim() != 4:
        raise ValueError(
            f"the decoder's attention mask is {tuple(mask.shape)}; kv='hole' needs [B, 1, T, S] masks, which the "
            "attention implementations 'eager' and 'sdpa' use."
        )
    if mask.dtype == torch.bool:
        return mask & seen_BTS[:, None]
    return mask.masked_fill(~seen_BTS[:, None], torch.finfo(mask.dtype).min)


# --- the view -------------------------------------------------------------------------------------------------------


class ModelHead(TiedHead):
    """The model's own output, with the scale and the bias that some put behind the final norm and the projection."""

    def __init__(self, norm: nn.Module | None, generator: Any) -> None:
        scaled = getattr(generator.config, "scale_decoder_outputs", False)
        super().__init__(norm, nn.Identity(), generator.config.d_model**-0.5 if scaled else 1.0)
        self.generator = generator

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        logits_BTV = self.generator.get_output_embeddings()(super().__call__(x_BTD))
        bias = getattr(self.generator, "final_logits_bias", None)
        return logits_BTV if bias is None else logits_BTV + bias


@dataclass(frozen=True)
class EncoderDecoderView:
    """An encoder-decoder.

    Attributes:
        root: the model.
        encoder, decoder: their layers in order.
        norm: behind the decoder's last layer, or None.
        generator: the module with the output projection, or None.
    """

    root: nn.Module
    encoder: tuple[nn.Module, ...]
    decoder: tuple[nn.Module, ...]
    norm: nn.Module | None
    generator: Any
    family: str = field(default="hf_encoder_decoder")

    def head(self) -> ModelHead:
        """The tied exit head of the decoder.

        Raises:
            ValueError: the model has no output projection.
        """
        if self.generator is None:
            raise ValueError(
                f"{type(self.root).__name__} has no output projection for exit heads; apply to the model that has it "
                "(...ForConditionalGeneration), or use criterion 'saturation' or 'state_norm'."
            )
        return ModelHead(self.norm, self.generator)

    def exit_changes(self, module: str, rule: ExitRule) -> list[Change]:
        """The changes by which "encoder" or "decoder" is left early."""
        blocks: Sequence[nn.Module] = getattr(self, module)
        run, mixin = Run(len(blocks)), EncoderExit if module == "encoder" else DecoderExit
        return [
            Change(f"exit.{module}.{index + 1}", block, mixin, BlockState(index, rule, run))
            for index, block in enumerate(blocks)
        ]


def match(model: nn.Module) -> tuple[EncoderDecoderView | None, str]:
    """The view of `model`, or None and the reason why it does not fit."""
    from transformers import PreTrainedModel

    root: Any = next(
        (
            m
            for m in model.modules()
            if isinstance(m, PreTrainedModel) and getattr(m.config, "is_encoder_decoder", False)
        ),
        None,
    )
    if root is None:
        return None, f"{type(model).__name__} holds no encoder-decoder of transformers"
    stacks = []
    for part in (root.get_encoder(), _decoder(root)):
        found = [] if part is None or part is root else _stacks(part)
        if len(found) != 1:
            name = type(part).__name__
            return None, f"{name} of {type(root).__name__} has {len(found)} stacks of layers; expected one"
        stacks.append(found[0])
    (_, encoder), (parent, decoder) = stacks
    missing = _DECODER_ARGUMENTS - set(arguments_of(decoder[0]))
    if missing:
        return None, f"{type(decoder[0]).__name__}.forward takes no {', '.join(sorted(missing))}"
    if getattr(decoder[0], "is_decoder", True) is False:
        return None, f"{type(decoder[0]).__name__} is used as an encoder layer"
    norm = next(
        (getattr(parent, name) for name in _FINAL_NORMS if isinstance(getattr(parent, name, None), nn.Module)), None
    )
    generator = next(
        (m for m in root.modules() if isinstance(m, PreTrainedModel) and m.get_output_embeddings() is not None), None
    )
    return EncoderDecoderView(root, encoder, decoder, norm, generator), ""


def _decoder(root: Any) -> Any:
    """The decoder; some models name the encoder-decoder inside of them first."""
    part = root.get_decoder()
    while part is not None and len(_stacks(part)) > 1 and part.get_decoder() is not part:
        part = part.get_decoder()
    return part


def _stacks(part: nn.Module) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Lists of layers that take `hidden_states`, with the module that holds them."""
    return [
        (module, tuple(child.children()))
        for module in part.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList)
        and len(child)
        and len({type(layer) for layer in child}) == 1
        and {"hidden_states", "attention_mask"} <= set(arguments_of(child[0]))
        and not any(isinstance(inner, nn.ModuleList) and child in list(inner.children()) for inner in part.modules())
    ]
