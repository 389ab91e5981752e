"""Fit the routers of mixture of depths to the attention of the model, without gradients of its loss.

A router trained by the gradient of its gate learns how strongly to update a token, not what the other tokens lose when
they can no longer attend to it; and in a trained model that gradient says little, since the loss is flat in any small
change. Here the worth of a token as key and value is measured: the attention that the predicting text pays to it in the
dense model (the score of FastV, arXiv 2403.06764). The router learns it from the hidden state that it will choose by,
before the text is known: a linear router by ridge regression, an MLP by the cross entropy between its softmax over a
frame and the frame's attention.

Shape suffixes: B batch, T tokens, D width, G groups (frames), N tokens of the largest group.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmskip import families
from mmskip.config import check_count, check_number
from mmskip.methods.mixture_of_depths import MoDConfig, anneal, find_policies
from mmskip.protocols import TokenView
from mmskip.registry import applied
from mmskip.swap import swap_all, unswap
from mmskip.tokens.groups import TokenGroups
from mmskip.tokens.router import LEARNED, token_scores

SEPARATE_GATES = ("separate", "none")
"""Gates that share no weights with the ranking."""
NOTHING_SEEN = "cannot fit routers: no vision token receives attention in the calibration batches."
STEP_TOKENS, LEAST_STEPS = 4608, 4
"""Tokens of an optimizer step, and the fewest steps of an epoch."""
LEARNING_RATE = 3e-3


@dataclass
class _Moments:
    """Sums over the vision tokens of one block, relative to the mean of each frame.

    Attributes:
        sums: [D + 1, D + 1] in float64, products of the hidden state, with the attention received as last entry.
        count: number of tokens.
    """

    sums: Tensor | None = None
    count: float = 0.0

    def add(self, x_BTD: Tensor, received_BT: Tensor, groups: TokenGroups) -> None:
        """Add a call."""
        if not groups.has_vision:
            return
        groups = groups.to(x_BTD.device)
        pairs_BTE = torch.cat([x_BTD.double(), received_BT.double()[..., None]], -1)
        flat_ME = torch.cat([pairs_BTE.flatten(0, 1), pairs_BTE.new_zeros(1, pairs_BTE.shape[-1])])
        used_GN1 = (groups.table_GN < len(flat_ME) - 1)[..., None]
        pairs_GNE = flat_ME[groups.table_GN] * used_GN1
        means_G1E = pairs_GNE.sum(1, keepdim=True) / used_GN1.sum(1, keepdim=True)
        centred = ((pairs_GNE - means_G1E) * used_GN1).flatten(0, 1)
        products = centred.T @ centred
        self.sums = products if self.sums is None else self.sums + products
        self.count += float(groups.sizes.sum())

    def reduced(self, reduce: Callable[[Tensor], Tensor], weight: Tensor) -> "_Moments":
        """Sum up all ranks.

        Raises:
            ValueError: no rank has seen a token with attention.
        """
        empty = torch.zeros(len(weight) + 1, len(weight) + 1, dtype=torch.float64, device=weight.device)
        sums = reduce(empty if self.sums is None else self.sums)
        count = float(reduce(torch.tensor(self.count, dtype=torch.float64, device=weight.device)))
        if count == 0 or not sums[-1, -1] > 0:
            raise ValueError(NOTHING_SEEN)
        return _Moments(sums, count)

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """Solve the ridge regression; return the weights [D], whose scores have standard deviation 1 within frames, and
        the share of the variance of the attention within frames that they explain."""
        assert self.sums is not None
        c_DD, c_D, total = self.sums[:-1, :-1], self.sums[:-1, -1], float(self.sums[-1, -1])
        scales_D = c_DD.diagonal().clamp(min=1e-12 * float(c_DD.diagonal().max()))
        w_D = torch.linalg.solve(c_DD + ridge * torch.diag(scales_D), c_D)
        spread = float(w_D @ c_DD @ w_D)
        explained = (2 * float(w_D @ c_D) - spread) / max(total, 1e-30)
        return w_D * (self.count / max(spread, 1e-30)) ** 0.5, explained


@dataclass
class _Frames:
    """A bounded random sample of the frames of one block: those with the lowest random draws, whatever their size and
    order.

    Attributes:
        tokens: vision tokens kept at most; a single frame may have more.
        kept: a heap with the negative draw and the number of each frame, its hidden states [N, D] and its share of the
            attention [N], on the CPU.
        held: tokens of those.
        seen: frames seen so far.
        limit: lowest draw of a frame that was dropped.
    """

    tokens: int
    generator: torch.Generator
    kept: list[tuple[float, int, Tensor, Tensor]] = field(default_factory=list)
    held: int = 0
    seen: int = 0
    limit: float = 1.0

    def add(self, x_BTD: Tensor, received_BT: Tensor, groups: TokenGroups) -> None:
        """Add a call."""
        if not groups.has_vision:
            return
        groups = groups.to(x_BTD.device)
        x_MD, received_M = x_BTD.flatten(0, 1), received_BT.flatten().float()
        for places_N, size in zip(groups.table_GN, groups.sizes, strict=True):
            share_N = received_M[places_N[:size]]
            if float(share_N.sum()) > 0:
                self._keep(x_MD[places_N[:size]].cpu(), (share_N / share_N.sum()).cpu())

    def _keep(self, x_ND: Tensor, share_N: Tensor) -> None:
        self.seen += 1
        draw = float(torch.rand((), generator=self.generator))
        if draw >= self.limit:
            return
        heapq.heappush(self.kept, (-draw, self.seen, x_ND, share_N))
        self.held += len(x_ND)
        while self.held > self.tokens and len(self.kept) > 1:
            least, _, dropped, _ = heapq.heappop(self.kept)
            self.held -= len(dropped)
            self.limit = -least

    def batch(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw frames with replacement, about `tokens` tokens; return hidden states [G, N, D] in fp32, shares of the
        attention [G, N], and which entries are tokens [G, N]."""
        longest = max(len(share_N) for *_, share_N in self.kept)
        count = max(1, tokens // longest)
        drawn = [self.kept[i] for i in torch.randint(len(self.kept), (count,), generator=self.generator)]
        x_GND = pad_sequence([x.float() for _, _, x, _ in drawn], batch_first=True)
        share_GN = pad_sequence([share for *_, share in drawn], batch_first=True, padding_value=-1.0)
        return x_GND, share_GN.clamp(min=0), share_GN >= 0


def _trained(
    frames: _Frames, start: dict[str, Tensor], epochs: int, reduce: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Tensor], float]:
    """Train an MLP router on the frames of all ranks by AdamW with linear decay; return its weights and the share of
    the variance of the attention within frames that they explain."""
    device = next(iter(start.values())).device
    ranks = float(reduce(torch.ones((), device=device)))
    held = float(reduce(torch.tensor(float(frames.held), device=device)))
    if held == 0:
        raise ValueError(NOTHING_SEEN)
    batch = min(STEP_TOKENS, math.ceil(held / ranks / LEAST_STEPS))
    steps = round(epochs * held / ranks / batch)
    flat = nn.Parameter(reduce(torch.cat([value.flatten().float() for value in start.values()])) / ranks)
    optimizer = torch.optim.AdamW([flat], LEARNING_RATE, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        flat.grad = torch.zeros_like(flat)
        if frames.kept:
            x_GND, share_GN, token_GN = (value.to(device) for value in frames.batch(batch))
            with torch.enable_grad():
                scores_GN = token_scores(x_GND, _named(flat, start)).masked_fill(~token_GN, -1e9)
                loss = -(share_GN * scores_GN.log_softmax(1)).sum(1).mean()
            (flat.grad,) = torch.autograd.grad(loss, flat)
        flat.grad = reduce(flat.grad) / ranks
        optimizer.step()
        decay.step()
    weights = _named(flat.detach(), start)
    return weights, _explained(frames, weights, reduce)


def _named(flat: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, like.items(), strict=True)}


def _explained(frames: _Frames, weights: dict[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> float:
    """Return the squared correlation of scores and attention within frames; 0 where it is negative."""
    device = next(iter(weights.values())).device
    sums_3 = torch.zeros(3, dtype=torch.float64, device=device)
    for _, _, x_ND, share_N in frames.kept:
        scores_N = token_scores(x_ND.to(device), weights).double()
        pair_2N = torch.stack([scores_N, share_N.to(device).double()])
        pair_2N = pair_2N - pair_2N.mean(1, keepdim=True)
        sums_3 += torch.stack([pair_2N[0] @ pair_2N[0], pair_2N[0] @ pair_2N[1], pair_2N[1] @ pair_2N[1]])
    scored, both, paid = reduce(sums_3).tolist()
    return max(both, 0.0) ** 2 / max(scored * paid, 1e-30)


def fit_routers(
    model: nn.Module,
    calls: Iterable[tuple[Mapping[str, Any], Tensor]],
    ridge: float = 0.01,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    epochs: int = 45,
    tokens: int = 160_000,
) -> dict[int, float]:
    """Teach the learned routers of `model` the attention that tokens receive.

    The model runs dense, in evaluation mode and without gradients. Only routers whose gate has other weights are
    fitted, so that with keep 1 the model computes the same as before.

    Args:
        model: with `MoDConfig(router="linear" or "mlp", gate="separate" or "none")` applied.
        calls: pairs of forward arguments and BoolTensor [B, T], the tokens whose attention counts: those from which an
            answer is predicted, or all text.
        ridge: of linear routers: weight of the penalty, relative to the variance of each hidden dimension, > 0.
        reduce: sums a tensor over the ranks of a distributed run, each of which passes different calls.
        epochs: of MLP routers: passes over the hidden states held, >= 1.
        tokens: vision tokens per rank and MLP router whose hidden states are held in host memory at a time, in the
            model's dtype, >= 1; beyond that, a random sample of the frames.

    Returns:
        By block index, the share of the variance of the attention within frames that the router explains; for MLP
        routers, whose frames weigh alike, its squared correlation with the scores.

    Raises:
        ValueError: no router to fit, packed attention, or no vision tokens that the queries attend to; nothing changes
            then.
    """
    check_number("ridge", ridge, 0, open_low=True)
    check_count("epochs", epochs, 1)
    check_count("tokens", tokens, 1)
    family, fitted = _fittable(model)
    view: TokenView = families.find(model, [family])
    watched: dict[int, _Moments | _Frames] = {
        index: _Moments() if config.router == "linear" else _Frames(tokens, torch.Generator().manual_seed(index))
        for index, config in fitted.items()
    }
    with _dense(model), _watched(view, watched) as ask, torch.no_grad():
        for inputs, queries_BT in calls:
            ask(queries_BT)
            model(**inputs, use_cache=False)
    solved = {
        index: _solve(seen, _ranking_weights(view.blocks[index]), ridge, reduce, epochs)
        for index, seen in watched.items()
    }
    for index, (found, _) in solved.items():
        for name, weight in _ranking_weights(view.blocks[index]).items():
            weight.copy_(found[name])
    return {index: explained for index, (_, explained) in solved.items()}


def _fittable(model: nn.Module) -> tuple[str, dict[int, MoDConfig]]:
    """Return the family of the model, and the configs of the routers to fit by block index.

    Raises:
        ValueError: there are none.
    """
    family = next((r.family for r in applied(model, details=True) if isinstance(r.config, MoDConfig)), None)
    fitted = {
        p.index: p.config
        for p in find_policies(model)
        if p.config.router in LEARNED and p.config.gate in SEPARATE_GATES
    }
    if family is None or not fitted:
        raise ValueError(
            f"{applied(model)} has no router to fit; expected MoDConfig(router='linear' or 'mlp', "
            "gate='separate' or 'none'): with another gate the ranking weights also multiply the updates."
        )
    return family, fitted


def _solve(
    seen: _Moments | _Frames,
    weights: dict[str, Tensor],
    ridge: float,
    reduce: Callable[[Tensor], Tensor],
    epochs: int,
) -> tuple[dict[str, Tensor], float]:
    """Fit one router; return its weights, and the share of the variance that they explain."""
    if isinstance(seen, _Frames):
        return _trained(seen, weights, epochs, reduce)
    w_D, explained = seen.reduced(reduce, weights["weight"]).solve(ridge)
    return {"weight": w_D}, explained


def _ranking_weights(block: Any) -> dict[str, Tensor]:
    return {name: weight.data for name, weight in block.mmskip_router.ranking_weights().items()}


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, with every token kept, inside."""
    training = [(module, module.training) for module in model.modules()]
    progress = [(policy, policy.progress) for policy in find_policies(model)]
    anneal(model, 0.0)
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for policy, value in progress:
            policy.progress = value


@contextmanager
def _watched(view: TokenView, watched: Mapping[int, "_Moments | _Frames"]) -> Iterator[Callable[[Tensor], None]]:
    """Let the blocks in `watched` report where the attention of each call goes; yields a function that sets the queries
    of the next call."""
    from mmskip.hf.probes.attention import watch_changes

    watches, changes = [], []
    for index, sums in watched.items():
        watch, more = watch_changes(view, index, sums.add)
        watches.append(watch)
        changes += more

    def ask(queries_BT: Tensor) -> None:
        for watch in watches:
            watch.queries_BT = queries_BT

    swap_all(changes)
    try:
        yield ask
    finally:
        for change in reversed(changes):
            unswap(change.module)
