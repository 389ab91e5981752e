"""Exit heads: turn a hidden state into an output where a model stops early."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TiedHead:
    """The model's own output as the head of every exit: final norm, then output projection.

    Args:
        norm: applied to the last layer's states; None: the model has none.
        projection: states -> logits.
        scale: of the states between the two.
    """

    def __init__(self, norm: nn.Module | None, projection: nn.Module, scale: float = 1.0) -> None:
        self.norm, self.projection, self.scale = norm, projection, scale

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        x_BTD = x_BTD if self.norm is None else self.norm(x_BTD)
        return self.projection(x_BTD * self.scale if self.scale != 1.0 else x_BTD)


class ExitHead(nn.Module):
    """A head of an exit's own: layer norm and a linear map, to classes or (with one output) to a learned score.

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
        """Logits [B, T, V]."""
        x_BTD = F.layer_norm(x_BTD, x_BTD.shape[-1:], self.norm_weight.to(x_BTD), self.norm_bias.to(x_BTD))
        return F.linear(x_BTD, self.weight.to(x_BTD), self.bias.to(x_BTD))

    def score(self, x_BTD: Tensor) -> Tensor:
        """The learned criterion of a head with one output: the probability, [B, T], that stopping here is right."""
        return self(x_BTD)[..., 0].float().sigmoid()
