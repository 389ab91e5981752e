"""The missingness report on really trained networks: which masking suits each of them?

    python benchmarks/masking_checkpoints.py [--limit 2000] [--only cifar10_resnet20 ...] [--fractions 0.3 0.5 0.7]

Writes benchmarks/results/masking_checkpoints.json. Finished parts are kept in --parts, so an interrupted run resumes
where it stopped; delete the folder after a change of the library. Each network can also be reported on alone:

    python evaluate.py masking --model benchmarks/masking_checkpoints.py:imagenet_mobilenetv2 \\
        --images ../shared/data/imagenet1000
"""

import argparse
import os
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mmskip.datasets.images import open_images
from mmskip.train.evaluation.classifier.masking import Loaded, default_patch, read_weights, sample
from mmskip.train.metrics.missingness import MASKINGS, ORDERS, Normalised, measure, table
from mmskip.utils.command import CommandParser
from mmskip.utils.results import ResumableResults

DATA = Path(os.environ.get("MMSKIP_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SIGNED = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


class CifarBlock(nn.Module):
    """Two convolutions and an option-A shortcut: every second position, and channels of zeros."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.added = stride, (width - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        s = self.stride
        return F.relu(y + F.pad(x[:, :, ::s, ::s], (0, 0, 0, 0, self.added, self.added)))


class CifarResNet(nn.Module):
    """The ResNet of 6 n + 2 layers for CIFAR."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, n, 1)
        self.layer2 = self._stage(16, 32, n, 2)
        self.layer3 = self._stage(32, 64, n, 2)
        self.linear = nn.Linear(64, 10)

    def _stage(self, inputs: int, width: int, count: int, stride: int) -> nn.Sequential:
        blocks = [CifarBlock(inputs, width, stride), *(CifarBlock(width, width, 1) for _ in range(count - 1))]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10]."""
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def _weights(name: str) -> dict[str, Tensor]:
    return read_weights(DATA / "cnn" / f"{name}.safetensors")


def _cifar(depth: int) -> Loaded:
    model = CifarResNet(depth)
    model.load_state_dict(_weights(f"cifar10_resnet{depth}"), strict=False)
    return Loaded(model, 32)


def cifar10_resnet20() -> Loaded:
    """CIFAR-10 ResNet-20."""
    return _cifar(20)


def cifar10_resnet44() -> Loaded:
    """CIFAR-10 ResNet-44."""
    return _cifar(44)


def cifar10_resnet56() -> Loaded:
    """CIFAR-10 ResNet-56."""
    return _cifar(56)


def imagenet_mobilenetv2() -> Loaded:
    """ImageNet MobileNetV2 1.0 at 224 px."""
    model = timm.create_model("mobilenetv2_100", pad_type="same")
    model.load_state_dict(_weights("imagenet_mobilenetv2_100"), strict=False)
    return Loaded(model, 224, 256, **SIGNED)


def imagenet_mobilenetv1() -> Loaded:
    """ImageNet MobileNetV1 0.5 at 160 px."""
    model = timm.models.efficientnet._gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.5, pad_type="same")
    model.load_state_dict(_weights("imagenet_mobilenetv1_050_160"), strict=False)
    return Loaded(model, 160, 183, **SIGNED)


def imagenet_squeezenet() -> Loaded:
    """ImageNet SqueezeNet 1.0 (pruned weights) at 224 px."""
    model = torchvision.models.squeezenet1_0(weights=None)
    model.load_state_dict(_weights("imagenet_squeezenet1_0_deepcompression"), strict=False)
    mean = tuple(value / 255 for value in (123, 117, 104))
    return Loaded(model, 224, 224, mean, (1 / 255,) * 3)


NETWORKS = {
    "cifar10_resnet20": (cifar10_resnet20, "cifar10/cifar10_test_jpeg_2000.npz"),
    "cifar10_resnet44": (cifar10_resnet44, "cifar10/cifar10_test_jpeg_2000.npz"),
    "cifar10_resnet56": (cifar10_resnet56, "cifar10/cifar10_test_jpeg_2000.npz"),
    "imagenet_mobilenetv2": (imagenet_mobilenetv2, "imagenet1000"),
    "imagenet_mobilenetv1": (imagenet_mobilenetv1, "imagenet1000"),
    "imagenet_squeezenet": (imagenet_squeezenet, "imagenet1000"),
}


def main() -> None:
    """Report on every network and print one JSON line."""
    from common.measure import emit

    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=2000, help="images per network (default: all)")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=["random"])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--parts", default="runs/masking_checkpoints", help="folder of finished parts")
    args = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"there is no {DATA}; set MMSKIP_SHARED_DATA to the folder with cnn/, cifar10/, imagenet1000/")
    results: dict[str, Any] = {}
    for name in args.only:
        build, images = NETWORKS[name]
        loaded = build()
        x, labels, objects = sample(open_images(DATA / images), loaded, args.limit, 0)
        model = Normalised(loaded.model, loaded.mean, loaded.std).eval()
        patch = default_patch(loaded.size)
        parts = ResumableResults(Path(args.parts) / f"{name}-{len(x)}-{patch}px.json")
        report = measure(model, x, labels, objects, MASKINGS, args.fractions, args.orders, patch, recall=parts.once)
        print(f"== {name}, patches of {patch} px\n{table(report)}\n", flush=True)
        results[name] = {"patch": patch, **report.to_dict()}
    emit(
        {
            "name": "masking_checkpoints",
            "speedup": None,
            "ideal": None,
            "shape": {"images": args.limit, "fractions": args.fractions, "orders": args.orders},
            "recommended": {name: report["recommended"] for name, report in results.items()},
            "reports": results,
        }
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
