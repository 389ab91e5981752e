"""Self-speculative decoding of a transformers decoder: drafting on the live cache with parts of the blocks left out,
verifying all drafts in one pass of the whole model, and rolling back by cutting, never by copying, where rows agree.

Rows accept different numbers of drafts. Every row stays right-aligned in the cache, as in a left-padded batch: rows
that accepted fewer are moved to the right by an index, so that stock masks and windows stay true.

Shape suffixes: B rows, T tokens of the prompt, S slots of the cache, V vocabulary, G drafts of a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmskip.families import STATE, Speculator
from mmskip.families.hf_blocks import CACHE_NAME, given_cache
from mmskip.families.hf_plan import DROP, RUN, PartState, PlannedPart, parts_of, returned_values
from mmskip.families.hf_prompt import arguments_of
from mmskip.ops.speculative import matching, speculative_sample
from mmskip.swap import Change, state_of
from mmskip.trace import report_slot, report_visit


@dataclass
class DraftState:
    """What the blocks of a drafting model share.

    Attributes:
        active: whether the forward under way drafts.
        attn, mlp: indices of the blocks whose attention and whose MLP drafts leave out.
    """

    active: bool = False
    attn: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()


@dataclass(frozen=True)
class DraftSite:
    """One block of a drafting model; `parts` are the states of its attention and MLP."""

    index: int
    shared: DraftState
    parts: tuple[PartState | None, PartState | None]


@dataclass(frozen=True)
class GeneratorState:
    """What a module with `generate` needs for decoding by speculation."""

    draft: DraftState
    speculator: Speculator


class DraftBlock(nn.Module):
    """Mixin of a block: in a draft it leaves out its attention, its MLP, or both."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        site: DraftSite = state_of(self, DraftBlock)
        left_out = (site.index in site.shared.attn, site.index in site.shared.mlp)
        if not site.shared.active or not any(left_out):
            return super().forward(*args, **kwargs)
        report_slot(site.index)
        x_BTD = args[0] if args else kwargs["hidden_states"]
        if all(left_out):
            return x_BTD
        report_visit(site.index, x_BTD, not left_out[0], not left_out[1], False, None, None)
        dropped = [part for part, out in zip(site.parts, left_out, strict=True) if out and part is not None]
        for part in dropped:
            part.mode = DROP
        try:
            return super().forward(*args, **kwargs)
        finally:
            for part in dropped:
                part.mode = RUN


class SpeculativeGenerator(nn.Module):
    """Mixin of a module with `generate`: decodes by speculation, with the same results."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        state: GeneratorState = state_of(self, SpeculativeGenerator)
        generate: Any = super().generate  # type: ignore[misc]
        call = arguments_of(generate, args, kwargs)
        for name in ("streamer", "assistant_model", "custom_generate", "inputs_embeds", "negative_prompt_ids"):
            if call.get(name) is not None:
                raise ValueError(f"{name} is given, which self-speculation does not serve; leave it out.")

        def decode(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Any:
            _check_call(generation_config, model_kwargs)
            mask = model_kwargs.get("attention_mask")
            run = Decoding(model, state, input_ids, mask, logits_processor, stopping_criteria, generation_config)
            return run.result(run.tokens_of())

        return generate(*args, **kwargs, custom_generate=decode)


def _check_call(config: Any, model_kwargs: dict[str, Any]) -> None:
    """Raise ValueError for settings of `generate` that this decoding does not serve."""
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is set; self-speculation returns sequences only. Leave it out.")
    if (config.num_beams or 1) != 1 or config.prompt_lookup_num_tokens or config.use_cache is False:
        raise ValueError(
            "self-speculation decodes greedily or by sampling with a cache; num_beams must be 1, use_cache True, and "
            "prompt_lookup_num_tokens unset."
        )
    cache = given_cache(model_kwargs)
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading or cache.get_seq_length() > 0):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} with {int(cache.get_seq_length())} tokens; self-speculation "
            "rolls back an empty DynamicCache of its own. In generate, leave past_key_values and cache_implementation "
            "out."
        )


@dataclass
class Window:
    """Tokens that layer sets are compared on: the cache before them (views, no copies), and what followed each."""

    layers: list[tuple[Tensor, Tensor]]
    ids_BW: Tensor
    targets_BW: Tensor
    mask_BS: Tensor
    positions_BW: Tensor
    rows: list[int]


@dataclass
class Decoding:
    """One call of `generate`.

    Attributes:
        tokens_BN: prompt and generated tokens of each row.
        counts: generated tokens of each row.
        mask_BS: which slots of the cache hold a token of the row.
    """

    model: Any
    state: GeneratorState
    prompt_BT: Tensor
    attention_mask: Tensor | None
    processors: Any
    criteria: Any
    config: Any

    def __post_init__(self) -> None:
        batch, length = self.prompt_BT.shape
        self.speculator = self.state.speculator
        self.sampling = bool(self.config.do_sample)
        self.tokens_BN = nn.functional.pad(self.prompt_BT, (0, self.config.max_length - length))
        self.counts, self.done = [0] * batch, [False] * batch
        mask = torch.ones_like(self.prompt_BT) if self.attention_mask is None else self.attention_mask
        self.mask_BS = mask.to(self.prompt_BT.device).long()
        self.cache: Any = DynamicCache()

    @torch.no_grad()
    def tokens_of(self) -> Tensor:
        """Decode until every row is done: prompt and generated tokens [B, N], shorter rows padded."""
        batch, length = self.prompt_BT.shape
        with self.speculator.timed("prefill"):
            last_BV = self._forward(self.prompt_BT, self.mask_BS)[:, -1]
            first = self._choose(self._process(last_BV, [[] for _ in range(batch)]))[0]
        for row, token in enumerate(first):
            self._emit(row, [token])
        while not all(self.done):
            drafts, drafted = self._draft()
            before = self.mask_BS.shape[1]
            accepted = self._verify(drafts, drafted)
            self._align(accepted, before + max(accepted) + 1)
            self._search()
        self.speculator.window = None
        pad = self.config._pad_token_tensor
        columns = torch.arange(length + max(self.counts), device=self.prompt_BT.device)
        ends_B1 = torch.tensor(self.counts, device=columns.device)[:, None] + length
        found = self.tokens_BN[:, : len(columns)]
        return found if pad is None else torch.where(columns[None] < ends_B1, found, pad.to(found.device))

    def result(self, sequences: Tensor) -> Any:
        """The sequences in the form the generation config asks for."""
        if not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    def _forward(self, ids: Tensor, mask_BS: Tensor, cache: Any = None) -> Tensor:
        """Logits of new tokens, given the mask of all slots after them."""
        positions = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        cache = self.cache if cache is None else cache
        output = self.model(
            input_ids=ids, attention_mask=mask_BS, position_ids=positions, use_cache=True, **{CACHE_NAME: cache}
        )
        logits: Tensor = output.logits
        return logits.float()

    def _process(self, logits_BV: Tensor, ahead: Sequence[Sequence[int]]) -> Tensor:
        """Logits after the processors of `generate`, which see each row's own tokens and the drafts ahead of them."""
        if not self.processors:
            return logits_BV
        length, rows = self.prompt_BT.shape[1], []
        for row, drafts in enumerate(ahead):
            own = self.tokens_BN[row : row + 1, : length + self.counts[row]]
            ids = torch.cat([own, own.new_tensor([list(drafts)])], 1) if drafts else own
            rows.append(self.processors(ids, logits_BV[row : row + 1]))
        return torch.cat(rows)

    def _choose(self, logits_BV: Tensor) -> tuple[list[int], Tensor]:
        """A token per row, and the distribution it came from."""
        probs_BV = logits_BV.softmax(-1)
        if self.sampling:
            return torch.multinomial(probs_BV, 1)[:, 0].tolist(), probs_BV
        return logits_BV.argmax(-1).tolist(), probs_BV

    def _emit(self, row: int, tokens: Sequence[int]) -> None:
        """Add tokens to a row until it is done."""
        length = self.prompt_BT.shape[1]
        for token in tokens:
            if self.done[row]:
                return
            end = length + self.counts[row] + 1
            self.tokens_BN[row, end - 1] = token
            self.counts[row] += 1
            self.done[row] = bool(self.criteria(self.tokens_BN[row : row + 1, :end], None).any())

    def _last(self) -> Tensor:
        """The newest token of each row, which the cache does not hold yet, [B, 1]."""
        ends = torch.tensor(self.counts, device=self.prompt_BT.device) + self.prompt_BT.shape[1] - 1
        return self.tokens_BN.gather(1, ends[:, None])

    def _draft(self) -> tuple[list[list[int]], list[Tensor]]:
        """Draft tokens per row, and the distributions [B, V] of each step."""
        batch, slots = self.mask_BS.shape
        drafts: list[list[int]] = [[] for _ in range(batch)]
        distributions: list[Tensor] = []
        open_rows = [not done for done in self.done]
        room = (
            self.tokens_BN.shape[1]
            - self.prompt_BT.shape[1]
            - min(count for count, done in zip(self.counts, self.done, strict=True) if not done)
        )
        ids, mask = self._last(), self.mask_BS
        with self.speculator.timed("draft"), _drafting(self.state.draft):
            for _ in range(min(self.speculator.draft_tokens, room - 1)):
                mask = nn.functional.pad(mask, (0, 1), value=1)
                logits_BV = self._process(self._forward(ids, mask)[:, -1], drafts)
                tokens, probs_BV = self._choose(logits_BV)
                distributions.append(probs_BV)
                sure = (probs_BV.amax(-1) >= self.speculator.stop_below).tolist()
                for row in range(batch):
                    if open_rows[row]:
                        drafts[row].append(tokens[row])
                        open_rows[row] = sure[row]
                if not any(open_rows):
                    break
                ids = ids.new_tensor(tokens)[:, None]
        for layer in self.cache.layers:
            if layer.is_initialized and layer.keys.shape[-2] > slots:
                layer.keys, layer.values = layer.keys[..., :slots, :], layer.values[..., :slots, :]
        return drafts, distributions

    def _verify(self, drafts: list[list[int]], distributions: list[Tensor]) -> list[int]:
        """Accept drafts of each row as the whole model would have chosen them, add one token of its own; returns how
        many were accepted."""
        longest = max(len(row) for row in drafts)
        padded = [row + [0] * (longest - len(row)) for row in drafts]
        last = self._last()
        ids = torch.cat([last, last.new_tensor(padded).view(len(drafts), longest)], 1)
        mask = nn.functional.pad(self.mask_BS, (0, longest + 1), value=1)
        with self.speculator.timed("verify"):
            logits = self._forward(ids, mask)[:, -(longest + 1) :]
            steps = [self._process(logits[:, i], [row[:i] for row in drafts]) for i in range(longest + 1)]
            chosen = None if self.sampling else torch.stack([step.argmax(-1) for step in steps], 1).tolist()
        accepted = []
        for row, own in enumerate(drafts):
            if self.done[row]:
                accepted.append(-1)
            elif chosen is not None:
                count = matching(own, chosen[row])
                accepted.append(count)
                self._emit(row, [*own[:count], chosen[row][count]])
            else:
                targets = [step[row].softmax(-1) for step in steps]
                tokens = speculative_sample(own, [q[row] for q in distributions], targets)
                accepted.append(len(tokens) - 1)
                self._emit(row, tokens)
        live = [count for count in accepted if count >= 0]
        self.speculator.count(sum(map(len, drafts)), sum(live), len(live))
        self.mask_BS = mask
        return [max(live) if count < 0 else count for count in accepted]

    def _align(self, accepted: list[int], slots: int) -> None:
        """Cut the cache after `slots`, and move rows that accepted less to the right."""
        most = max(accepted)
        self.mask_BS = self.mask_BS[:, :slots]
        index_BS = None
        if any(count != most for count in accepted):
            shift_B = torch.tensor([most - count for count in accepted], device=self.mask_BS.device)
            from_BS = torch.arange(slots, device=self.mask_BS.device)[None] - shift_B[:, None]
            index_BS = from_BS.clamp(min=0)
            self.mask_BS = self.mask_BS.gather(1, index_BS) * (from_BS >= 0)
        empty = int(self.mask_BS.amax(0).argmax())
        self.mask_BS = self.mask_BS[:, empty:]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                stored = getattr(layer, name)[..., :slots, :]
                if index_BS is not None:
                    stored = stored.gather(
                        2, index_BS[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
                    )
                setattr(layer, name, stored[..., empty:, :])

    def _search(self) -> None:
        """Try one more set of parts to leave out."""
        speculator, width = self.speculator, self.speculator.window_tokens
        if not speculator.searching:
            speculator.window = None
            return
        if speculator.window is None:
            rows = [row for row, done in enumerate(self.done) if not done and self.counts[row] > width]
            if len(rows) < self.done.count(False) or not rows:
                return
            speculator.window = self._open_window(width, rows)
        with speculator.timed("search"):
            speculator.trial(self.state.draft, self._matchness)

    def _open_window(self, width: int, rows: list[int]) -> Window:
        slots = self.mask_BS.shape[1]
        ends = torch.tensor(self.counts, device=self.prompt_BT.device) + self.prompt_BT.shape[1]
        index_BW = ends[:, None] - width - 1 + torch.arange(width + 1, device=ends.device)[None]
        ids = self.tokens_BN.gather(1, index_BW.clamp(min=0))
        layers = [(e.keys[..., : slots - width, :], e.values[..., : slots - width, :]) for e in self.cache.layers]
        return Window(layers, ids[:, :-1], ids[:, 1:], self.mask_BS, ids, rows)

    def _matchness(self) -> float:
        """Share of the window's tokens that a draft with the present parts would have chosen."""
        window: Window = self.speculator.window
        cache = DynamicCache()
        for keys, values in window.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        with _drafting(self.state.draft):
            logits = self._forward(window.ids_BW, window.mask_BS, cache)
        same_BW = logits[:, -window.ids_BW.shape[1] :].argmax(-1) == window.targets_BW
        return float(same_BW[window.rows].float().mean())


@contextmanager
def _drafting(draft: DraftState) -> Iterator[None]:
    draft.active = True
    try:
        yield
    finally:
        draft.active = False


def draft_units(view: Any) -> list[tuple[int | None, int | None]]:
    """What a draft may leave out: attention and MLP of every block but the first and the last, as indices (attention,
    MLP); both at once where a block has no module for its MLP."""
    units: list[tuple[int | None, int | None]] = []
    for index in range(1, len(view.blocks) - 1):
        _, mlp = parts_of(view.blocks[index])
        units += [(index, None), (None, index)] if mlp is not None else [(index, index)]
    return units


def speculation_changes(view: Any, speculator: Speculator) -> list[Change]:
    """The changes by which a decoder drafts with parts of its blocks left out, and `generate` decodes by speculation.

    Raises:
        ValueError: the decoder cannot roll back, or has no blocks to leave out.
    """
    name = type(view.root).__name__
    if STATE in view.kinds:
        raise ValueError(
            f"{name} has blocks that carry a state from token to token, which drafts could not be rolled back from."
        )
    if len(view.blocks) < 3 or not view.generators:
        raise ValueError(
            f"{name} has {len(view.blocks)} blocks and {len(view.generators)} modules with `generate`; "
            "self-speculation needs at least three blocks (the first and last always run), in a model that generates."
        )
    draft = DraftState()
    speculator.start(draft)
    changes = []
    for index in range(1, len(view.blocks) - 1):
        block, site = view.blocks[index], view.site(index)
        states: list[PartState | None] = []
        for part, label in zip(parts_of(block), ("attn", "mlp"), strict=True):
            states.append(None if part is None else PartState(index, returned_values(part)))
            if part is not None:
                changes.append(Change(f"{site}.{label}", part, PlannedPart, states[-1]))
        changes.append(Change(site, block, DraftBlock, DraftSite(index, draft, (states[0], states[1]))))
    state = GeneratorState(draft, speculator)
    return changes + [Change("generate", module, SpeculativeGenerator, state) for module in view.generators]
