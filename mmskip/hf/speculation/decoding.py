"""Decode by self-speculation: draft on the live cache with parts of the blocks left out, verify all drafts in one pass
of the full model, and roll back by cutting, without copies where rows agree.

Rows accept different numbers of drafts. Every row stays right-aligned in the cache, as in a left-padded batch: rows
that accepted fewer drafts are moved to the right by an index, so that stock masks and windows stay correct.

Shape suffixes: B rows, T tokens of the prompt, S slots of the cache, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from mmskip.hf.calls import CACHE_NAME
from mmskip.hf.speculation import rollback
from mmskip.hf.speculation.rows import Rows
from mmskip.hf.speculation.search_window import SearchWindow, open_window
from mmskip.hf.speculation.tree import DraftTree, alternatives, tree_inputs, tree_mask, walk
from mmskip.ops.speculative import speculative_sample

PLAIN_EVERY = 64
"""One step in this many is taken without drafts, so that the report knows what plain decoding costs."""


@dataclass
class Decoding:
    """One call of `generate`.

    Attributes:
        state: the `GeneratorState` of the model.
        given: what `generate` hands to the model beside the prompt.
        embeddings, mask_name: arguments of the prompt's embeddings, which are not served, and of its mask.
        lockstep: whether all rows accept equally many drafts.
        rows: prompt and generated tokens of each row.
        mask_BS: which slots of the cache hold a token of the row.
    """

    model: Any
    state: Any
    prompt_BT: Tensor
    given: dict[str, Any]
    processors: Any
    criteria: Any
    config: Any
    embeddings: ClassVar[str] = "inputs_embeds"
    mask_name: ClassVar[str] = "attention_mask"
    lockstep: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.speculator = self.state.speculator
        self.rows = Rows(self.prompt_BT, self.config, self.processors, self.criteria)
        mask = self.given.get(self.mask_name)
        mask = torch.ones_like(self.prompt_BT) if mask is None else mask
        self.mask_BS = mask.to(self.prompt_BT.device).long()
        self.cache: Any = self._new_cache()

    def _new_cache(self) -> Any:
        return DynamicCache()

    @torch.no_grad()
    def tokens_of(self) -> Tensor:
        """Decode until every row is done; return prompt and generated tokens [B, N], shorter rows padded."""
        with self.speculator.timed("prefill"):
            last_BV = self._forward(self.prompt_BT, self.mask_BS)[:, -1]
            first = self.rows.choose(self.rows.process(last_BV, [[] for _ in range(len(self.rows))]))[0]
        for row, token in enumerate(first):
            self.rows.emit(row, [token])
        try:
            self._decode()
        finally:
            # it holds keys and values of this call
            self.speculator.window = None
        return self.rows.padded()

    def _decode(self) -> None:
        """Take steps until every row is done."""
        steps = 0
        while not all(self.rows.done):
            steps += 1
            plain = steps % PLAIN_EVERY == PLAIN_EVERY // 2
            trees, drafted = ([DraftTree() for _ in self.rows.done], []) if plain else self._draft()
            before = self.mask_BS.shape[1]
            with self.speculator.timed("plain" if plain else "verify"):
                places = self._verify(trees, drafted)
            self._keep(places, before)
            self._search()

    def result(self, sequences: Tensor) -> Any:
        """Return the sequences in the form the generation config asks for."""
        if not self.config.return_dict_in_generate:
            return sequences
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]

    def _forward(self, ids: Tensor, mask_BS: Any, cache: Any = None, positions: Tensor | None = None) -> Tensor:
        """Compute the logits of new tokens, given the mask of all slots after them, or any mask and their positions."""
        if positions is None:
            positions = (mask_BS.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        cache = self.cache if cache is None else cache
        output = self.model(
            input_ids=ids, attention_mask=mask_BS, position_ids=positions, use_cache=True, **{CACHE_NAME: cache}
        )
        logits: Tensor = output.logits
        return logits.float()

    def _draft(self) -> tuple[list[DraftTree], list[Tensor]]:
        """Draft; return a tree per row, and the distributions [B, V] of each step of the chain."""
        batch, slots = self.mask_BS.shape
        trees: list[DraftTree] = [DraftTree() for _ in range(batch)]
        chains: list[list[int]] = [[] for _ in range(batch)]
        distributions: list[Tensor] = []
        open_rows = [not done for done in self.rows.done]
        speculator, room = self.speculator, self.rows.room
        ids, mask = self.rows.last(), self.mask_BS
        with speculator.timed("draft"), self.state.draft.drafting():
            for _ in range(min(speculator.draft_tokens, room - 1)):
                mask = nn.functional.pad(mask, (0, 1), value=1)
                logits_BV = self.rows.process(self._forward(ids, mask)[:, -1], chains)
                # a tree is compared with what the model draws, so that its own tokens need not be drawn
                tokens, probs_BV = self.rows.choose(logits_BV, likeliest=bool(speculator.branches))
                distributions.append(probs_BV)
                beside = alternatives(tokens, probs_BV, speculator.branches, speculator.branch_above)
                sure = (probs_BV.amax(-1) >= speculator.stop_below).tolist()
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

    def _verify(self, trees: list[DraftTree], distributions: list[Tensor]) -> list[list[int]]:
        """Accept drafts of each row as the full model would have chosen them, and add one token of the model; return
        the places of the pass that each row keeps."""
        logits = self._pass(trees)
        own = logits.argmax(-1).tolist() if not (self.rows.sampling or self.processors) else None
        found: list[tuple[list[int], list[int]]] = []
        for row, tree in enumerate(trees):
            if self.rows.done[row]:
                found.append(([], []))
            elif self.rows.sampling and not self.speculator.branches:
                found.append(self._sample_chain(row, tree.tokens, distributions, logits))
            else:
                found.append(walk(tree, partial(self._own, row, logits, own)))
        if self.lockstep:
            fewest = min(len(kept) for _, kept in found if kept)
            found = [(tokens[:fewest], kept[:fewest]) for tokens, kept in found]
        for row, (tokens, _) in enumerate(found):
            self.rows.emit(row, tokens)
        places = [kept for _, kept in found]
        live = [len(kept) - 1 for kept in places if kept]
        self.speculator.count(sum(tree.length for tree in trees), sum(live), len(live))
        most = list(range(max(live) + 1))
        return [kept or most for kept in places]

    def _pass(self, trees: list[DraftTree]) -> Tensor:
        """Run the full model on the newest token and the drafts of each row; return their logits [B, places, V]."""
        branched = any(tree.length != len(tree.tokens) for tree in trees)
        longest = max(len(tree.tokens) for tree in trees)
        last = self.rows.last()
        ids = last.new_tensor([tree.tokens + [0] * (longest - len(tree.tokens)) for tree in trees])
        ids = torch.cat([last, ids.view(len(trees), longest)], 1)
        before_BS = self.mask_BS
        self.mask_BS = nn.functional.pad(before_BS, (0, longest + 1), value=1)
        if not branched:
            return self._forward(ids, self.mask_BS)[:, -(longest + 1) :]
        sees, positions = tree_inputs(before_BS, trees)
        mask = tree_mask(before_BS, sees, positions, self.state.windows, self.model.dtype)
        return self._forward(ids, mask, positions=positions)[:, -(longest + 1) :]

    def _own(self, row: int, logits: Tensor, own: list[list[int]] | None, place: int, ahead: list[int]) -> int:
        """Choose the full model's token of a row after a place of the pass."""
        if own is not None:
            return own[row][place]
        logits_1V = self.rows.process_row(row, ahead, logits[row : row + 1, place])
        if self.rows.sampling:
            return int(torch.multinomial(logits_1V.softmax(-1), 1))
        return int(logits_1V.argmax())

    def _sample_chain(
        self, row: int, drafts: list[int], distributions: list[Tensor], logits: Tensor
    ) -> tuple[list[int], list[int]]:
        """Sample speculatively along a chain; return the tokens, and the places kept."""
        targets = [
            self.rows.process_row(row, drafts[:i], logits[row : row + 1, i])[0].softmax(-1)
            for i in range(len(drafts) + 1)
        ]
        tokens = speculative_sample(drafts, [q[row] for q in distributions], targets)
        return tokens, list(range(len(tokens)))

    def _cut(self, slots: int) -> None:
        """Drop what the cache holds after `slots`."""
        rollback.cut(self.cache, slots)

    def _keep(self, places: list[list[int]], before: int) -> None:
        """Keep the places of the pass that each row accepted."""
        self.mask_BS = rollback.keep(self.cache, self.mask_BS, places, before)

    def _search(self) -> None:
        """Try one more set of parts to leave out."""
        speculator = self.speculator
        if not speculator.searching:
            speculator.window = None
            return
        if speculator.window is None:
            speculator.window = open_window(self.rows, speculator.window_tokens, self.mask_BS, self.cache)
            if speculator.window is None:
                return
        with speculator.timed("search"):
            speculator.trial(self.state.draft, self._matchness)

    def _matchness(self) -> float:
        """Measure the share of the window's tokens that a draft with the present parts would have chosen."""
        window: SearchWindow = self.speculator.window
        with self.state.draft.drafting():
            return window.matchness(self._forward)
