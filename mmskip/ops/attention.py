"""Causal attention over ragged sequences, packed without padding.

A routed layer keeps a different number of tokens per sample and, over a key-value cache, fewer queries than keys.
Here the samples ("segments") stand one after the other in one list, with their lengths known on the host.

Shape suffixes: N all queries, M all keys, H query heads, G key heads (H is a multiple of G), K head width,
V value width, B segments, Q longest segment of queries, S longest segment of keys.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmskip.ops.backend import import_xformers, operation_path

LONG_PAIRS = 2**14
"""From this many query-key pairs in a padded segment on, one call per segment beats one call on padded segments:
measured on a CPU, forward and backward, 4 segments of 20 to 300 tokens (3x) and 32 segments of 20 (0.3x)."""
XFORMERS_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def ragged_attention(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention inside each of B packed segments.

    Without positions the queries of a segment are its last tokens: query i of n sees key j of m where
    `j <= i + m - n`. With positions a query sees the keys of its segment with `kv_pos <= q_pos`. A window keeps
    of these the ones with `q_pos - kv_pos < window`, in entries or in positions respectively.

    Args:
        q_NHK: queries `[sum(q_lens), H, K]`.
        k_MGK: keys `[sum(kv_lens), G, K]`; query head h reads key head `h // (H // G)`.
        v_MGV: values `[sum(kv_lens), G, V]`.
        q_lens: queries per segment, 0 allowed.
        kv_lens: keys per segment; at least as many as queries unless positions are given.
        q_positions: int `[sum(q_lens)]`, positions of the queries. Slower: only torch handles positions.
        kv_positions: int `[sum(kv_lens)]`, given together with `q_positions`.
        window: number of positions a query looks back on, itself included; at least 1. None: all.
        scale: factor of the scores; None: `1 / sqrt(K)`.

    Returns:
        `[sum(q_lens), H, V]`. A query that sees no key gets zeros.

    Raises:
        ValueError: lengths, shapes or positions that do not fit together.
    """
    _check(q_NHK, k_MGK, v_MGV, q_lens, kv_lens, q_positions, kv_positions, window)
    if q_NHK.shape[0] == 0:
        return q_NHK.new_zeros(0, q_NHK.shape[1], v_MGV.shape[-1])
    if q_positions is None and _xformers_takes(q_NHK, v_MGV):
        return _xformers_attention(q_NHK, k_MGK, v_MGV, q_lens, kv_lens, window, scale)
    mask_BQS = None
    if q_positions is not None and kv_positions is not None:
        q_BQ, kv_BS = pad_segments(q_positions, q_lens), pad_segments(kv_positions, kv_lens)
        mask_BQS = causal_mask(q_BQ, kv_BS, window) & _real_slots(q_lens, kv_lens, q_NHK.device)
    elif window is not None or tuple(q_lens) != tuple(kv_lens):
        mask_BQS = last_queries_mask(q_lens, kv_lens, window, q_NHK.device)
    return masked_attention(q_NHK, k_MGK, v_MGV, q_lens, kv_lens, mask_BQS, scale)


def ragged_attention_naive(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    q_positions: Tensor | None = None,
    kv_positions: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Reference of `ragged_attention`: one query and head at a time, gradients by autograd."""
    scale = 1 / math.sqrt(q_NHK.shape[-1]) if scale is None else scale
    group = q_NHK.shape[1] // k_MGK.shape[1]
    rows = []
    q_start = kv_start = 0
    for n, m in zip(q_lens, kv_lens, strict=True):
        for i in range(n):
            keys = []
            for j in range(m):
                if q_positions is None or kv_positions is None:
                    distance = i + m - n - j
                else:
                    distance = int(q_positions[q_start + i]) - int(kv_positions[kv_start + j])
                if 0 <= distance < (window or math.inf):
                    keys.append(kv_start + j)
            for h in range(q_NHK.shape[1]):
                if not keys:
                    rows.append(v_MGV.new_zeros(v_MGV.shape[-1]))
                    continue
                scores = k_MGK[keys, h // group] @ q_NHK[q_start + i, h] * scale
                rows.append(scores.softmax(0) @ v_MGV[keys, h // group])
        q_start, kv_start = q_start + n, kv_start + m
    shape = (*q_NHK.shape[:2], v_MGV.shape[-1])
    return torch.stack(rows).view(shape) if rows else v_MGV.new_zeros(shape)


def masked_attention(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    mask_BQS: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention over packed segments under any mask, by torch's scaled dot product attention.

    Short segments are padded to one length and go through one call, long ragged ones through a call each.

    Args:
        q_NHK: as in `ragged_attention`, like `k_MGK`, `v_MGV`, `q_lens`, `kv_lens` and `scale`.
        mask_BQS: bool, True where a query sees a key, False in all padding. None: causal, for equal lengths.

    Returns:
        `[sum(q_lens), H, V]`; a query that sees no key gets zeros.
    """
    if q_NHK.shape[0] == 0 or k_MGK.shape[0] == 0:
        return q_NHK.new_zeros(*q_NHK.shape[:2], v_MGV.shape[-1])
    ragged = len(set(q_lens)) > 1 or len(set(kv_lens)) > 1
    if ragged and max(q_lens) * max(kv_lens) >= LONG_PAIRS:
        return _attend_one_by_one(q_NHK, k_MGK, v_MGV, q_lens, kv_lens, mask_BQS, scale)
    q_BQHK = pad_segments(q_NHK, q_lens)
    k_BSGK, v_BSGV = pad_segments(k_MGK, kv_lens), pad_segments(v_MGV, kv_lens)
    return unpad_segments(_attend(q_BQHK, k_BSGK, v_BSGV, mask_BQS, scale), q_lens)


def _attend_one_by_one(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    mask_BQS: Tensor | None,
    scale: float | None,
) -> Tensor:
    outputs = []
    segments = zip(q_NHK.split(list(q_lens)), k_MGK.split(list(kv_lens)), v_MGV.split(list(kv_lens)), strict=True)
    for b, (q, k, v) in enumerate(segments):
        mask = None if mask_BQS is None else mask_BQS[b : b + 1, : len(q), : len(k)]
        if len(k):
            outputs.append(_attend(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), mask, scale).squeeze(0))
        else:
            outputs.append(q.new_zeros(*q.shape[:2], v.shape[-1]))
    return torch.cat(outputs)


def _attend(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, mask_BQS: Tensor | None, scale: float | None) -> Tensor:
    """`[B, Q, H, V]`; no mask means causal with as many queries as keys."""
    H, G = q_BQHK.shape[2], k_BSGK.shape[2]
    # With a mask the fused CUDA kernels know no grouped heads and torch would fall back to its slow one.
    grouped = H != G and (q_BQHK.device.type == "cpu" or mask_BQS is None)
    if H != G and not grouped:
        k_BSGK, v_BSGV = (x.repeat_interleave(H // G, dim=2) for x in (k_BSGK, v_BSGV))
    blind_BQ1 = mask = None
    if mask_BQS is not None:
        # A softmax over nothing is NaN on some devices: a query without keys looks at slot 0, and is cleared below.
        blind_BQ1 = ~mask_BQS.any(-1, keepdim=True)
        first = torch.arange(mask_BQS.shape[2], device=mask_BQS.device) == 0
        mask = (mask_BQS | (blind_BQ1 & first)).unsqueeze(1)
    q_BHQK, k_BGSK, v_BGSV = (x.transpose(1, 2) for x in (q_BQHK, k_BSGK, v_BSGV))
    out_BHQV = F.scaled_dot_product_attention(
        q_BHQK, k_BGSK, v_BGSV, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    out_BQHV = out_BHQV.transpose(1, 2)
    return out_BQHV if blind_BQ1 is None else out_BQHV.masked_fill(blind_BQ1.unsqueeze(-1), 0)


def pad_segments(packed: Tensor, lens: Sequence[int]) -> Tensor:
    """`[sum(lens), ...]` to `[len(lens), max(lens), ...]`, zeros after each segment."""
    longest = max(lens)
    if all(n == longest for n in lens):
        return packed.reshape(len(lens), longest, *packed.shape[1:])
    padded = packed.new_zeros(len(lens) * longest, *packed.shape[1:])
    padded = padded.index_copy(0, real_rows(lens, longest, packed.device), packed)
    return padded.view(len(lens), longest, *packed.shape[1:])


def unpad_segments(padded: Tensor, lens: Sequence[int]) -> Tensor:
    """`[len(lens), max(lens), ...]` to `[sum(lens), ...]`, the inverse of `pad_segments`."""
    flat = padded.flatten(0, 1)
    return flat if len(flat) == sum(lens) else flat.index_select(0, real_rows(lens, max(lens), flat.device))


def causal_mask(q_BQ: Tensor, kv_BS: Tensor, window: int | None) -> Tensor:
    """Bool `[B, Q, S]`: which key positions a query position sees, padding not considered."""
    distance_BQS = q_BQ.unsqueeze(2) - kv_BS.unsqueeze(1)
    seen = distance_BQS >= 0
    return seen if window is None else seen & (distance_BQS < window)


def last_queries_mask(
    q_lens: Sequence[int], kv_lens: Sequence[int], window: int | None, device: torch.device
) -> Tensor:
    """Bool `[B, Q, S]` for segments whose queries are their last tokens; False in all padding."""
    missing = torch.tensor([m - n for n, m in zip(q_lens, kv_lens, strict=True)], device=device)
    q_BQ = torch.arange(max(q_lens), device=device) + missing.unsqueeze(1)
    kv_BS = torch.arange(max(kv_lens), device=device).unsqueeze(0)
    return causal_mask(q_BQ, kv_BS, window) & _real_slots(q_lens, kv_lens, device)


def xformers_bias(q_lens: Sequence[int], kv_lens: Sequence[int], window: int | None, device: torch.device) -> Any:
    """Return the xFormers bias object for segments whose queries are their last tokens."""
    attn_bias: Any = import_xformers("ops.fmha.attn_bias")
    if window is None:
        kind = attn_bias.BlockDiagonalCausalFromBottomRightMask
        return kind.from_seqlens(list(q_lens), list(kv_lens), device=device)
    bias = attn_bias.BlockDiagonalMask.from_seqlens(list(q_lens), list(kv_lens), device=device)
    return bias.make_local_attention_from_bottomright(window)


def _xformers_takes(q_NHK: Tensor, v_MGV: Tensor) -> bool:
    return (
        q_NHK.is_cuda
        and q_NHK.dtype in XFORMERS_DTYPES
        and q_NHK.shape[-1] == v_MGV.shape[-1]
        and q_NHK.shape[-1] % 8 == 0
        and q_NHK.shape[-1] <= 256
        and not torch.compiler.is_compiling()
        and operation_path("ragged_attention", q_NHK.device).name == "xformers"
    )


def _xformers_attention(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None,
    scale: float | None,
) -> Tensor:
    pairs = list(zip(q_lens, kv_lens, strict=True))
    if any(n == 0 for n, _ in pairs):
        # Segments without queries have no row in the output: drop them with their keys.
        starts = torch.tensor([0, *kv_lens]).cumsum(0).tolist()
        kept = chain.from_iterable(range(starts[b], starts[b + 1]) for b, (n, _) in enumerate(pairs) if n)
        rows = torch.tensor(list(kept), device=k_MGK.device)
        k_MGK, v_MGV = k_MGK.index_select(0, rows), v_MGV.index_select(0, rows)
        pairs = [(n, m) for n, m in pairs if n]
    repeats = q_NHK.shape[1] // k_MGK.shape[1]
    k_MHK, v_MHV = (x.repeat_interleave(repeats, dim=1) for x in (k_MGK, v_MGV))
    bias = xformers_bias([n for n, _ in pairs], [m for _, m in pairs], window, q_NHK.device)
    fmha: Any = import_xformers("ops.fmha")
    out = fmha.memory_efficient_attention(
        q_NHK.unsqueeze(0), k_MHK.unsqueeze(0), v_MHV.unsqueeze(0), attn_bias=bias, scale=scale
    )
    return out.squeeze(0)


def real_rows(lens: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """Row numbers of the real entries in a list `[B * longest]` of segments padded at their ends."""
    slots = chain.from_iterable(range(b * longest, b * longest + n) for b, n in enumerate(lens))
    return torch.tensor(list(slots), dtype=torch.int64, device=device)


def _real_slots(q_lens: Sequence[int], kv_lens: Sequence[int], device: torch.device) -> Tensor:
    """Bool `[B, Q, S]`, True where both the query and the key exist."""
    q_B1, kv_B1 = (torch.tensor(lens, device=device).unsqueeze(1) for lens in (q_lens, kv_lens))
    real_BQ = torch.arange(max(q_lens), device=device) < q_B1
    real_BS = torch.arange(max(kv_lens), device=device) < kv_B1
    return real_BQ.unsqueeze(2) & real_BS.unsqueeze(1)


def _check(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGV: Tensor,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    q_positions: Tensor | None,
    kv_positions: Tensor | None,
    window: int | None,
) -> None:
    shapes = f"q {tuple(q_NHK.shape)}, k {tuple(k_MGK.shape)}, v {tuple(v_MGV.shape)}"
    if not q_NHK.ndim == k_MGK.ndim == v_MGV.ndim == 3 or k_MGK.shape[:2] != v_MGV.shape[:2]:
        raise ValueError(f"{shapes}; expected [N, H, K], [M, G, K] and [M, G, V]")
    if q_NHK.shape[2] != k_MGK.shape[2] or q_NHK.shape[1] % k_MGK.shape[1]:
        raise ValueError(f"{shapes}; expected one head width and a multiple of {k_MGK.shape[1]} query heads")
    if len(q_lens) != len(kv_lens) or min(*q_lens, *kv_lens, 0, 0) < 0:
        raise ValueError(f"q_lens {q_lens} and kv_lens {kv_lens}; expected as many, each at least 0")
    if sum(q_lens) != q_NHK.shape[0] or sum(kv_lens) != k_MGK.shape[0]:
        raise ValueError(
            f"q_lens sum to {sum(q_lens)} and kv_lens to {sum(kv_lens)}; expected {q_NHK.shape[0]} and "
            f"{k_MGK.shape[0]}, the packed queries and keys"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1, or None for no window")
    if (q_positions is None) != (kv_positions is None):
        raise ValueError("positions were given for queries or keys only; give both or none")
    if q_positions is None or kv_positions is None:
        short = [b for b, (n, m) in enumerate(zip(q_lens, kv_lens, strict=True)) if m < n]
        if short:
            raise ValueError(f"segments {short} have fewer keys than queries; give positions")
    elif q_positions.shape != q_NHK.shape[:1] or kv_positions.shape != k_MGK.shape[:1]:
        raise ValueError(
            f"positions are {tuple(q_positions.shape)} and {tuple(kv_positions.shape)}; expected "
            f"{tuple(q_NHK.shape[:1])} and {tuple(k_MGK.shape[:1])}"
        )
