"""The learned router: score tokens and gate their updates.

Shape suffixes: B batch, T tokens, D width, G groups of the batch, N tokens of the largest group, S slots of
the largest row after selection.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUTERS = ("linear", "mlp", "norm", "random", "uniform")


LEARNED = ("linear", "mlp")
"""Routers with weights."""


GATES = ("linear", "sigmoid", "tanh", "separate", "none")


class TokenRouter(nn.Module):
    """A learned router: one score per token in fp32, mu = w . x (VideoLLM-MoD, LayerExpert), or, with `hidden` units,
    mu = w . gelu(W x / rms(x) + b).

    It does not use `nn.Linear`, so that peft's `all-linear` does not wrap it.

    Args:
        width: hidden width D.
        gate: multiplier of a kept token's update: mu (`linear`, VideoLLM-MoD), its `sigmoid`, `tanh`
            (1 + 0.2 * tanh(mu) with zero-initialised weights w: the update starts unchanged; p-MoD), `separate`
            (1 + 0.2 * tanh(v . x) with separate, zero-initialised weights v), or `none` (1).
        device, dtype: of the weights.
        ranks: whether it has the weights w; False for a gate beside a router without weights.
        hidden: units of the MLP; 0: the linear router.
    """

    def __init__(
        self,
        width: int,
        gate: str,
        device: Any = None,
        dtype: torch.dtype | None = None,
        ranks: bool = True,
        hidden: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.gate_mode = width, gate

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.hidden_weight = weights(hidden, width) if ranks and hidden else None
        self.hidden_bias = weights(hidden) if ranks and hidden else None
        self.weight = weights(hidden or width) if ranks else None
        self.gate_weight = weights(width) if gate == "separate" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: zeros for w of `tanh` and for separate gate weights; otherwise normal with standard deviation
        fan-in ** -0.5, so that scores are of order 1."""
        if self.gate_weight is not None:
            nn.init.zeros_(self.gate_weight)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            nn.init.normal_(self.hidden_weight, std=self.width**-0.5)
            nn.init.zeros_(self.hidden_bias)
        if self.weight is None:
            return
        if self.gate_mode == "tanh":
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.weight.shape[0] ** -0.5)

    def ranking_weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that produce the scores, by name."""
        named = {"weight": self.weight, "hidden_weight": self.hidden_weight, "hidden_bias": self.hidden_bias}
        return {name: value for name, value in named.items() if value is not None}

    def forward(self, x: Tensor) -> Tensor:
        """Return scores in fp32, [..., D] -> [...]."""
        return token_scores(x, self.ranking_weights())

    def gate(self, x: Tensor) -> Tensor:
        """Return multipliers of the updates in fp32, [..., D] -> [...]."""
        if self.gate_weight is not None:
            return gate_of(token_scores(x, {"weight": self.gate_weight}), "tanh")
        return gate_of(self(x), self.gate_mode)

    def flops(self) -> tuple[int, int]:
        """Return the FLOPs of a token's score, and of its gate."""
        score = 2 * sum(value.numel() for value in self.ranking_weights().values())
        if self.gate_weight is not None:
            return score, 2 * self.gate_weight.numel()
        return score, 0 if self.gate_mode == "none" else score

    def extra_repr(self) -> str:
        hidden = "" if self.hidden_weight is None else f", hidden={self.hidden_weight.shape[0]}"
        return f"width={self.width}, gate={self.gate_mode}{hidden}"


def token_scores(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Score tokens by a router's `ranking_weights`, in fp32, [..., D] -> [...]."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        if "hidden_weight" in weights:
            x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
            x = F.gelu(F.linear(x, weights["hidden_weight"].float(), weights["hidden_bias"].float()))
        return x @ weights["weight"].float()


def gate_of(scores: Tensor, mode: str) -> Tensor:
    """Return the multiplier of a kept token's update, fp32, same shape as `scores`.

    Args:
        mode: `linear`, `sigmoid` or `tanh`, see `TokenRouter`.
    """
    if mode == "linear":
        return scores
    if mode == "sigmoid":
        return torch.sigmoid(scores)
    return 1 + 0.2 * torch.tanh(scores)
