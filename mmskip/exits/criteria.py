"""Where to stop: exit criteria and exit heads, shared by every method that exits early.

A *score* says how settled a hidden state is after a layer; a state exits where its score is above a threshold. Scores
are computed in fp32 per token, or per sample over its real tokens, so that no sample sees another one or padding.

| criterion | score | range |
|---|---|---|
| `saturation` | cosine between the states before and after the layer (MuE, CALM) | [-1, 1] |
| `confidence` | largest probability of the exit head | [0, 1] |
| `margin` | largest minus second largest probability | [0, 1] |
| `entropy` | 1 - entropy / log V of the exit head | [0, 1] |
| `patience` | consecutive layers whose exit heads agree on the token, this one included, minus 1 (PABEE) | 0, 1, ... |
| `learned` | probability, by a separate head of the exit, that stopping there is right | [0, 1] |
| `state_norm` | 1 - growth of the state's norm / spread of its growths by earlier layers (LAC: above 0.2) | any |

Shape suffixes: B batch, T tokens, D width, V classes.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmskip.exits.heads import ExitHead
from mmskip.exits.voids import growth_spread

STATE_CRITERIA = ("saturation", "state_norm")


HEAD_CRITERIA = ("confidence", "margin", "entropy", "patience")


LEARNED = "learned"


CRITERIA = (*STATE_CRITERIA, *HEAD_CRITERIA, LEARNED)


SAMPLE_CRITERIA = (*STATE_CRITERIA, LEARNED)


_RANGES = {"saturation": (-1.0, 1.0), "patience": (0.0, math.inf), "state_norm": (-math.inf, math.inf)}


def check_threshold(name: str, criterion: str, value: float) -> None:
    """Raise ValueError unless a threshold lies in the criterion's range, whose upper end never fires."""
    low, high = _RANGES.get(criterion, (0.0, 1.0))
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected a number in [{low:g}, {high:g}] for criterion {criterion!r}.")


def never_fires(criterion: str, threshold: float) -> bool:
    """Return whether no score is above a threshold: it is the upper end of the criterion's range."""
    return threshold == _RANGES.get(criterion, (0.0, 1.0))[1]


def saturation(after_BTD: Tensor, before_BTD: Tensor) -> Tensor:
    """Cosine of each token's state with the one before the layer, [B, T]; rounding never takes it above 1."""
    return F.cosine_similarity(after_BTD.float(), before_BTD.float(), dim=-1).clamp(max=1.0)


class Saturation:
    """MuE's sign that a layer adds nothing: the cosine of the states before and after it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, float] | None = None

    def __call__(self, after_BTD: Tensor, before_BTD: Tensor) -> Tensor:
        """Of each token, [B, T]."""
        return saturation(after_BTD, before_BTD)

    def samples(self, after_BTD: Tensor, before_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
        """Of each sample's tokens taken as one vector, [B]."""
        norms_B = _inner(after_BTD, after_BTD, real_BT).sqrt() * _inner(before_BTD, before_BTD, real_BT).sqrt()
        return (_inner(after_BTD, before_BTD, real_BT) / norms_B.clamp(min=1e-8)).clamp(max=1.0)

    def single(self, after: Tensor, before: Tensor) -> float:
        """Of all values of two tensors taken as one vector each, in a few operations: what a step of one sample waits
        for."""
        after_N, before_N = after.reshape(-1).float(), before.reshape(-1).float()
        known = self._last is not None and self._last[0] is before
        before_square = self._last[1] if known and self._last else torch.dot(before_N, before_N).item()
        after_square = torch.dot(after_N, after_N).item()
        self._last = after, after_square
        return min(torch.dot(after_N, before_N).item() / max(math.sqrt(after_square * before_square), 1e-8), 1.0)


class StateNorm:
    """LAC's sign that a layer adds nothing: the norm grows by less than a share of the spread (largest minus smallest)
    of its growths at earlier layers (arXiv 2505.14467). A score above 1 - alpha is a void of `lac_voids`.

    -inf at the first layer. Where all earlier growths are equal (at the second layer, for one) the threshold is 0, as
    published: inf for a norm that shrinks, else -inf.
    """

    def __init__(self) -> None:
        self._range: tuple[Tensor, Tensor] | None = None

    def __call__(self, after_BTD: Tensor, before_BTD: Tensor) -> Tensor:
        """1 - growth / spread of each token, [B, T]."""
        return self._of(after_BTD.float().norm(dim=-1) - before_BTD.float().norm(dim=-1))

    def samples(self, after_BTD: Tensor, before_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
        """The same of each sample's tokens taken as one vector, [B]."""
        return self._of(_inner(after_BTD, after_BTD, real_BT).sqrt() - _inner(before_BTD, before_BTD, real_BT).sqrt())

    def single(self, after: Tensor, before: Tensor) -> float:
        """The same of all values of two tensors taken as one vector each."""
        return float(self(after.reshape(1, 1, -1), before.reshape(1, 1, -1)))

    def _of(self, growth: Tensor) -> Tensor:
        spread, self._range = growth_spread(growth, self._range)
        never = torch.full_like(growth, -math.inf)
        if spread is None:
            return never
        return torch.where(spread > 0, 1 - growth / spread, torch.where(growth < 0, math.inf, never))


def _inner(a_BTD: Tensor, b_BTD: Tensor, real_BT: Tensor | None) -> Tensor:
    """Inner products [B] of samples, padding left out."""
    products_BT = torch.linalg.vecdot(a_BTD.float(), b_BTD.float())
    return (products_BT if real_BT is None else products_BT.masked_fill(~real_BT, 0.0)).sum(-1)


def is_single(x: Tensor, states: int) -> bool:
    """Whether the host may ask for one score instead of a tensor of them: one state, which no device has to be waited
    for."""
    return states == 1 and x.device.type == "cpu"


def confidence(logits_BTV: Tensor) -> Tensor:
    """Largest probability, [B, T]."""
    return logits_BTV.float().softmax(-1).amax(-1)


def margin(logits_BTV: Tensor) -> Tensor:
    """Largest minus second largest probability, [B, T]."""
    top = logits_BTV.float().softmax(-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def entropy(logits_BTV: Tensor) -> Tensor:
    """1 - entropy / log V, [B, T]."""
    log_p = logits_BTV.float().log_softmax(-1)
    return 1 + torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1) / math.log(logits_BTV.shape[-1])


def patience(choice_BT: Tensor, earlier_BT: Tensor | None, streak_BT: Tensor | None) -> Tensor:
    """How many exit heads in a row agree with this one, [B, T] float.

    Args:
        choice_BT: the token that this exit's head would say.
        earlier_BT, streak_BT: choice and result at the exit before; None: this is the first one.
    """
    if earlier_BT is None or streak_BT is None:
        return torch.zeros_like(choice_BT, dtype=torch.float32)
    return torch.where(choice_BT == earlier_BT, streak_BT + 1, 0.0)


_HEAD_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
}


def _state_score(criterion: str) -> StateNorm | Saturation:
    return StateNorm() if criterion == "state_norm" else Saturation()


class TokenScores:
    """Scores of one forward, layer by layer.

    Args:
        criterion: one of `CRITERIA`.
        head: turns states [B, T, D] into logits [B, T, V]; only read by the criteria in `HEAD_CRITERIA`.
        heads: for `learned`, the head of each layer that this will be called for, in order.
    """

    def __init__(
        self, criterion: str, head: Callable[[Tensor], Tensor] | None = None, heads: Sequence["ExitHead"] = ()
    ) -> None:
        if criterion in HEAD_CRITERIA and head is None:
            raise ValueError(f"criterion {criterion!r} reads the logits of an exit head, and there is no head.")
        self.criterion, self.head, self._heads = criterion, head, iter(heads)
        self._state = _state_score(criterion) if criterion in STATE_CRITERIA else None
        self._choice: Tensor | None = None
        self._streak: Tensor | None = None

    def __call__(self, after_BTD: Tensor, before_BTD: Tensor) -> Tensor:
        """Return the scores [B, T] after a layer. Patience and state norms use the layers of earlier calls."""
        if self._state is not None:
            return self._state(after_BTD, before_BTD)
        if self.criterion == LEARNED:
            return next(self._heads).score(after_BTD)
        assert self.head is not None
        logits_BTV = self.head(after_BTD)
        if self.criterion in _HEAD_SCORES:
            return _HEAD_SCORES[self.criterion](logits_BTV)
        choice_BT = logits_BTV.argmax(-1)
        self._streak = patience(choice_BT, self._choice, self._streak)
        self._choice = choice_BT
        return self._streak

    def single(self, after_11D: Tensor, before_11D: Tensor) -> float:
        """Return the score of one token."""
        return float(self(after_11D, before_11D)) if self._state is None else self._state.single(after_11D, before_11D)


class SampleScores:
    """Scores of each sample's states taken as one vector (for `learned`: of their mean), padding left out.

    Args:
        criterion: one of `SAMPLE_CRITERIA`.
        real_BT: boolean, False on padding; None: no padding.
        heads: for `learned`, the head of each layer that this will be called for, in order.
    """

    def __init__(self, criterion: str, real_BT: Tensor | None, heads: Sequence["ExitHead"] = ()) -> None:
        self._score = None if criterion == LEARNED else _state_score(criterion)
        self.real, self._heads = real_BT, iter(heads)

    def __call__(self, after_BTD: Tensor, before_BTD: Tensor) -> Tensor:
        """Return the scores [B] after a layer."""
        if self._score is not None:
            return self._score.samples(after_BTD, before_BTD, self.real)
        if self.real is None:
            mean_BD = after_BTD.mean(1)
        else:
            mean_BD = after_BTD.masked_fill(~self.real[..., None], 0.0).sum(1) / self.real.sum(1, keepdim=True)
        return next(self._heads).score(mean_BD[:, None])[:, 0]

    def single(self, after_1TD: Tensor, before_1TD: Tensor) -> float:
        """Return the score of one sample."""
        if self.real is None and self._score is not None:
            return self._score.single(after_1TD, before_1TD)
        return float(self(after_1TD, before_1TD))


def decayed(threshold: float, beta: float, tau: float, steps: int, position: Tensor) -> Tensor:
    """CALM's threshold of the token at `position`: beta * threshold + (1 - beta) * exp(-tau * position / steps), cut to
    [0, 1]. Early tokens, whose mistakes carry on, get the higher one.

    Args:
        threshold: in [0, 1].
        beta: share of the constant part, in (0, 1].
        tau: speed of the decay, > 0.
        steps: tokens that are generated at most.
        position: 0 for the first generated token.
    """
    return (beta * threshold + (1 - beta) * torch.exp(-tau * position.float() / steps)).clamp(0, 1)
