"""Layer masking: cost of a masked forward of a CNN beside the plain one.

    python benchmarks/layer_masking.py [--model resnet50] [--batch 8] [--size 224] [--pairs 15]

Half of the 16 x 16 patches of every image are hidden; a mask of ones is measured too. Every ratio is the median over
pairs of forwards in alternation in one process. `speedup` is plain time over masked time (1 means no cost).
"""

import argparse
from dataclasses import asdict
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mmskip
from common.measure import Ratio, emit, interleaved_ratio
from mmskip.utils.command import CommandParser


def half_of_patches(batch: int, size: int, patch: int = 16) -> Tensor:
    """Keep mask [B, 1, H, W] on the grid of patches, half of them hidden at random in each image."""
    count = (size // patch) ** 2
    order = torch.rand(batch, count, generator=torch.Generator().manual_seed(0)).argsort(1)
    return (order >= count // 2).reshape(batch, 1, size // patch, size // patch)


def measured(model: nn.Module, x: Tensor, mask: Tensor, config: mmskip.LayerMaskConfig, pairs: int) -> Ratio:
    """Time of a plain forward over that of a masked one, a new `masked` context each time."""

    def masked() -> None:
        with mmskip.masked(model, mask, config):
            model(x)

    return interleaved_ratio(lambda: model(x), masked, pairs)


def main() -> None:
    """Measure and print one JSON line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=False).eval().to(args.device)
    x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    half = half_of_patches(args.batch, args.size).to(args.device)
    cases = {
        "neighbour": (half, mmskip.LayerMaskConfig()),
        "none": (half, mmskip.LayerMaskConfig(padding="none")),
        "partial": (half, mmskip.LayerMaskConfig(padding="partial")),
        "ones": (torch.ones_like(half), mmskip.LayerMaskConfig()),
    }
    results: dict[str, Any] = {}
    with torch.inference_mode():
        for layout in ("contiguous", "channels_last"):
            if layout == "channels_last":
                model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            for name, (mask, config) in cases.items():
                ratio = measured(model, x, mask, config, args.pairs)
                results[f"{layout}/{name}"] = asdict(ratio)
                print(
                    f"{layout:<14} {name:<10} {1 / ratio.median:.3f} x the plain forward "
                    f"({1 / ratio.q3:.3f} to {1 / ratio.q1:.3f})"
                )
    main_case = results["contiguous/neighbour"]
    emit(
        {
            "name": "layer_masking",
            "model": args.model,
            "speedup": main_case["median"],
            "ideal": 1.0,
            "cost": {name: 1 / ratio["median"] for name, ratio in results.items()},
            "targets": {"contiguous/neighbour": 1.25, "contiguous/ones": 1.02},
            "ratios": results,
            "shape": {"batch": args.batch, "size": args.size, "patch": 16, "hidden": 0.5, "pairs": args.pairs},
        }
    )


if __name__ == "__main__":
    main()
