"""Labelled images: folders, CIFAR- and MNIST-format files, npz arrays, and a generated set with object masks.

Images are RGB uint8 [H, W, 3] until a batch is made; a batch holds `image` [B, 3, H, W] in [0, 1] and `label` [B]
(diffusion models ask for other channels and [-1, 1], see `ImageData`).
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mmskip.datasets.common.pixels import to_input

EMBEDDED = "embedded"
SHAPES = ("disc", "square", "triangle", "ring", "cross", "bars")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass
class ImageSet:
    """Images with labels.

    Attributes:
        read: the image of an index, uint8 [H, W, 3].
        labels: class indices.
        class_names: one per class.
        objects: boolean [N, H, W], True on the object, where known.
        source: where they come from.
    """

    read: Callable[[int], np.ndarray]
    labels: list[int]
    class_names: list[str]
    objects: np.ndarray | None
    source: str

    def __len__(self) -> int:
        return len(self.labels)


def open_images(source: str | Path, split: str = "val", count: int = 512, size: int = 32) -> ImageSet:
    """Open a labelled set.

    Args:
        source: a folder of class folders (or with `split`/ in it), a folder with labels.csv (columns file,
            class_index), a folder of CIFAR-10's binary files (*.bin) or of MNIST's (*-images-idx3-ubyte, .gz or not),
            an .npz with `images` and `labels`, or "embedded": a generated set.
        split: of a source that has splits.
        count, size: images and side in pixels of the generated set.

    Raises:
        ValueError: nothing of that kind is there.
    """
    if str(source) == EMBEDDED:
        return embedded_images(count, size, split)
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        return _npz(path)
    if not path.is_dir():
        raise ValueError(f"{source} is neither a folder nor an .npz file; expected one of these, or {EMBEDDED!r}.")
    if (path / "labels.csv").is_file():
        return _listed(path)
    if list(path.glob("*.bin")):
        return _cifar(path, split)
    if list(path.glob("*-images*idx3-ubyte*")):
        return _mnist(path, split)
    return _class_folders(path / split if (path / split).is_dir() else path)


def _load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _listed(path: Path) -> ImageSet:
    with (path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file", "class_index"} <= rows[0].keys():
        raise ValueError(f"{path / 'labels.csv'} lacks the columns file and class_index.")
    labels = [int(row["class_index"]) for row in rows]
    names = {label: row.get("name") or str(label) for label, row in zip(labels, rows, strict=True)}
    files = [path / row["file"] for row in rows]
    class_names = [names.get(i, str(i)) for i in range(max(labels) + 1)]
    return ImageSet(lambda i: _load(files[i]), labels, class_names, None, str(path))


def _class_folders(path: Path) -> ImageSet:
    classes = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    found = [
        (file, index)
        for index, name in enumerate(classes)
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise ValueError(
            f"{path} holds no images in class folders, no labels.csv and no *.bin files of CIFAR-10's binary version "
            "(its pickled version is not read: unpickling runs code)."
        )
    return ImageSet(lambda i: _load(found[i][0]), [label for _, label in found], classes, None, str(path))


def _cifar(path: Path, split: str) -> ImageSet:
    pattern = "data_batch_*.bin" if split == "train" else "test_batch.bin"
    files = sorted(path.glob(pattern))
    if not files:
        raise ValueError(f"{path} has no {pattern}, which the {split} split of CIFAR-10's binary version needs.")
    rows = np.concatenate([np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, 3073) for file in files])
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = path / "batches.meta.txt"
    class_names = names.read_text().split() if names.is_file() else [str(i) for i in range(10)]
    return ImageSet(lambda i: images[i], rows[:, 0].tolist(), class_names, None, str(path))


def _mnist(path: Path, split: str) -> ImageSet:
    prefix = "train" if split == "train" else "t10k"
    found = [sorted(path.glob(f"{prefix}-{kind}*ubyte*")) for kind in ("images", "labels")]
    if not all(found):
        raise ValueError(
            f"{path} has no {prefix}-images-idx3-ubyte and {prefix}-labels-idx1-ubyte (.gz or not), which the {split} "
            "split of MNIST's format needs."
        )
    images, labels = (_idx(files[0]) for files in found)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{found[0][0]} holds {images.shape} and {found[1][0]} {labels.shape}; expected [N, H, W], [N]."
        )
    names = [str(i) for i in range(int(labels.max()) + 1)]
    return ImageSet(lambda i: images[i][..., None].repeat(3, -1), labels.tolist(), names, None, str(path))


def _idx(path: Path) -> np.ndarray:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    dims = content[3] if len(content) > 3 and content[:3] == b"\x00\x00\x08" else 0
    shape = tuple(np.frombuffer(content, ">i4", dims, 4).tolist()) if dims and len(content) >= 4 + 4 * dims else ()
    if not shape or len(content) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"{path} is no idx file of unsigned bytes, or is cut short; download it again.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _npz(path: Path) -> ImageSet:
    with np.load(path, allow_pickle=False) as arrays:
        if not {"images", "labels"} <= set(arrays.files):
            raise ValueError(f"{path} holds {', '.join(arrays.files)}; expected images and labels.")
        images, labels = arrays["images"], arrays["labels"].astype(int).tolist()
        named = "class_names" in arrays.files
        names = [str(n) for n in arrays["class_names"]] if named else [str(i) for i in range(max(labels) + 1)]
    if images.ndim == 3:
        images = images[..., None].repeat(3, -1)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(labels):
        raise ValueError(
            f"{path}: images {images.shape} {images.dtype} and {len(labels)} labels; expected uint8 [N, H, W] or "
            "[N, H, W, 3] with one label each."
        )
    return ImageSet(lambda i: images[i], labels, names, None, str(path))


# --- the generated set ----------------------------------------------------------------------------------------------


def embedded_images(count: int, size: int = 32, split: str = "train", seed: int = 0) -> ImageSet:
    """Textured shapes on textured ground; the class is the shape, colours and places are random.

    Raises:
        ValueError: fewer than one image, or smaller than 16 pixels.
    """
    if count < 1 or size < 16:
        raise ValueError(f"count is {count} and size {size}; expected at least 1 image of at least 16 pixels.")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), size])
    images, masks, labels = [], [], []
    for index in range(count):
        label = index % len(SHAPES)
        image, mask = _draw(rng, SHAPES[label], size)
        images.append(image)
        masks.append(mask)
        labels.append(label)
    return ImageSet(lambda i: images[i], labels, list(SHAPES), np.stack(masks), f"{EMBEDDED}-{split}-{count}-{size}")


def _draw(rng: np.random.Generator, shape: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    radius = rng.uniform(0.25, 0.36) * size
    cx, cy = rng.uniform(radius, size - radius, 2)
    angle = rng.uniform(-0.4, 0.4)
    grid_y, grid_x = np.mgrid[:size, :size] + 0.5
    x, y = (grid_x - cx) / radius, (grid_y - cy) / radius
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    far, inside = np.hypot(x, y), np.maximum(abs(x), abs(y))
    mask = {
        "disc": far < 0.9,
        "square": inside < 0.8,
        "triangle": (y < 0.8) & (y > 2 * abs(x) - 0.9),
        "ring": (far < 1) & (far > 0.5),
        "cross": (inside < 0.95) & (np.minimum(abs(x), abs(y)) < 0.3),
        "bars": (inside < 0.9) & (np.floor(x * 2.7 + 9.5) % 2 == 1),
    }[shape]
    ground, paint = _texture(rng, size), _texture(rng, size)
    # a colour that differs enough from the ground for the shape to be seen
    shift = rng.choice([-1, 1], 3) * rng.uniform(50, 90, 3)
    image = np.where(mask[..., None], ground.mean((0, 1)) + shift + (paint - paint.mean((0, 1))) * 0.4, ground)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    coarse = torch.from_numpy(rng.uniform(-35, 35, (1, 3, 5, 5)))
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()
    return rng.uniform(90, 165, 3) + smooth + rng.normal(0, 8, (size, size, 3))


# --- batches --------------------------------------------------------------------------------------------------------


class LabelledImages(Dataset[dict[str, Any]]):
    """An `ImageSet` as a dataset.

    Args:
        images: the set.
        size: side of the inputs, pixels.
        resize: see `to_input`.
        flip: flip half of the images, at random.
        channels: 3, or 1 for grey.
        signed: pixels in [-1, 1] instead of [0, 1].
    """

    def __init__(
        self,
        images: ImageSet,
        size: int,
        resize: int | None = None,
        flip: bool = False,
        channels: int = 3,
        signed: bool = False,
    ) -> None:
        self.images, self.size, self.resize, self.flip = images, size, resize, flip
        self.channels, self.signed = channels, signed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = to_input(self.images.read(index), self.resize, self.size)
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(-1)
        if self.channels == 1:
            x = x.mean(0, keepdim=True)
        if self.signed:
            x = 2 * x - 1
        return {"image": x, "label": self.images.labels[index]}


class ImageData(LightningDataModule):
    """Training and validation images.

    Args:
        source: see `open_images`; "embedded": the generated set.
        val_source: None: the `val` split of the source.
        image_size: side of the inputs, pixels.
        resize: short side before the middle is cut out; None: the uncropped image is resized.
        flip: flip training images at random.
        batch_size: images per step.
        num_workers: loader processes.
        train_count, val_count: images of the generated set.
        generated_size: side of the generated images, pixels; None: `image_size`. Smaller ones are enlarged.
        channels: 3, or 1 for grey.
        signed: pixels in [-1, 1], as diffusion models take them, instead of [0, 1].

    Raises:
        ValueError: a size out of range.
    """

    def __init__(
        self,
        source: str = EMBEDDED,
        val_source: str | None = None,
        image_size: int = 32,
        resize: int | None = None,
        flip: bool = True,
        batch_size: int = 64,
        num_workers: int = 0,
        train_count: int = 3000,
        val_count: int = 480,
        generated_size: int | None = None,
        channels: int = 3,
        signed: bool = False,
    ) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels}; expected 3 (colour) or 1 (grey).")
        for name, value in (("image_size", image_size), ("batch_size", batch_size), ("train_count", train_count)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        self.source, self.val_source = source, val_source
        self.image_size, self.resize, self.flip = image_size, resize, flip
        self.batch_size, self.num_workers = batch_size, num_workers
        self.counts = {"train": train_count, "val": val_count}
        self.generated_size, self.channels, self.signed = generated_size or image_size, channels, signed
        self.sets: dict[str, ImageSet] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the sets, once.

        Raises:
            ValueError: the two sets have other classes.
        """
        if self.sets:
            return
        for split, source in (("train", self.source), ("val", self.val_source or self.source)):
            self.sets[split] = open_images(source, split, self.counts[split], self.generated_size)
        train, val = (self.sets[split].class_names for split in ("train", "val"))
        if train != val:
            raise ValueError(f"the training images have classes {train[:5]}..., the validation images {val[:5]}...")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes."""
        self.setup()
        return self.sets["train"].class_names

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches in random order."""
        return self._loader("train", True)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches in order."""
        return self._loader("val", False)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """The validation images."""
        return self.val_dataloader()

    def _loader(self, split: str, shuffle: bool) -> DataLoader[dict[str, Any]]:
        images = LabelledImages(
            self.sets[split], self.image_size, self.resize, self.flip and shuffle, self.channels, self.signed
        )
        return DataLoader(images, self.batch_size, shuffle=shuffle, num_workers=self.num_workers)


def batch_of(images: ImageSet, indices: Sequence[int], size: int, resize: int | None) -> tuple[Tensor, Tensor]:
    """Images [B, 3, size, size] in [0, 1] and labels [B]."""
    x = torch.stack([to_input(images.read(i), resize, size) for i in indices])
    return x, torch.tensor([images.labels[i] for i in indices])
