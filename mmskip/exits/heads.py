"""Exit heads: turn a hidden state into an output where a model stops early."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TiedHead:
    """The model's output as the head of every exit: final norm, then output projection.

    Args:
        norm: applied to the last layer's states; None: the model has none.
        projection: states -> logits.
        scale: of the states between the two.
    """

    def __init__(self, norm: nn.Module | None, projection: nn.Module, scale: float = 1.0) -> None:
        self.norm, self.projection, self.scale = norm, projection, scale

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V]."""
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        return self.projection(x_BTD * self.scale if self.scale != 1.0 else x_BTD)


class ExitHead(nn.Module):
    """A new head for one exit: layer norm and a linear map, to classes or (with one output) to a learned score.

    Args:
        width: D.
        outputs: V.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.weight = nn.Parameter(torch.empty(outputs, width))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V]."""
        x_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], self.norm_weight.to(x_BTD), self.norm_bias.to(x_BTD))
        return F.linear(x_BTD, self.weight.to(x_BTD), self.bias.to(x_BTD))

    def score(self, x_BTD: Tensor) -> Tensor:
        """Return the learned criterion of a head with one output: the probability, [B, T], that stopping is right."""
        return self(x_BTD)[..., 0].float().sigmoid()


def new_heads(exit_layers: Sequence[int], blocks: Sequence[nn.Module]) -> tuple[ExitHead, ...]:
    """Return a head with one output per exit layer (counted from 1), of the width and on the device of its block.

    Raises:
        ValueError: a block has no norm with weights, which give the width.
    """
    found = []
    for block in (blocks[layer - 1] for layer in exit_layers):
        norms = [m.weight for m in block.modules() if "norm" in type(m).__name__.lower()]
        widths = [weight.numel() for weight in norms if isinstance(weight, Tensor)]
        if not widths:
            raise ValueError(
                f"{type(block).__name__} has no norm with weights, which would give the width of a learned head; "
                "choose another criterion."
            )
        found.append(ExitHead(max(widths), 1).to(next(block.parameters()).device))
    return tuple(found)
