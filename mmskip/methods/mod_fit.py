"""Fitting the linear routers of mixture-of-depths to the attention of the model itself, without gradients.

A router trained by the gradient of its gate learns how strongly a token should be updated, not what the other tokens
lose when it is no longer there to be attended to; and in a trained model that gradient says little, since the loss is
flat in any small change. What a token is worth as key and value is measured here instead: by the attention that the
predicting text pays to it in the dense model (the score of FastV, arXiv 2403.06764). The router regresses that on the
hidden state from which it will have to choose. Of all linear rankings of a frame this estimates the one that keeps most
of the attention, and it chooses before the text is known.

Shape suffixes: B batch, T tokens, D width, G groups (frames), N tokens of the largest group.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmskip import families
from mmskip.families import TokenView
from mmskip.methods.mod import MoDConfig, anneal, policies
from mmskip.registry import applied
from mmskip.routers import TokenGroups
from mmskip.swap import swap_all, unswap


@dataclass
class _Moments:
    """Sums over the vision tokens of one block, each measured from the mean of its frame.

    Attributes:
        sums: [D + 1, D + 1] in float64, products of the hidden state, with the attention received as last entry.
        count: number of tokens.
    """

    sums: Tensor | None = None
    count: float = 0.0

    def add(self, x_BTD: Tensor, received_BT: Tensor, groups: TokenGroups) -> None:
        """Take in a call."""
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
        """The sums over all ranks.

        Raises:
            ValueError: there are none.
        """
        empty = torch.zeros(len(weight) + 1, len(weight) + 1, dtype=torch.float64, device=weight.device)
        sums = reduce(empty if self.sums is None else self.sums)
        count = float(reduce(torch.tensor(self.count, dtype=torch.float64, device=weight.device)))
        if count == 0:
            raise ValueError("the calls have no vision tokens, on which routers could be fitted.")
        return _Moments(sums, count)

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The weights [D], of scores with standard deviation 1 within frames, and the share of the variance of the
        attention within frames that they explain."""
        assert self.sums is not None
        c_DD, c_D, total = self.sums[:-1, :-1], self.sums[:-1, -1], float(self.sums[-1, -1])
        scales_D = c_DD.diagonal().clamp(min=1e-12 * float(c_DD.diagonal().max()))
        w_D = torch.linalg.solve(c_DD + ridge * torch.diag(scales_D), c_D)
        spread = float(w_D @ c_DD @ w_D)
        explained = (2 * float(w_D @ c_D) - spread) / max(total, 1e-30)
        return w_D * (self.count / max(spread, 1e-30)) ** 0.5, explained


def fit_routers(
    model: nn.Module,
    calls: Iterable[tuple[Mapping[str, Any], Tensor]],
    ridge: float = 0.01,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[int, float]:
    """Set the weights of the linear routers of `model` by ridge regression of the attention that tokens receive.

    The model runs dense, in evaluation mode and without gradients. Only routers whose gate is not made of the same
    weights are fitted, so with keep 1 the model computes afterwards what it did before.

    Args:
        model: with `MoDConfig(router="linear", gate="own" or "none")` applied.
        calls: arguments of the forward, and BoolTensor [B, T] with the tokens whose attention counts: those from which
            an answer is predicted, or all text.
        ridge: weight of the penalty, relative to the variance of each hidden dimension, > 0.
        reduce: sums a tensor over the ranks of a distributed run, each of which passes calls of its own.

    Returns:
        By block index, the share of the variance of the attention within frames that the router explains.

    Raises:
        ValueError: no router to be fitted, packed attention, or no vision tokens in the calls. Nothing is changed then.
    """
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge!r}; expected a number > 0.")
    family = next((r.family for r in applied(model, details=True) if isinstance(r.config, MoDConfig)), None)
    fitted = [p.index for p in policies(model) if p.config.router == "linear" and p.config.gate in ("own", "none")]
    if family is None or not fitted:
        raise ValueError(
            f"{applied(model)} has no router to be fitted; expected MoDConfig(router='linear', gate='own' or 'none'): "
            "with another gate the ranking weights also multiply the updates."
        )
    view: TokenView = families.find(model, [family])
    moments = {index: _Moments() for index in fitted}
    with _dense(model), _watched(view, moments) as ask, torch.no_grad():
        for inputs, queries_BT in calls:
            ask(queries_BT)
            model(**inputs, use_cache=False)
    weights = {index: _weight(view.blocks[index]) for index in fitted}
    solved = {index: moments[index].reduced(reduce, weights[index]).solve(ridge) for index in fitted}
    for index, (w_D, _) in solved.items():
        weights[index].data.copy_(w_D)
    return {index: explained for index, (_, explained) in solved.items()}


def _weight(block: Any) -> Tensor:
    weight: Tensor = block.mmskip_router.weight
    return weight


@contextmanager
def _dense(model: nn.Module) -> Iterator[None]:
    """In evaluation mode with every token kept, and afterwards as before."""
    training = [(module, module.training) for module in model.modules()]
    progress = [(policy, policy.progress) for policy in policies(model)]
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
def _watched(view: TokenView, moments: Mapping[int, _Moments]) -> Iterator[Callable[[Tensor], None]]:
    """The blocks in `moments` tell them where the attention of each call goes; gives what takes a call's queries."""
    watches, changes = [], []
    for index, sums in moments.items():
        watch, more = view.watch_changes(index, sums.add)
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
