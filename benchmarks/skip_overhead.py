"""Cost of scales of 1 on the skip connections: forward passes with and without them, in interleaved pairs.

    python benchmarks/skip_overhead.py [--widths 16 32 48] [--size 16] [--batch 64] [--pairs 31]

Ends with one JSON line; `overhead` is the share of a forward pass (issue's limit: 0.01).
"""

from collections.abc import Sequence

import torch

import mmskip
from common import measure as _measure
from mmskip.families import find
from mmskip.models.diffusion.module import build_unet
from mmskip.utils.command import CommandParser


def main(given: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 128], help="channels by stage")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--out", help="file of the result (default: benchmarks/results/skip_overhead.json)")
    options = parser.parse_args(given)
    stages = len(options.widths)
    torch.manual_seed(0)
    settings = {
        "sample_size": options.size,
        "block_out_channels": options.widths,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * stages,
        "up_block_types": ["UpBlock2D"] * stages,
    }
    plain, scaled = build_unet(settings).eval(), build_unet(settings).eval()
    scaled.load_state_dict(plain.state_dict())
    mmskip.apply_(scaled, mmskip.SkipScaleConfig(scale=1.0))
    x, t = torch.randn(options.batch, 3, options.size, options.size), torch.full((options.batch,), 300)
    with torch.no_grad():
        equal = torch.equal(plain(x, t).sample, scaled(x, t).sample)
        ratio = _measure.interleaved_ratio(lambda: plain(x, t), lambda: scaled(x, t), options.pairs, warmup=3)
    result = {
        "name": "skip_overhead",
        **_measure.summary(ratio, 1.0),
        "overhead": round(1 / ratio.median - 1, 5),
        "bit_equal": equal,
        "shape": {
            "batch": options.batch,
            "size": options.size,
            "widths": options.widths,
            "skips": len(find(plain, ("unet",)).skips),
            "parameters": sum(p.numel() for p in plain.parameters()),
        },
    }
    _measure.emit(result, options.out)


if __name__ == "__main__":
    main()
