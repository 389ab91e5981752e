"""The networks in whose features generated and real images are compared; the user names one.

Shapes: N images, C channels, H and W pixels, F features.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmskip.datasets.video.features import fingerprint
from mmskip.utils.extras import require
from mmskip.utils.user_function import call_function

KINDS = (
    "a run or checkpoint of mmskip's Classifier; inception:FILE; open_clip:MODEL:FILE; timm:MODEL:FILE; "
    "MODULE.py:FUNCTION (returns an nn.Module from [N, 3, H, W] in [0, 1] to [N, F])"
)


@dataclass(frozen=True)
class FeatureNet:
    """A network that turns images into features.

    Attributes:
        name: identifies the network and its weights; statistics under one name are comparable.
        module: from images [N, 3, size, size] in [0, 1] to features [N, F].
        size: side of its input, pixels; images of another size are resized. None: as they come.
    """

    name: str
    module: nn.Module
    size: int | None

    @torch.no_grad()
    def __call__(self, images_NCHW: Tensor, batch_size: int = 250) -> Tensor:
        """Features [N, F], fp32 on the CPU, of images in [-1, 1]; grey images are given three equal channels.

        Raises:
            ValueError: images that are not [N, 1 or 3, H, W], or a network that cannot take them, gives no vectors, or
                answers the same to all.
        """
        if images_NCHW.dim() != 4 or images_NCHW.shape[1] not in (1, 3) or not len(images_NCHW):
            raise ValueError(f"got images {tuple(images_NCHW.shape)}; expected [N, 1 or 3, H, W] with N >= 1.")
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        parts = []
        for chunk in images_NCHW.split(batch_size):
            x = ((chunk.to(device).float() + 1) / 2).expand(-1, 3, -1, -1)
            if self.size is not None and x.shape[-2:] != (self.size, self.size):
                x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
            parts.append(self._features(x))
        features = torch.cat(parts)
        if len(features) > 1 and bool((features == features[0]).all()):
            raise ValueError(
                f"the feature network {self.name} gives the same features for all {len(features)} images; it does not "
                f"fit images of {tuple(images_NCHW.shape[2:])} pixels, or has no trained weights."
            )
        return features

    def _features(self, x_N3HW: Tensor) -> Tensor:
        try:
            features = self.module(x_N3HW)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(
                f"the feature network {self.name} does not fit images {tuple(x_N3HW.shape[1:])}: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(x_N3HW):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"the feature network {self.name} gave {got}; expected one vector per image, [N, F].")
        return features.float().cpu()


class Pooled(nn.Module):
    """Normalises images in [0, 1] and takes what `features` makes of them."""

    def __init__(
        self, net: nn.Module, features: Callable[[Tensor], Tensor], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.net, self.features = net, features
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean)).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(1, -1, 1, 1))

    def forward(self, x_N3HW: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> [N, F]."""
        return self.features((x_N3HW - self.mean) / self.std)


def open_feature_net(given: str, device: str | torch.device = "cpu") -> FeatureNet:
    """The feature network that `given` names.

    Raises:
        ValueError: nothing of that kind, or a file that is not there or does not hold such weights.
    """
    kind, _, rest = given.partition(":")
    if kind in ("inception", "open_clip", "timm"):
        model, _, file = rest.rpartition(":")
        if not file or (kind != "inception" and not model):
            raise ValueError(f"features is {given!r}; expected {KINDS}.")
        path = Path(file)
        if not path.is_file():
            raise ValueError(f"features is {given!r}: {file} is no file; download the weights once and name them here.")
        made, size = {"inception": _inception, "open_clip": _open_clip, "timm": _timm}[kind](path, model)
        name = f"{kind}:{model or 'v3'}:{fingerprint(path)}"
    elif kind.endswith(".py"):
        made, size, name = _own(Path(kind), rest)
    elif not rest and Path(given).exists():
        made, size, name = _classifier(given)
    else:
        raise ValueError(f"features is {given!r}; expected {KINDS}.")
    return FeatureNet(name, made.to(device).eval(), size)


def _classifier(given: str) -> tuple[nn.Module, int | None, str]:
    from mmskip.models.classifier import Classifier
    from mmskip.train.load_run import find_run

    checkpoint = find_run(given).checkpoint
    loaded = Classifier.from_checkpoint(str(checkpoint)).loaded()
    return _headless(loaded.model, loaded.mean, loaded.std), loaded.size, f"classifier:{fingerprint(checkpoint)}"


def _headless(net: Any, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    return Pooled(net, lambda x: net.forward_head(net.forward_features(x), pre_logits=True), mean, std)


def _timm(path: Path, model: str) -> tuple[nn.Module, int | None]:
    import timm

    from mmskip.train.evaluation.classifier.masking import read_weights

    if not timm.is_model(model):
        raise ValueError(f"timm has no model {model!r}.")
    net = timm.create_model(model, pretrained=False)
    _load(net, read_weights(path), path)
    config = timm.data.resolve_model_data_config(net)
    return _headless(net, config["mean"], config["std"]), config["input_size"][-1]


def _open_clip(path: Path, model: str) -> tuple[nn.Module, int | None]:
    import open_clip

    if model not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model!r}; `open_clip.list_models()` lists the models.")
    try:
        net: Any = open_clip.create_model(model, pretrained=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {model}: {str(error).splitlines()[0]}") from error
    mean, std = net.visual.image_mean, net.visual.image_std
    size = net.visual.image_size
    return Pooled(net, net.encode_image, mean, std), size[0] if isinstance(size, tuple) else size


def _inception(path: Path, model: str) -> tuple[nn.Module, int | None]:
    """Inception v3: torchvision's weights, or with torch-fidelity installed its weights of the usual FID."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if "fc.weight" in state and tuple(state["fc.weight"].shape) == (1008, 2048):
        fidelity = require("fid", "torch_fidelity.feature_extractor_inceptionv3", f"the Inception in {path}")
        net = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        # it resizes by itself, in the manner of the network's first publication
        return Pooled(net, lambda x: net((x * 255).to(torch.uint8))[0], (0, 0, 0), (1, 1, 1)), None
    import torchvision

    plain: Any = torchvision.models.inception_v3(weights=None, init_weights=False, transform_input=False)
    _load(plain, state, path)
    plain.fc = nn.Identity()
    return Pooled(plain, plain, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), 299


def _load(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"{path} does not hold the weights of {type(net).__name__}: {lines[:200]}") from error


def _own(path: Path, function: str) -> tuple[nn.Module, int | None, str]:
    module = call_function(path, function)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{path}:{function} returned {type(module).__name__}; expected an nn.Module.")
    digest = hashlib.sha256(path.read_bytes())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(
            name.encode() + tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return module, None, f"{path.stem}:{function}:{digest.hexdigest()[:16]}"
