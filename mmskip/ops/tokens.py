"""Select the tokens a layer processes, and merge its output back.

Shape suffixes: B batch, T tokens of a row, S slots (kept tokens of a row, padded to the longest), D width,
N = B * S slots of the batch in one list.

Both operations work on `[B * T, D]` with flat row numbers: on a CPU `index_select` and `index_add` on whole
rows are several times faster than `gather` and `scatter_add` with an index expanded over D.
Slots that are padding are sent to one scratch row after the last real row, so no operation needs to know on
the host how many slots are real.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmskip.ops.backend import import_xformers, operation_path


def select_tokens(x_BTD: Tensor, index_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    """Gather the kept tokens of each row.

    Args:
        x_BTD: hidden states `[B, T, D]`.
        index_BS: int64 positions `[B, S]` in `0..T-1`; the valid ones of a row differ from each other.
        valid_BS: bool `[B, S]`, False for a slot that is padding (its index may be any position).
            None: all valid.

    Returns:
        `[B, S, D]`; padding slots are zero, whatever stands in `x`, and pass no gradient.

    Raises:
        ValueError: shapes or dtypes do not fit; on a CPU also a position outside `0..T-1`.
    """
    _check(x_BTD, index_BS, valid_BS)
    return _Select.apply(x_BTD, index_BS, valid_BS)


def merge_tokens(
    x_BTD: Tensor,
    y_BSD: Tensor,
    index_BS: Tensor,
    gate_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Write processed tokens back: `out[b, index[b, s]] = lerp(x, y[b, s], gate[b, s])`, other tokens stay.

    The interpolation runs in the dtype of `x` and is exact at gate 0 and 1. `x` is not modified.

    Args:
        x_BTD: hidden states `[B, T, D]` before the layer.
        y_BSD: `[B, S, D]`, the same tokens after the layer, same dtype as `x`.
        index_BS: int64 positions `[B, S]` in `0..T-1`; the valid ones of a row differ from each other.
        gate_BS: `[B, S]` of any floating dtype. None: the processed token as it is (gate 1).
        valid_BS: bool `[B, S]`, False for a slot that is padding: it writes nothing and receives zero
            gradient, even where it holds NaN. None: all valid.

    Returns:
        `[B, T, D]`, a new tensor. Differentiable once with respect to `x`, `y` and `gate`.

    Raises:
        ValueError: shapes or dtypes do not fit; on a CPU also a position outside `0..T-1`.
    """
    _check(x_BTD, index_BS, valid_BS)
    expected = (*index_BS.shape, x_BTD.shape[-1])
    if y_BSD.shape != expected or y_BSD.dtype != x_BTD.dtype:
        raise ValueError(
            f"y is {tuple(y_BSD.shape)} {y_BSD.dtype}; expected {expected} {x_BTD.dtype} "
            "(the selected tokens after the layer, in the dtype of x)"
        )
    if gate_BS is not None and (gate_BS.shape != index_BS.shape or not gate_BS.is_floating_point()):
        raise ValueError(
            f"gate is {tuple(gate_BS.shape)} {gate_BS.dtype}; expected {tuple(index_BS.shape)} of a floating dtype"
        )
    return _Merge.apply(x_BTD, y_BSD, index_BS, gate_BS, valid_BS)


def select_tokens_naive(x_BTD: Tensor, index_BS: Tensor, valid_BS: Tensor | None = None) -> Tensor:
    """Reference of `select_tokens`: one slot at a time, gradients by autograd."""
    B, S = index_BS.shape
    rows = []
    for b in range(B):
        for s in range(S):
            padding = torch.tensor(valid_BS is not None and not valid_BS[b, s], device=x_BTD.device)
            rows.append(x_BTD[b, int(index_BS[b, s])].masked_fill(padding, 0))
    return torch.stack(rows).view(B, S, -1) if rows else x_BTD[:, :0]


def merge_tokens_naive(
    x_BTD: Tensor,
    y_BSD: Tensor,
    index_BS: Tensor,
    gate_BS: Tensor | None = None,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Reference of `merge_tokens`: one slot at a time, gradients by autograd."""
    rows = [list(row.unbind(0)) for row in x_BTD]
    for b, row in enumerate(rows):
        for s in range(index_BS.shape[1]):
            if valid_BS is not None and not valid_BS[b, s]:
                continue
            t = int(index_BS[b, s])
            if gate_BS is None:
                row[t] = y_BSD[b, s]
            else:
                row[t] = torch.lerp(x_BTD[b, t], y_BSD[b, s], gate_BS[b, s].to(x_BTD.dtype))
    return torch.stack([torch.stack(row) for row in rows])


def _check(x_BTD: Tensor, index_BS: Tensor, valid_BS: Tensor | None) -> None:
    if x_BTD.ndim != 3 or index_BS.ndim != 2 or x_BTD.shape[0] != index_BS.shape[0]:
        raise ValueError(
            f"x is {tuple(x_BTD.shape)} and index {tuple(index_BS.shape)}; expected [B, T, D] and [B, S] of the same B"
        )
    if index_BS.dtype != torch.int64:
        raise ValueError(f"index is {index_BS.dtype}; expected torch.int64 (convert it with .long())")
    if valid_BS is not None and (valid_BS.shape != index_BS.shape or valid_BS.dtype != torch.bool):
        raise ValueError(
            f"valid is {tuple(valid_BS.shape)} {valid_BS.dtype}; expected {tuple(index_BS.shape)} torch.bool"
        )
    # Reading values would stall a GPU and break a compiled graph. On a CPU it is cheap, and a flat row number
    # outside its row would silently reach into the neighbouring sample.
    if index_BS.is_cpu and index_BS.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.aminmax(index_BS))
        if low < 0 or high >= x_BTD.shape[1]:
            raise ValueError(f"index holds {low}..{high}; expected positions within 0..{x_BTD.shape[1] - 1}")


def _flat_rows(index_BS: Tensor, tokens: int, valid_BS: Tensor | None) -> Tensor:
    """Row numbers `[N]` in `x.view(B * T, D)`; padding slots get `B * T`, the scratch row."""
    B = index_BS.shape[0]
    flat_BS = index_BS + torch.arange(B, device=index_BS.device).unsqueeze(1) * tokens
    if valid_BS is not None:
        flat_BS = flat_BS.masked_fill(~valid_BS, B * tokens)
    return flat_BS.flatten()


def _with_scratch_row(x_BTD: Tensor) -> Tensor:
    """Return a copy of `x` as `[B * T + 1, D]`; the last row is not initialised."""
    B, T, D = x_BTD.shape
    buffer = x_BTD.new_empty(B * T + 1, D)
    buffer[:-1].view(B, T, D).copy_(x_BTD)
    return buffer


def _use_xformers(x: Tensor) -> bool:
    """Not in a compiled graph: the compiler fuses the torch operations, a foreign kernel would split it."""
    if not x.is_cuda or torch.compiler.is_compiling():
        return False
    return operation_path("select_tokens", x.device).name == "xformers"


def _gather_rows(x_MD: Tensor, flat_N: Tensor) -> Tensor:
    if _use_xformers(x_MD) and 0 < flat_N.numel() < x_MD.shape[0]:
        indexing: Any = import_xformers("ops.indexing")
        return indexing.index_select_cat([x_MD.contiguous()], [flat_N]).view(flat_N.numel(), -1)
    return x_MD.index_select(0, flat_N)


def _scatter_rows(rows_ND: Tensor, flat_N: Tensor, total: int) -> Tensor:
    """`[total, D]`, zero but for the given rows."""
    out = rows_ND.new_zeros(total, rows_ND.shape[1])
    if _use_xformers(rows_ND) and 0 < flat_N.numel() < total:
        indexing: Any = import_xformers("ops.indexing")
        indexing.scaled_index_add(out.unsqueeze(1), flat_N, rows_ND.contiguous().unsqueeze(1))
        return out
    return out.index_add_(0, flat_N, rows_ND)


class _Select(torch.autograd.Function):
    """Keeps only the row numbers for backward, where `gather` would keep an index per element."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, index_BS: Tensor, valid_BS: Tensor | None) -> Tensor:
        B, T, D = x_BTD.shape
        flat_N = _flat_rows(index_BS, T, valid_BS)
        ctx.save_for_backward(flat_N)
        ctx.shape = (B, T, D)
        x_MD = x_BTD.reshape(B * T, D)
        if valid_BS is None:
            return _gather_rows(x_MD, flat_N).view(B, -1, D)
        in_range_N = _flat_rows(index_BS, T, None)
        selected_BSD = _gather_rows(x_MD, in_range_N).view(B, -1, D)
        return selected_BSD.masked_fill_(~valid_BS.unsqueeze(-1), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (flat_N,) = ctx.saved_tensors
        B, T, D = ctx.shape
        grad_x = _scatter_rows(grads[0].reshape(-1, D), flat_N, B * T + 1)
        return grad_x[:-1].view(B, T, D), None, None


class _Merge(torch.autograd.Function):
    """Keeps the row numbers and, for a gate, `y - x` of the selected rows; never a copy of `x`.

    xFormers' `scaled_index_add` has no part here: `x + gate * (y - x)` is not exact at gate 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        y_BSD: Tensor,
        index_BS: Tensor,
        gate_BS: Tensor | None,
        valid_BS: Tensor | None,
    ) -> Tensor:
        B, T, D = x_BTD.shape
        flat_N = _flat_rows(index_BS, T, valid_BS)
        out_MD = _with_scratch_row(x_BTD)
        rows_ND = y_BSD.reshape(-1, D)
        delta_ND = gate_N1 = None
        if gate_BS is not None:
            kept_ND = x_BTD.reshape(B * T, D).index_select(0, _flat_rows(index_BS, T, None))
            gate_N1 = gate_BS.reshape(-1, 1).to(x_BTD.dtype)
            if valid_BS is not None:
                gate_N1 = gate_N1.masked_fill(~valid_BS.reshape(-1, 1), 0)
            if ctx.needs_input_grad[3]:
                delta_ND = rows_ND - kept_ND
            rows_ND = torch.lerp(kept_ND, rows_ND, gate_N1)
        ctx.save_for_backward(flat_N, gate_N1, delta_ND, valid_BS)
        ctx.shape = (B, T, D)
        ctx.gate_dtype = None if gate_BS is None else gate_BS.dtype
        return out_MD.index_copy_(0, flat_N, rows_ND)[:-1].view(B, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        flat_N, gate_N1, delta_ND, valid_BS = ctx.saved_tensors
        B, T, D = ctx.shape
        grad_MD = _with_scratch_row(grads[0])
        grad_MD[-1].zero_()
        grad_ND = grad_MD.index_select(0, flat_N)
        grad_gate = None
        if delta_ND is not None:
            wide = torch.promote_types(delta_ND.dtype, torch.float32)
            grad_gate_BS = (grad_ND * delta_ND).sum(-1, dtype=wide).view(B, -1)
            if valid_BS is not None:
                grad_gate_BS = grad_gate_BS.masked_fill(~valid_BS, 0)
            grad_gate = grad_gate_BS.to(ctx.gate_dtype)
        grad_y = grad_ND if gate_N1 is None else grad_ND * gate_N1
        grad_x = None
        if ctx.needs_input_grad[0]:
            if gate_N1 is None:
                grad_MD.index_fill_(0, flat_N, 0)
            else:
                grad_MD.index_copy_(0, flat_N, grad_ND * (1 - gate_N1))
            grad_x = grad_MD[:-1].view(B, T, D)
        return grad_x, grad_y.view(B, -1, D), None, grad_gate, None
