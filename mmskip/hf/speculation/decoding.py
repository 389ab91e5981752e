"""Self-speculative decoding of a transformers decoder: drafting on the live cache with parts of the blocks left out,
verifying all drafts in one pass of the whole model, and rolling back by cutting, never by copying, where rows agree.

Rows accept different numbers of drafts. Every row stays right-aligned in the cache, as in a left-padded batch: rows
that accepted fewer are moved to the right by an index, so that stock masks and windows stay true.

Shape suffixes: B rows, T tokens of the prompt, S slots of the cache, V vocabulary, G drafts of a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from mmskip.hf.calls import CACHE_NAME, generate_arguments, given_cache
from mmskip.hf.plans.block import DROP, RUN, PartState, PlannedPart
from mmskip.hf.speculation.tree import DraftTree, alternatives, kept_slots, tree_inputs, tree_mask, walk
from mmskip.hf.structure import parts_of, returned_values
from mmskip.ops.speculative import speculative_sample
from mmskip.protocols import STATE, Speculator
from mmskip.swap import Change, state_of
from mmskip.tracing import report_slot, report_visit

PLAIN_EVERY = 64
"""Of so many steps one is taken without drafts, so that the report knows what plain decoding costs."""
TREE_BACKENDS = ("sdpa", "eager")


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
    """What a module with `generate` needs for decoding by speculation; `windows` as of the family view; `decoding`: a
    kind of `Decoding`, None: that itself."""

    draft: DraftState
    speculator: Speculator
    windows: tuple[int | None, ...] = (None,)
    decoding: Any = None


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
        call = generate_arguments(generate, args, kwargs)
        decoding: type[Decoding] = state.decoding or Decoding
        for name in ("streamer", "assistant_model", "custom_generate", "negative_prompt_ids", decoding.embeddings):
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
            _check_call(generation_config, given_cache(model_kwargs))
            backend = model.config._attn_implementation
            if state.speculator.branches and backend not in TREE_BACKENDS:
                raise ValueError(
                    f"branches is {state.speculator.branches} with attn_implementation={backend!r}; draft trees need a "
                    f"mask of their own, which {' and '.join(TREE_BACKENDS)} take. Choose one of these, or branches=0."
                )
            processors, criteria = logits_processor, stopping_criteria
            run = decoding(model, state, input_ids, model_kwargs, processors, criteria, generation_config)
            return run.result(run.tokens_of())

        return generate(*args, **kwargs, custom_generate=decode)


def _check_call(config: Any, cache: Any) -> None:
    """Raise ValueError for settings of `generate` that this decoding does not serve."""
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is set; self-speculation returns sequences only. Leave it out.")
    if (config.num_beams or 1) != 1 or config.prompt_lookup_num_tokens or config.use_cache is False:
        raise ValueError(
            "self-speculation decodes greedily or by sampling with a cache; num_beams must be 1, use_cache True, and "
            "prompt_lookup_num_tokens unset."
        )
    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache) if type(cache) is EncoderDecoderCache else (cache,)
    )
    if cache is not None and any(type(p) is not DynamicCache or p.offloading or p.get_seq_length() > 0 for p in parts):
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
        given: what `generate` hands to the model beside the prompt.
        embeddings, mask_name: arguments of the prompt's embeddings, which are not served, and of its mask.
        lockstep: whether rows accept equally many drafts.
        tokens_BN: prompt and generated tokens of each row.
        counts: generated tokens of each row.
        mask_BS: which slots of the cache hold a token of the row.
    """

    model: Any
    state: GeneratorState
    prompt_BT: Tensor
    given: dict[str, Any]
    processors: Any
    criteria: Any
    config: Any
    embeddings: ClassVar[str] = "inputs_embeds"
    mask_name: ClassVar[str] = "attention_mask"
    lockstep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        batch, length = self.prompt_BT.shape
        self.speculator = self.state.speculator
        self.sampling = bool(self.config.do_sample)
        self.tokens_BN = nn.functional.pad(self.prompt_BT, (0, self.config.max_length - length))
        self.counts, self.done = [0] * batch, [False] * batch
        mask = self.given.get(self.mask_name)
        mask = torch.ones_like(self.prompt_BT) if mask is None else mask
        self.mask_BS = mask.to(self.prompt_BT.device).long()
        self.cache: Any = self._new_cache()

    def _new_cache(self) -> Any:
        return DynamicCache()

    @torch.no_grad()
    def tokens_of(self) -> Tensor:
        """Decode until every row is done: prompt and generated tokens [B, N], shorter rows padded."""
        batch, length = self.prompt_BT.shape
        with self.speculator.timed("prefill"):
            last_BV = self._forward(self.prompt_BT, self.mask_BS)[:, -1]
            first = self._choose(self._process(last_BV, [[] for _ in range(batch)]))[0]
        for row, token in enumerate(first):
            self._emit(row, [token])
        try:
            self._decode()
        finally:
            # it holds keys and values of this call
            self.speculator.window = None
        pad = self.config._pad_token_tensor
        columns = torch.arange(length + max(self.counts), device=self.prompt_BT.device)
        ends_B1 = torch.tensor(self.counts, device=columns.device)[:, None] + length
        found = self.tokens_BN[:, : len(columns)]
        return found if pad is None else torch.where(columns[None] < ends_B1, found, pad.to(found.device))

    def _decode(self) -> None:
        """Take steps until every row is done."""
        steps = 0
        while not all(self.done):
            steps += 1
            plain = steps % PLAIN_EVERY == PLAIN_EVERY // 2
            trees, drafted = ([DraftTree() for _ in self.done], []) if plain else self._draft()
            before = self.mask_BS.shape[1]
            with self.speculator.timed("plain" if plain else "verify"):
                places = self._verify(trees, drafted)
            self._keep(places, before)
            self._search()

    def result(self, sequences: Tensor) -> Any:
        """The sequences in the form the generation config asks for."""
        if not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    def _forward(self, ids: Tensor, mask_BS: Any, cache: Any = None, positions: Tensor | None = None) -> Tensor:
        """Logits of new tokens, given the mask of all slots after them, or any mask with their positions."""
        if positions is None:
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
        return torch.cat([self._process_row(row, drafts, logits_BV[row : row + 1]) for row, drafts in enumerate(ahead)])

    def _process_row(self, row: int, drafts: Sequence[int], logits_1V: Tensor) -> Tensor:
        if not self.processors:
            return logits_1V
        own = self.tokens_BN[row : row + 1, : self.prompt_BT.shape[1] + self.counts[row]]
        ids = torch.cat([own, own.new_tensor([list(drafts)])], 1) if drafts else own
        found: Tensor = self.processors(ids, logits_1V)
        return found

    def _choose(self, logits_BV: Tensor, likeliest: bool = False) -> tuple[list[int], Tensor]:
        """A token per row, and the distribution it came from."""
        probs_BV = logits_BV.softmax(-1)
        if self.sampling and not likeliest:
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

    def _draft(self) -> tuple[list[DraftTree], list[Tensor]]:
        """Drafts per row, and the distributions [B, V] of each step of the chain."""
        batch, slots = self.mask_BS.shape
        trees: list[DraftTree] = [DraftTree() for _ in range(batch)]
        chains: list[list[int]] = [[] for _ in range(batch)]
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
                logits_BV = self._process(self._forward(ids, mask)[:, -1], chains)
                # a tree is compared with what the model draws, so that its own tokens need not be drawn
                tokens, probs_BV = self._choose(logits_BV, likeliest=bool(self.speculator.branches))
                distributions.append(probs_BV)
                beside = alternatives(tokens, probs_BV, self.speculator.branches, self.speculator.branch_above)
                sure = (probs_BV.amax(-1) >= self.speculator.stop_below).tolist()
                for row in range(batch):
                    if open_rows[row]:
                        trees[row].add(tokens[row], beside[row])
                        chains[row].append(tokens[row])
                        open_rows[row] = sure[row]
                if not any(open_rows):
                    break
                ids = ids.new_tensor(tokens)[:, None]
        self._cut(slots)
        return trees, distributions

    def _cut(self, slots: int) -> None:
        """Forget what the cache holds behind `slots`."""
        for layer in self.cache.layers:
            if layer.is_initialized and layer.keys.shape[-2] > slots:
                layer.keys, layer.values = layer.keys[..., :slots, :], layer.values[..., :slots, :]

    def _verify(self, trees: list[DraftTree], distributions: list[Tensor]) -> list[list[int]]:
        """Accept drafts of each row as the whole model would have chosen them, add one token of its own; returns the
        places of the pass that each row keeps."""
        branched = any(tree.length != len(tree.tokens) for tree in trees)
        longest = max(len(tree.tokens) for tree in trees)
        last = self._last()
        ids = last.new_tensor([tree.tokens + [0] * (longest - len(tree.tokens)) for tree in trees])
        ids = torch.cat([last, ids.view(len(trees), longest)], 1)
        before_BS = self.mask_BS
        self.mask_BS = nn.functional.pad(before_BS, (0, longest + 1), value=1)
        if branched:
            sees, positions = tree_inputs(before_BS, trees)
            mask = tree_mask(before_BS, sees, positions, self.state.windows, self.model.dtype)
            logits = self._forward(ids, mask, positions=positions)[:, -(longest + 1) :]
        else:
            logits = self._forward(ids, self.mask_BS)[:, -(longest + 1) :]
        own = logits.argmax(-1).tolist() if not (self.sampling or self.processors) else None
        found: list[tuple[list[int], list[int]]] = []
        for row, tree in enumerate(trees):
            if self.done[row]:
                found.append(([], []))
            elif self.sampling and not self.speculator.branches:
                found.append(self._sample_chain(row, tree.tokens, distributions, logits))
            else:
                found.append(walk(tree, partial(self._own, row, logits, own)))
        if self.lockstep:
            fewest = min(len(kept) for _, kept in found if kept)
            found = [(tokens[:fewest], kept[:fewest]) for tokens, kept in found]
        for row, (tokens, _) in enumerate(found):
            self._emit(row, tokens)
        places = [kept for _, kept in found]
        live = [len(kept) - 1 for kept in places if kept]
        self.speculator.count(sum(tree.length for tree in trees), sum(live), len(live))
        most = list(range(max(live) + 1))
        return [kept or most for kept in places]

    def _own(self, row: int, logits: Tensor, own: list[list[int]] | None, place: int, ahead: list[int]) -> int:
        """The model's own token of a row after a place of the pass."""
        if own is not None:
            return own[row][place]
        logits_1V = self._process_row(row, ahead, logits[row : row + 1, place])
        return int(torch.multinomial(logits_1V.softmax(-1), 1)) if self.sampling else int(logits_1V.argmax())

    def _sample_chain(
        self, row: int, drafts: list[int], distributions: list[Tensor], logits: Tensor
    ) -> tuple[list[int], list[int]]:
        """Speculative sampling along a chain; the tokens, and the places kept."""
        targets = [
            self._process_row(row, drafts[:i], logits[row : row + 1, i])[0].softmax(-1) for i in range(len(drafts) + 1)
        ]
        tokens = speculative_sample(drafts, [q[row] for q in distributions], targets)
        return tokens, list(range(len(tokens)))

    def _keep(self, places: list[list[int]], before: int) -> None:
        """Keep, of the slots after a pass, those of each row's places, right-aligned; drop slots empty in all rows."""
        most = max(map(len, places))
        slots = before + most
        # what moves: nothing for equal chains, the new slots alone where all rows keep as many
        chains = all(row == list(range(most)) for row in places)
        first = before if all(len(row) == most for row in places) else 0
        from_BS = None if chains else kept_slots(places, before)[:, first:].to(self.mask_BS.device)
        if from_BS is not None:
            index_BS = from_BS.clamp(min=0)
            moved = self.mask_BS.gather(1, index_BS) * (from_BS >= 0)
            self.mask_BS = torch.cat([self.mask_BS[:, :first], moved], 1)
        self.mask_BS = self.mask_BS[:, :slots]
        empty = int(self.mask_BS.amax(0).argmax())
        self.mask_BS = self.mask_BS[:, empty:]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                stored = getattr(layer, name)
                if from_BS is not None:
                    index = index_BS[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
                    moved = stored.gather(2, index)
                    if first:
                        # into slots of this pass, which nothing else looks at
                        stored[..., first:slots, :] = moved
                    else:
                        stored = moved
                setattr(layer, name, stored[..., empty:slots, :])

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
    for index in range(1, len(view.blocks) - (not speculator.exits)):
        block, site = view.blocks[index], view.site(index)
        states: list[PartState | None] = []
        for part, label in zip(parts_of(block), ("attn", "mlp"), strict=True):
            states.append(None if part is None else PartState(index, returned_values(part)))
            if part is not None:
                changes.append(Change(f"{site}.{label}", part, PlannedPart, states[-1]))
        changes.append(Change(site, block, DraftBlock, DraftSite(index, draft, (states[0], states[1]))))
    state = GeneratorState(draft, speculator, tuple(view.windows))
    return changes + [Change("generate", module, SpeculativeGenerator, state) for module in view.generators]
