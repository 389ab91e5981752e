"""Shared by `mmskip evaluate fid` and `mmskip search skip`: image samplers, methods in files, real images, scores.

Shapes: N images, C channels, H and W pixels, F features.
"""

import argparse
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmskip.config import MethodConfig
from mmskip.datasets.common.pixels import to_input
from mmskip.datasets.images import EMBEDDED, ImageData, ImageSet, open_images
from mmskip.datasets.video.features import fingerprint
from mmskip.models.diffusion.samplers import SAMPLERS, ImageSampler
from mmskip.registry import config_types
from mmskip.train.load_run import TrainedRun, find_run, load_data
from mmskip.train.metrics.feature_nets import KINDS, FeatureNet
from mmskip.train.metrics.frechet import FeatureStatistics, frechet_distance, kernel_distance, precision_recall
from mmskip.utils.deprecated import renamed_names
from mmskip.utils.files import atomic_path, write_json
from mmskip.utils.user_function import call_function


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the network, the features, and the real images."""
    parser.add_argument("--features", required=True, help=KINDS)
    parser.add_argument("--real", help="real images: folder, .npz or embedded (default: those of the run)")
    parser.add_argument("--split", default="train", help="of the real images (default train)")
    parser.add_argument("--real_count", type=int, help="real images, drawn at random (default: all)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="heun")
    parser.add_argument("--guidance", type=float, default=1.0, help="weight of the class condition (default 1)")
    parser.add_argument("--batch_size", type=int, default=250, help="images at a time (default 250)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--cache", default="data/features", help="folder of the real images' features")


def device_of(given: str) -> torch.device:
    """The device that the arguments name."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if given == "auto" else given)


@dataclass(frozen=True)
class LoadedSampler:
    """An image sampler and where it comes from.

    Attributes:
        image_sampler: see there.
        name: identifies the network and its weights.
        run: its training run; None for a custom network.
    """

    image_sampler: ImageSampler
    name: str
    run: TrainedRun | None

    @property
    def folder(self) -> Path:
        """Folder of its results."""
        return self.run.folder if self.run is not None else Path("runs") / self.name.replace(":", "_")


def load_sampler(given: str, guidance: float = 1.0, device: str | torch.device = "cpu") -> LoadedSampler:
    """Load the sampler of a run of `models/diffusion/module.py`, or FILE.py:FUNCTION that returns a
    `mmskip.models.diffusion.samplers.ImageSampler`.

    Raises:
        ValueError: nothing of that kind.
    """
    file, _, function = given.partition(":")
    if file.endswith(".py"):
        image_sampler = call_function(Path(file), function)
        if not isinstance(image_sampler, ImageSampler):
            raise ValueError(f"{given} returned {type(image_sampler).__name__}; expected an ImageSampler.")
        image_sampler.unet.to(device)
        return LoadedSampler(image_sampler, f"{Path(file).stem}:{function}", None)
    from mmskip.models.diffusion.module import Diffusion

    run = find_run(given)
    try:
        model = Diffusion.load_from_checkpoint(run.checkpoint, map_location="cpu", weights_only=True)
    except (TypeError, RuntimeError, KeyError) as error:
        raise ValueError(f"{run.checkpoint} is no checkpoint of a Diffusion ({str(error).splitlines()[0]}).") from error
    return LoadedSampler(
        model.to(device).eval().image_sampler(guidance), f"diffusion:{fingerprint(run.checkpoint)}", run
    )


def read_method(path: str | Path) -> Any:
    """The method config in a JSON file {"type": ..., "config": {...}}, as `write_method` writes it.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        entry = json.loads(Path(path).read_text())
        kind, values = entry["type"], entry["config"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no method; expected JSON like {{'type': 'SkipScaleConfig', 'config': {{'scale': 0.8}}}} "
            f"({error!r})."
        ) from error
    types: dict[str, Any] = config_types()
    if kind not in types:
        raise ValueError(f"{path} names {kind!r}; this mmskip knows {', '.join(sorted(types))}.")
    return types[kind].from_dict(values)


def write_method(config: MethodConfig, path: str | Path, **further: Any) -> Path:
    """Write a method config so that `read_method` reads it, with `further` entries beside it; returns the path."""
    return write_json({"type": type(config).__name__, "config": config.to_dict(), **further}, path)


# --- real images ----------------------------------------------------------------------------------------------------


def real_images(arguments: argparse.Namespace, opened: LoadedSampler) -> tuple[ImageSet, str, int | None]:
    """The real images, a name that identifies them, and how they are resized.

    Raises:
        ValueError: none are given or found.
    """
    size, resize = opened.image_sampler.image_shape[-1], None
    source, count = arguments.real, arguments.real_count
    if count is not None and count < 2:
        raise ValueError(f"real_count is {count}; expected at least 2.")
    if source is None:
        if opened.run is None:
            raise ValueError("a custom network has no images: give --real FOLDER, .npz or embedded.")
        data = load_data(opened.run)
        if not isinstance(data, ImageData):
            raise ValueError(f"the run's data is {type(data).__name__}; give --real FOLDER, .npz or embedded.")
        source, resize, size = data.source, data.resize, data.generated_size
        if arguments.split != "train" and data.val_source:
            source = data.val_source
        count = count or data.counts["train" if arguments.split == "train" else "val"]
    images = open_images(source, arguments.split, count or 4000, size)
    name = images.source if source == EMBEDDED else f"{_digest(Path(source))}-{arguments.split}"
    return images, f"{name}-{resize}", resize


def _digest(source: Path) -> str:
    """Sixteen characters that identify a set of files: equal for equal names, sizes and dates."""
    if source.is_file():
        return fingerprint(source)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    described = [f"{path.relative_to(source)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def pixels(images: ImageSet, indices: list[int], shape: tuple[int, int, int], resize: int | None) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], of the shape the network draws."""
    x = torch.stack([to_input(images.read(i), resize, shape[-1]) for i in indices])
    return 2 * (x.mean(1, keepdim=True) if shape[0] == 1 else x) - 1


def reference_features(net: FeatureNet, arguments: argparse.Namespace, opened: LoadedSampler) -> Tensor:
    """Features [N, F] of the real images, read from the cache where they were made before.

    Raises:
        ValueError: no such images, or a feature network that does not fit them.
    """
    images, name, resize = real_images(arguments, opened)
    count, shape = min(arguments.real_count or len(images), len(images)), opened.image_sampler.image_shape
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    key = hashlib.sha256(f"{net.name} {name} {count} {shape}".encode()).hexdigest()[:24]
    path = Path(arguments.cache) / f"{key}.safetensors"
    if path.is_file():
        return load_file(str(path))["features"]
    parts = [net(pixels(images, chosen[i : i + 250], shape, resize)) for i in range(0, count, 250)]
    features = torch.cat(parts)
    with atomic_path(path) as partial:
        save_file({"features": features}, str(partial), {"network": net.name, "images": name})
    return features


# --- judging --------------------------------------------------------------------------------------------------------


class FidScorer:
    """Compares generated with real images.

    Args:
        net: the feature network.
        real_NF: features of the real images.

    Attributes:
        notes: warnings, each once.
    """

    def __init__(self, net: FeatureNet, real_NF: Tensor) -> None:
        self.net, self.real_NF = net, real_NF
        self.notes: list[str] = []
        self.statistics = self._statistics(real_NF)

    def _statistics(self, features_NF: Tensor) -> FeatureStatistics:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = FeatureStatistics.of(features_NF)
        for warning in caught:
            if str(warning.message) not in self.notes:
                self.notes.append(str(warning.message))
        return found

    def frechet(self, images_NCHW: Tensor) -> float:
        """Frechet distance of images in [-1, 1]."""
        return frechet_distance(self.statistics, self._statistics(self.net(images_NCHW)))

    def all(self, images_NCHW: Tensor) -> dict[str, float]:
        """Frechet distance, kernel distance, precision and recall."""
        features = self.net(images_NCHW)
        precision, recall = precision_recall(self.real_NF, features)
        return {
            "frechet": frechet_distance(self.statistics, self._statistics(features)),
            "kernel": kernel_distance(self.real_NF, features),
            "precision": precision,
            "recall": recall,
        }


__getattr__ = renamed_names(
    __name__,
    Drawer="ImageSampler",
    Judge="FidScorer",
    Opened="LoadedSampler",
    add_drawing_arguments="add_sampling_arguments",
    open_drawer="load_sampler",
)
