"""Family `cnn`: convolutional networks of timm and torchvision, and others built of the same operations.

Its sites are the convolutions and norms, by module path: `conv.layer2.0.conv2`, `norm.bn1`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmskip.families.base import Site, View
from mmskip.meters import ConvMeter
from mmskip.swap import Replacement, state_of

_ATTENTION = ("qkv", "q_proj", "to_qkv", "in_proj_weight", "relative_position_bias_table")


@dataclass(frozen=True)
class CNNView(View):
    """A convolutional network.

    Attributes:
        root: the module whose input is an image.
    """

    family: str
    root: nn.Module

    @property
    def stacks(self) -> dict[str, tuple[nn.Module, ...]]:  # type: ignore[override]
        """None: its sites are convolutions and norms."""
        return {}

    def meter(self) -> ConvMeter:
        """Return what counts the convolutions."""
        found = [item for item in self.root.named_modules() if isinstance(item[1], Replacement)]
        replaced = [
            (Site(f"conv.{name}", "conv", module, index), state_of(module, Replacement).original)
            for index, (name, module) in enumerate(found)
        ]
        return ConvMeter(self, replaced)

    @property
    def joins_parallel_branches(self) -> bool:
        """Whether concats join the two windows of SqueezeNet's fire modules."""
        return any(type(module).__name__ == "Fire" for module in self.root.modules())


def match(model: nn.Module) -> tuple[CNNView | None, str]:
    """Return the view of `model`, or None and the reason why it does not fit."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        return (
            None,
            f"needs the network as Python runs it; {name} is scripted or traced, so its operations are not seen",
        )
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convs:
        return None, f"needs a network with 2-d convolutions; {name} has none"
    attention = _attention(model.modules())
    if attention is not None:
        return None, (
            f"{name} holds {type(attention).__name__}, attention between positions. A transformer can leave tokens out "
            "for real: drop those of hidden patches after the patch embedding, or give its attention a mask"
        )
    mixers = [m for m in convs if max(m.kernel_size) > 1 and m.kernel_size != m.stride]
    if not mixers:
        return None, f"{name} has no convolution that looks at neighbours, so it is no convolutional network"
    return CNNView("cnn", model), ""


def _attention(modules: Any) -> nn.Module | None:
    for module in modules:
        if isinstance(module, nn.MultiheadAttention) or any(
            hasattr(module, name) and not isinstance(module, nn.Conv2d) for name in _ATTENTION
        ):
            return module
    return None
