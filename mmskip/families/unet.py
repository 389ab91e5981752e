"""Family `unet`: networks that concatenate a skip connection with their decoder's features.

A skip site is named by its *joint*: the module whose first argument is the concatenation, and the channels of it that
are the skip's. Found by structure in diffusers' UNets (also those for video and with ControlNet residuals), in
transformers with token skips (Hunyuan-DiT, U-ViT), and in any custom network described by `describe_unet`.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmskip.families.base import Site, SkipSite, View

__all__ = ["SkipSite", "UNetView", "describe_unet", "match"]


@dataclass(frozen=True)
class UNetView(View):
    """A network with skip connections.

    Attributes:
        root: the module that stands for the full network.
        skips: from the deepest skip (the first one used) to the shallowest.
        timestep: name of the argument of `root.forward` that holds the noise level; None if there is none.
        encoder, middle, decoder: the stages in the order they run, where the network is made of such; else empty.
    """

    root: nn.Module
    skips: tuple[SkipSite, ...]
    timestep: str | None
    encoder: tuple[nn.Module, ...] = ()
    middle: nn.Module | None = None
    decoder: tuple[nn.Module, ...] = ()
    family: str = "unet"

    @property
    def stacks(self) -> dict[str, tuple[nn.Module, ...]]:  # type: ignore[override]
        """None: its sites are skips and stages."""
        return {}

    def _sites(self, kind: str) -> Iterator[Site]:
        if kind == "skip":
            for index, skip in enumerate(self.skips):
                yield Site(f"skip.{index}", kind, skip.joint, index)
        elif kind == "stage":
            middle = () if self.middle is None else (self.middle,)
            for index, stage in enumerate((*self.encoder, *middle, *self.decoder)):
                yield Site(f"stage.{index}", kind, stage, index)
        else:
            yield from super()._sites(kind)

    @property
    def config(self) -> Any:
        """Settings of the network; None for a network without."""
        return getattr(self.root, "config", None)


Finder = Callable[[Any], UNetView]
_DESCRIBED: dict[type, Finder] = {}


def describe_unet(cls: type[nn.Module]) -> Callable[[Finder], Finder]:
    """Decorator that makes a custom network known: the function turns an instance of `cls` into its `UNetView`.

    ```python
    @describe_unet(MyUNet)
    def _(unet):
        return UNetView(unet, (SkipSite(unet.up1, 0, 40, 80), SkipSite(unet.up2, 0, 20, 40)), timestep="t")
    ```
    """

    def add(finder: Finder) -> Finder:
        _DESCRIBED[cls] = finder
        return finder

    return add


def match(model: nn.Module) -> tuple[UNetView | None, str]:
    """Return the view of `model`, or None and the reason why it does not fit."""
    for module in model.modules():
        for base in type(module).__mro__:
            if base in _DESCRIBED:
                return _checked(_DESCRIBED[base](module)), ""
    for module in model.modules():
        stages = getattr(module, "up_blocks", None)
        if isinstance(stages, nn.ModuleList) and isinstance(getattr(module, "down_blocks", None), nn.ModuleList):
            return _image_unet(module, stages)
    joints = [m for m in model.modules() if isinstance(getattr(m, "skip_linear", None), nn.Linear)]
    if joints:
        return _token_unet(model, joints), ""
    return None, (
        "needs skip connections that are concatenated: a UNet of diffusers (down_blocks, up_blocks), a transformer "
        "with token skips (skip_linear), or a custom network described by `describe_unet`; "
        f"{type(model).__name__} has none"
    )


def _checked(view: UNetView) -> UNetView:
    names = inspect.signature(type(view.root).forward).parameters
    if view.timestep is not None and view.timestep not in names:
        raise ValueError(f"{type(view.root).__name__}.forward has no argument {view.timestep!r}; it has {list(names)}.")
    for index, skip in enumerate(view.skips):
        if not 0 <= skip.start < skip.stop <= skip.channels:
            raise ValueError(
                f"skip.{index} claims channels {skip.start} to {skip.stop} of {skip.channels}; expected "
                "0 <= start < stop <= channels."
            )
    return view


def _image_unet(root: nn.Module, stages: nn.ModuleList) -> tuple[UNetView | None, str]:
    hidden: Any = _channels_into_decoder(root)
    if hidden is None:
        return None, f"{type(root).__name__} does not tell how many channels enter its decoder"
    skips = []
    for number, stage in enumerate(stages):
        resnets = getattr(stage, "resnets", None)
        if not isinstance(resnets, nn.ModuleList):
            return None, f"{type(stage).__name__} of {type(root).__name__} has no `resnets`"
        for resnet in resnets:
            inner = getattr(resnet, "spatial_res_block", resnet)
            channels = getattr(inner, "in_channels", None)
            if channels is None or not hasattr(inner, "out_channels"):
                return None, f"{type(inner).__name__} of {type(root).__name__} does not tell its channels"
            if channels > hidden:
                norm, shortcut = getattr(inner, "norm1", None), getattr(inner, "conv_shortcut", None)
                skips.append(SkipSite(resnet, hidden, channels, channels, 1, number, norm, shortcut, fresh=True))
            hidden = inner.out_channels
    if not skips:
        return None, f"{type(root).__name__} concatenates no skip connections"
    return UNetView(
        root,
        tuple(skips),
        "timestep",
        tuple(root.down_blocks),  # type: ignore[arg-type]
        root.mid_block,  # type: ignore[arg-type]
        tuple(stages),
    ), ""


def _channels_into_decoder(root: nn.Module) -> int | None:
    for stage in (getattr(root, "mid_block", None), *reversed(root.down_blocks)):  # type: ignore[arg-type]
        resnets = getattr(stage, "resnets", None)
        if isinstance(resnets, nn.ModuleList) and len(resnets):
            last = resnets[-1]
            inner: Any = getattr(last, "spatial_res_block", last)
            return getattr(inner, "out_channels", None)
    return None


def _token_unet(model: nn.Module, joints: Sequence[nn.Module]) -> UNetView:
    skips = []
    for number, block in enumerate(joints):
        linear: Any = block.skip_linear
        norm: Any = getattr(block, "skip_norm", None)
        width = linear.in_features
        joint = norm if isinstance(norm, nn.Module) and _normalises(norm, width) else linear
        skips.append(SkipSite(joint, width // 2, width, width, -1, number))
    timed = [m for m in model.modules() if "timestep" in inspect.signature(type(m).forward).parameters]
    return UNetView(timed[0] if timed else model, tuple(skips), "timestep" if timed else None)


def _normalises(norm: nn.Module, width: Any) -> bool:
    return tuple(getattr(norm, "normalized_shape", ())) == (width,)
