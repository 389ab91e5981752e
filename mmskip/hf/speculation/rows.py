"""The tokens of each row of a batch that is decoded by speculation: chosen, processed, appended.

Shape suffixes: B rows, T tokens of the prompt, N tokens at most, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Rows:
    """Prompt and generated tokens of each row.

    Args:
        prompt_BT: ids.
        config: the generation config.
        processors, criteria: logits processors and stopping criteria of `generate`.

    Attributes:
        tokens_BN: prompt and generated tokens.
        counts: generated tokens of each row.
        done: rows that have ended.
    """

    def __init__(self, prompt_BT: Tensor, config: Any, processors: Any, criteria: Any) -> None:
        batch, self.length = prompt_BT.shape
        self.config, self.processors, self.criteria = config, processors, criteria
        self.sampling = bool(config.do_sample)
        self.tokens_BN = nn.functional.pad(prompt_BT, (0, config.max_length - self.length))
        self.counts, self.done = [0] * batch, [False] * batch

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def room(self) -> int:
        """Tokens that the longest-running row may still get."""
        fewest = min(count for count, done in zip(self.counts, self.done, strict=True) if not done)
        return self.tokens_BN.shape[1] - self.length - fewest

    def ends(self) -> Tensor:
        """Return the number of tokens of each row, LongTensor [B]."""
        return torch.tensor(self.counts, device=self.tokens_BN.device) + self.length

    def last(self) -> Tensor:
        """Return the newest token of each row, which the cache does not hold yet, [B, 1]."""
        return self.tokens_BN.gather(1, self.ends()[:, None] - 1)

    def process(self, logits_BV: Tensor, ahead: Sequence[Sequence[int]]) -> Tensor:
        """Apply the logits processors, which see each row's tokens and the drafts ahead of them."""
        if not self.processors:
            return logits_BV
        return torch.cat([self.process_row(row, drafts, logits_BV[row : row + 1]) for row, drafts in enumerate(ahead)])

    def process_row(self, row: int, drafts: Sequence[int], logits_1V: Tensor) -> Tensor:
        """Apply the logits processors to one row."""
        if not self.processors:
            return logits_1V
        own = self.tokens_BN[row : row + 1, : self.length + self.counts[row]]
        ids = torch.cat([own, own.new_tensor([list(drafts)])], 1) if drafts else own
        found: Tensor = self.processors(ids, logits_1V)
        return found

    def choose(self, logits_BV: Tensor, likeliest: bool = False) -> tuple[list[int], Tensor]:
        """Choose a token per row; return them and the distributions [B, V] they come from."""
        probs_BV = logits_BV.softmax(-1)
        if self.sampling and not likeliest:
            return torch.multinomial(probs_BV, 1)[:, 0].tolist(), probs_BV
        return logits_BV.argmax(-1).tolist(), probs_BV

    def emit(self, row: int, tokens: Sequence[int]) -> None:
        """Append tokens to a row until it is done."""
        for token in tokens:
            if self.done[row]:
                return
            end = self.length + self.counts[row] + 1
            self.tokens_BN[row, end - 1] = token
            self.counts[row] += 1
            self.done[row] = bool(self.criteria(self.tokens_BN[row : row + 1, :end], None).any())

    def padded(self) -> Tensor:
        """Return prompt and generated tokens, shorter rows padded as `generate` pads them."""
        pad = self.config._pad_token_tensor
        columns = torch.arange(self.length + max(self.counts), device=self.tokens_BN.device)
        found = self.tokens_BN[:, : len(columns)]
        return found if pad is None else torch.where(columns[None] < self.ends()[:, None], found, pad.to(found.device))
