"""Train a captioner to exit early: a loss at every decoder layer, random exits, and a loss that keeps settled states.

Shapes: L decoder layers, B rows, T tokens, D width, P labelled positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmskip.utils.pretrained import refuse_unknown

LAYER_LOSSES = ("last", "sum", "uniform", "linear", "sqrt", "inverse")
CONFIDENT = 0.9
"""Probability of its label above which a state counts as settled."""


def layer_weights(name: str, layers: int) -> list[float]:
    """Weights of the losses of the decoder's layers, first layer first.

    | name | weight of layer l of L |
    |---|---|
    | `last` | 0 below the last, 1 there |
    | `sum` | 1 (MuE) |
    | `uniform` | 1 / L |
    | `linear` | l, scaled to the sum 1 |
    | `sqrt` | square root of l, scaled to the sum 1 |
    | `inverse` | 1 / l, scaled to the sum 1: early layers weigh most |

    Raises:
        ValueError: another name.
    """
    refuse_unknown("layer_loss", [name], LAYER_LOSSES)
    numbers = range(1, layers + 1)
    if name == "last":
        return [float(n == layers) for n in numbers]
    if name == "sum":
        return [1.0] * layers
    kinds = {"uniform": [1.0] * layers, "linear": [float(n) for n in numbers]}
    kinds |= {"sqrt": [math.sqrt(n) for n in numbers], "inverse": [1 / n for n in numbers]}
    total = sum(kinds[name])
    return [weight / total for weight in kinds[name]]


@contextmanager
def captured(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the states [B, T, D] after each block, in the order in which they run inside the context."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def draw_layers(share: float, shape: Sequence[int], layers: int, device: torch.device) -> Tensor | None:
    """Draw after how many layers each state exits: a random number from 1 for a share of them, `layers` for the
    others.

    Returns:
        LongTensor of shape `shape`; None where no state exits early.
    """
    if not share:
        return None
    some = torch.randint(1, layers + 1, tuple(shape))
    return torch.where(torch.rand(tuple(shape)) < share, some, layers).to(device)


@contextmanager
def exiting(blocks: Sequence[nn.Module], layers: Tensor) -> Iterator[None]:
    """Keep the state of every row, or token, after its layer, as an exit there would. All blocks run.

    Args:
        blocks: in order.
        layers: LongTensor [B] (or [B, T]), after how many blocks each row (or token) exits, 1 to their number.
    """
    handles = []
    last: list[Tensor] = []
    depth = layers.view(*layers.shape, *(1,) * (3 - layers.dim()))

    def hook(number: int) -> Any:
        def run(module: nn.Module, arguments: Any, output: Any) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            if last:
                after = torch.where(depth >= number, after, last[0])
            last[:] = [after]
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return run

    for number, block in enumerate(blocks, 1):
        handles.append(block.register_forward_hook(hook(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def saturation_loss(states: Sequence[Tensor], logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Penalise layers that change a state whose prediction is already right and confident: 1 - cosine of the states
    before and after the layer, summed over layers and labels. Gradients reach the layer, not the state before it.

    Args:
        states: [P, D] after each layer.
        logits: [P, V] after each layer.
        labels: [P].
    """
    total = states[0].new_zeros((), dtype=torch.float32)
    for before, after, logits_PV in zip(states[:-1], states[1:], logits[:-1], strict=True):
        sure_P = logits_PV.detach().float().softmax(-1).gather(1, labels[:, None])[:, 0] > CONFIDENT
        cosine_P = F.cosine_similarity(after.float(), before.detach().float(), dim=-1)
        total = total + ((1 - cosine_P) * sure_P).sum()
    return total


def layer_losses(
    states: Sequence[Tensor],
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Sequence[float],
    exits: Tensor | None = None,
    settle: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Sum the losses of the decoder's layers.

    Args:
        states: [P, D] after each layer.
        head: from states to logits [P, V].
        labels: LongTensor [P].
        weights: of the layers' losses.
        exits: LongTensor [P], after how many layers each token exited; it does not count in later layers.
        settle: weight of `saturation_loss`, >= 0.
        smoothing: of labels, in [0, 1).

    Returns:
        The differentiable loss, and the cross-entropy [P] of the last layer without smoothing.
    """
    logits = {n: head(states[n - 1]) for n, weight in enumerate(weights, 1) if weight or settle}
    total = labels.new_zeros(()).float()
    if settle:
        total = settle * saturation_loss(states, list(logits.values()), labels)
    for number, logits_PV in logits.items():
        loss_P = F.cross_entropy(logits_PV.float(), labels, reduction="none", label_smoothing=smoothing)
        kept_P = loss_P if exits is None else loss_P * (exits >= number)
        total = total + weights[number - 1] * kept_P.sum()
    return total, F.cross_entropy(logits[len(weights)].detach().float(), labels, reduction="none")
