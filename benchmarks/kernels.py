"""The shared kernels on this device: parity with the naive reference, and time against the plain way of doing it.

    python benchmarks/kernels.py [--shape 2 1100 512 --slots 300] [--pairs 31]

Select and merge are compared with `gather` / `scatter` on an index expanded over the width, ragged attention with
masked attention on samples padded to one length. On a CUDA device this is the record that verifies the xFormers
paths; the result goes to `benchmarks/results/kernels_<device type>.json`.
"""

import argparse
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from _measure import emit, interleaved_ratio
from torch import Tensor

from mmskip.env import operation_paths
from mmskip.ops.attention import last_queries_mask, pad_segments, ragged_attention, ragged_attention_naive
from mmskip.ops.tokens import merge_tokens, merge_tokens_naive, select_tokens, select_tokens_naive


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


def time_tokens(shape: tuple[int, int, int], slots: int, pairs: int, device: torch.device) -> dict[str, Any]:
    """Select, merge with a gate, and backward; the ideal is one dense copy forward and one backward."""
    torch.manual_seed(0)
    x = torch.randn(shape, device=device, requires_grad=True)
    gate = torch.rand(shape[0], slots, device=device, requires_grad=True)
    index = kept_positions(shape[0], shape[1], slots, device)
    grad = torch.randn(shape, device=device)

    def plain() -> None:
        wide = index.unsqueeze(-1).expand(-1, -1, shape[2])
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
    return {"shape": [*shape, slots], **dataclasses.asdict(ratio), "ideal": ideal}


def time_attention(pairs: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward over samples of different lengths; the ideal counts query-key pairs."""
    torch.manual_seed(0)
    q_lens, kv_lens, heads, width = (300, 120, 40, 20), (300, 120, 40, 20), 8, 64
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(sum(lens), heads, width) for lens in (q_lens, kv_lens, kv_lens)]
    packed = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    padded = [
        pad_segments(x.detach(), lens).transpose(1, 2).requires_grad_()
        for x, lens in zip(packed, (q_lens, kv_lens, kv_lens), strict=True)
    ]
    mask = last_queries_mask(q_lens, kv_lens, None, device)
    mask = (mask | torch.eye(*mask.shape[1:], dtype=torch.bool, device=device)).unsqueeze(1)

    def masked() -> None:
        out = F.scaled_dot_product_attention(*padded, attn_mask=mask)
        torch.autograd.grad(out.sum(), padded)

    def ours() -> None:
        torch.autograd.grad(ragged_attention(*packed, q_lens, kv_lens).sum(), packed)

    dense = len(q_lens) * max(q_lens) * max(kv_lens)
    needed = sum(n * (2 * m - n + 1) // 2 for n, m in zip(q_lens, kv_lens, strict=True))
    ratio = interleaved_ratio(masked, ours, pairs)
    return {"q_lens": q_lens, "kv_lens": kv_lens, **dataclasses.asdict(ratio), "ideal": dense / needed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(2, 1100, 512), metavar=("B", "T", "D"))
    parser.add_argument("--slots", type=int, default=300, help="kept tokens per sample")
    parser.add_argument("--pairs", type=int, default=31)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parity = {
        str(dtype).removeprefix("torch."): {
            "tokens": tokens_parity(device, dtype),
            "attention": attention_parity(device, dtype),
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    tokens = time_tokens(tuple(args.shape), args.slots, args.pairs, device)
    attention = time_attention(args.pairs, device)
    print(f"largest difference from the naive float64 reference: {parity}")
    print(f"select + merge: {tokens['median']:.2f}x of gather / scatter (a plain copy: {tokens['ideal']:.2f}x)")
    print(f"ragged attention: {attention['median']:.2f}x of padded attention (counted: {attention['ideal']:.2f}x)")
    emit(
        {
            "name": f"kernels_{device.type}",
            "speedup": tokens["median"],
            "ideal": tokens["ideal"],
            "shape": tokens["shape"],
            "tokens": tokens,
            "attention": attention,
            "max_difference": parity,
            "paths": {name: dataclasses.asdict(path) for name, path in operation_paths(device).items()},
        }
    )


if __name__ == "__main__":
    main()
