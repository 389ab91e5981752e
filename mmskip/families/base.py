"""Views of models: stacks of blocks, and sites by kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mmskip.meters import CountingMeter, Meter

KINDS = ("block", "attn", "mlp", "conv", "norm", "skip", "stage")


@dataclass(frozen=True)
class Site:
    """A named place in a model.

    Attributes:
        name: `block.3`, `block.3.attn`, `encoder.0`, `conv.layer2.0.conv2`, `skip.1`.
        kind: one of `KINDS`.
        module: what stands there.
        index: 0-based position among the sites of its kind, in its stack.
        stack: the stack of blocks that it belongs to (`decoder`, `encoder`, `image`, `text`), or "".
        argument: the argument of the module's `forward` with the hidden states; "" where it is the first one.
    """

    name: str
    kind: str
    module: nn.Module
    index: int
    stack: str = ""
    argument: str = ""


@dataclass(frozen=True)
class SkipSite:
    """Where one skip connection enters the decoder.

    Attributes:
        joint: the module whose first argument is the concatenation of skip and decoder features.
        start, stop: channels of the concatenation that belong to the skip.
        channels: channels of the full concatenation.
        dim: its channel dimension: 1 for images, -1 for tokens.
        stage: number of the decoder stage, 0 the deepest.
        norm: inside the joint, the first module on the residual branch; None if there is none.
        shortcut: inside the joint, the module on the shortcut path; None if there is none.
        fresh: the concatenation is made for the joint alone and read by nothing else, so that without gradients it
            may be scaled where it lies.
    """

    joint: nn.Module
    start: int
    stop: int
    channels: int
    dim: int = 1
    stage: int = 0
    norm: nn.Module | None = None
    shortcut: nn.Module | None = None
    fresh: bool = False

    def check(self, x: Tensor) -> None:
        """Raise RuntimeError if what reaches the joint is not the concatenation that was described."""
        if x.shape[self.dim] != self.channels:
            raise RuntimeError(
                f"{type(self.joint).__name__} got {x.shape[self.dim]} channels; its skip connection was described for "
                f"a concatenation of {self.channels}."
            )


class View:
    """A model as a family sees it. Subclasses set `family` and `root`, and name their blocks by `stacks`.

    Attributes:
        family: name of the family.
        root: the module that stands for the full model.
        stacks: blocks in the order they run, by the name of their stack; a decoder's only one is called `block`.
    """

    family: str
    root: nn.Module
    stacks: Mapping[str, tuple[nn.Module, ...]]

    def sites(self, kind: str) -> tuple[Site, ...]:
        """Return the sites of one kind, in the order they run; empty where the model has none of that kind.

        Raises:
            ValueError: no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")
        return tuple(self._sites(kind))

    def _sites(self, kind: str) -> Iterator[Site]:
        """Yield the sites of a kind; families extend it by the kinds that only they know."""
        if kind == "block":
            for stack, blocks in self.stacks.items():
                for index, block in enumerate(blocks):
                    yield Site(f"{stack}.{index}", kind, block, index, stack, self.hidden_argument(block))
        elif kind in ("attn", "mlp"):
            for site in self.sites("block"):
                part: Any = dict(zip(("attn", "mlp"), self.parts(site.module), strict=True))[kind]
                if part is not None:
                    yield Site(f"{site.name}.{kind}", kind, part, site.index, site.stack)
        elif kind in ("conv", "norm"):
            fits = _is_conv if kind == "conv" else _is_norm
            found = [(name, module) for name, module in self.root.named_modules() if fits(module)]
            for index, (name, module) in enumerate(found):
                yield Site(f"{kind}.{name}", kind, module, index)

    def meter(self) -> Meter:
        """Return the meter of the model. This one counts every operation while the model runs; a family may return a
        `mmskip.meters.Meter` that knows its models better."""
        return CountingMeter(self)

    def hidden_argument(self, block: nn.Module) -> str:
        """Name of the argument of a block's `forward` that carries the hidden states; "" for the first one."""
        return ""

    def parts(self, block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """Return the attention and the MLP of a block, None for a part that is no single module."""
        return None, None


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm; libraries write their own (`LlamaRMSNorm`), with weights and the word in their name."""
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
