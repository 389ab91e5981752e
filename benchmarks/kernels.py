"""The shared kernels on this device: parity with the naive reference, and time against the plain way of doing it.

    python benchmarks/kernels.py [--device cuda] [--pairs 31]

Select and merge are compared with `gather` / `scatter` on an index expanded over the width; ragged attention with
masked attention on samples padded to one length and, on CUDA, with FlexAttention on packed samples. The shapes are
small on a CPU and those of Llama-3-8B on CUDA (`SHAPES`). On CUDA the same operations also run with `MMSKIP_OPS=torch`,
which shows where xFormers wins: this is the record that verifies the xFormers paths. The result goes to
`benchmarks/results/kernels_<device type>.json`.
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.measure import emit, interleaved_ratio
from mmskip.env import device_name, operation_paths
from mmskip.ops.attention import last_queries_mask, pad_segments, ragged_attention, ragged_attention_naive
from mmskip.ops.backend import ENV_VAR
from mmskip.ops.tokens import merge_tokens, merge_tokens_naive, select_tokens, select_tokens_naive
from mmskip.utils.command import CommandParser


@dataclass(frozen=True)
class Shape:
    """Sizes: `batch` rows of `tokens` tokens of `width`, `slots` kept; `lens` tokens of each packed sample, attention
    with `heads` query heads over `kv_heads` key heads of `head` numbers."""

    batch: int
    tokens: int
    width: int
    slots: int
    lens: tuple[int, ...]
    heads: int
    kv_heads: int
    head: int


SHAPES = {
    "tiny": Shape(2, 40, 16, 11, (20, 7, 3), 4, 2, 16),
    "cpu": Shape(2, 1100, 512, 300, (300, 120, 40, 20), 8, 8, 64),
    "cuda": Shape(2, 4352, 4096, 1100, (3200, 1100, 700, 2400), 32, 8, 128),
}


def max_difference(outputs: tuple[Tensor, Tensor], inputs: tuple[list[Tensor], list[Tensor]]) -> float:
    """Largest absolute difference of two outputs and of their gradients."""
    weight = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0)).to(outputs[0].device)
    grads = [torch.autograd.grad(out, xs, weight.to(out.dtype)) for out, xs in zip(outputs, inputs, strict=True)]
    pairs = [outputs, *zip(*grads, strict=True)]
    return max((a.detach().double() - b.detach().double()).abs().max().item() for a, b in pairs)


def kept_positions(batch: int, tokens: int, slots: int, device: torch.device) -> Tensor:
    """Random sorted positions `[batch, slots]`."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(tokens, generator=generator)[:slots].sort().values for _ in range(batch)]
    return torch.stack(rows).to(device)


def tokens_parity(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of a gated select-merge round trip from the naive loop in float64."""
    torch.manual_seed(0)
    x, gate = torch.randn(2, 37, 64, device=device, dtype=dtype), torch.rand(2, 11, device=device)
    index = kept_positions(2, 37, 11, device)
    fast = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
    naive = [x.double().requires_grad_(), gate.double().requires_grad_()]
    out = merge_tokens(fast[0], select_tokens(fast[0], index) * 2, index, fast[1])
    want = merge_tokens_naive(naive[0], select_tokens_naive(naive[0], index) * 2, index, naive[1])
    return max_difference((out, want), (fast, naive))


def attention_parity(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of windowed ragged attention from the naive loop in float64."""
    torch.manual_seed(0)
    q_lens, kv_lens = [5, 0, 9, 1], [5, 3, 12, 7]
    shapes = [(sum(q_lens), 4, 64), (sum(kv_lens), 2, 64), (sum(kv_lens), 2, 64)]
    fast = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
    naive = [x.detach().double().requires_grad_() for x in fast]
    out = ragged_attention(*fast, q_lens, kv_lens, window=6)
    want = ragged_attention_naive(*naive, q_lens, kv_lens, window=6)
    return max_difference((out, want), (fast, naive))


def over_torch(ours: Callable[[], None], pairs: int, device: torch.device) -> dict[str, Any] | None:
    """Speedup of the path that runs here over the torch path; None if it is the torch path."""
    if all(path.name == "torch" for path in operation_paths(device).values()):
        return None
    before = os.environ.get(ENV_VAR, "auto")

    def torch_path() -> None:
        os.environ[ENV_VAR] = "torch"
        try:
            ours()
        finally:
            os.environ[ENV_VAR] = before

    return dataclasses.asdict(interleaved_ratio(torch_path, ours, pairs))


def time_tokens(shape: Shape, pairs: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Select, merge with a gate, and backward; the ideal is one dense copy forward and one backward."""
    torch.manual_seed(0)
    size = (shape.batch, shape.tokens, shape.width)
    x = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    gate = torch.rand(shape.batch, shape.slots, device=device, dtype=dtype, requires_grad=True)
    index = kept_positions(shape.batch, shape.tokens, shape.slots, device)
    grad = torch.randn(size, device=device, dtype=dtype)

    def plain() -> None:
        wide = index.unsqueeze(-1).expand(-1, -1, shape.width)
        kept = x.gather(1, wide)
        out = x.scatter(1, wide, torch.lerp(x.gather(1, wide), kept * 2, gate.unsqueeze(-1)))
        torch.autograd.grad(out, (x, gate), grad)

    def ours() -> None:
        out = merge_tokens(x, select_tokens(x, index) * 2, index, gate)
        torch.autograd.grad(out, (x, gate), grad)

    def two_copies() -> None:
        x.detach().clone()
        grad.clone()

    ratio = interleaved_ratio(plain, ours, pairs)
    ideal = interleaved_ratio(plain, two_copies, pairs).median
    return {**dataclasses.asdict(ratio), "ideal": ideal, "over_torch": over_torch(ours, pairs, device)}


def time_attention(
    shape: Shape, pairs: int, device: torch.device, dtype: torch.dtype, window: int | None
) -> dict[str, Any]:
    """Forward and backward over samples of different lengths; the ideal counts query-key pairs."""
    torch.manual_seed(0)
    lens, repeats = shape.lens, shape.heads // shape.kv_heads
    packed = [
        torch.randn(sum(lens), heads, shape.head, device=device, dtype=dtype, requires_grad=True)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    padded = [pad_segments(x.detach(), lens).transpose(1, 2).requires_grad_() for x in packed]
    mask = last_queries_mask(lens, lens, window, device)
    mask = (mask | torch.eye(*mask.shape[1:], dtype=torch.bool, device=device)).unsqueeze(1)

    def masked() -> None:
        q, k, v = padded
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum(), padded)

    def ours() -> None:
        torch.autograd.grad(ragged_attention(*packed, lens, lens, window=window).sum(), packed)

    dense = len(lens) * max(lens) ** 2
    reach = max(lens) if window is None else window
    needed = sum(min(i + 1, reach) for n in lens for i in range(n))
    result = {**dataclasses.asdict(interleaved_ratio(masked, ours, pairs)), "ideal": dense / needed, "window": window}
    result["over_torch"] = over_torch(ours, pairs, device)
    if device.type == "cuda":
        flex = flex_step(shape, packed, window)
        result["over_flex"] = dataclasses.asdict(interleaved_ratio(flex, ours, pairs))
    return result


def flex_step(shape: Shape, packed: list[Tensor], window: int | None) -> Callable[[], None]:
    """Build the same attention by a compiled FlexAttention on the packed samples."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, total = packed[0].device, sum(shape.lens)
    sample = torch.repeat_interleave(
        torch.arange(len(shape.lens), device=device), torch.tensor(shape.lens, device=device)
    )
    reach = total if window is None else window

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (sample[q] == sample[k]) & (k <= q) & (q - k < reach)

    block_mask = create_block_mask(allowed, None, None, total, total, device=device)
    attend = torch.compile(flex_attention)

    def step() -> None:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in packed)
        torch.autograd.grad(attend(q, k, v, block_mask=block_mask, enable_gqa=True).sum(), packed)

    return step


def time_decoding(shape: Shape, pairs: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """One query per sample over caches of different lengths, forward only; the ideal counts query-key pairs."""
    torch.manual_seed(0)
    lens, ones, repeats = shape.lens, (1,) * len(shape.lens), shape.heads // shape.kv_heads
    q = torch.randn(len(lens), shape.heads, shape.head, device=device, dtype=dtype)
    k, v = (torch.randn(sum(lens), shape.kv_heads, shape.head, device=device, dtype=dtype) for _ in range(2))
    padded = [pad_segments(x, n).transpose(1, 2) for x, n in ((q, ones), (k, lens), (v, lens))]
    mask = last_queries_mask(ones, lens, None, device).unsqueeze(1)

    def masked() -> None:
        keys, values = (x.repeat_interleave(repeats, dim=1) for x in padded[1:])
        F.scaled_dot_product_attention(padded[0], keys, values, attn_mask=mask)

    def ours() -> None:
        ragged_attention(q, k, v, ones, lens)

    with torch.inference_mode():
        ratio = interleaved_ratio(masked, ours, pairs)
        torch_ratio = over_torch(ours, pairs, device)
    ideal = len(lens) * max(lens) / sum(lens)
    return {**dataclasses.asdict(ratio), "ideal": ideal, "over_torch": torch_ratio}


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a shape that only shows that the script runs")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--out", help="result file (default: benchmarks/results/kernels_DEVICE.json)")
    args = parser.parse_args()
    device, shape = torch.device(args.device), SHAPES["tiny" if args.tiny else args.device]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parity = {
        str(each).removeprefix("torch."): {
            "tokens": tokens_parity(device, each),
            "attention": attention_parity(device, each),
        }
        for each in (torch.float32, torch.bfloat16)
    }
    print(f"largest difference from the naive float64 reference: {parity}")
    tokens = time_tokens(shape, args.pairs, device, dtype)
    print(f"select + merge: {tokens['median']:.2f}x of gather / scatter (a plain copy: {tokens['ideal']:.2f}x)")
    results: dict[str, Any] = {
        "attention": time_attention(shape, args.pairs, device, dtype, None),
        "attention_windowed": time_attention(shape, args.pairs, device, dtype, max(shape.lens) // 4),
        "decoding": time_decoding(shape, args.pairs, device, dtype),
    }
    for name, row in results.items():
        print(f"{name}: {row['median']:.2f}x of padded attention (counted: {row['ideal']:.2f}x)")
    emit(
        {
            "name": f"kernels_{device.type}",
            "speedup": tokens["median"],
            "ideal": tokens["ideal"],
            "device": device_name(device),
            "shape": dataclasses.asdict(shape),
            "tokens": tokens,
            **results,
            "max_difference": parity,
            "paths": {name: dataclasses.asdict(path) for name, path in operation_paths(device).items()},
        },
        args.out,
    )


if __name__ == "__main__":
    main()
