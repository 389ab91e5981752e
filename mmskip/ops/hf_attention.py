"""Ragged attention as an attention backend of transformers: `attn_implementation="mmskip_ragged"`.

Padding is dropped before attention instead of being masked inside it. Any mask a decoder builds is honoured; where
it is plain causal or sliding-window order among the real tokens, the fast kernels of `ragged_attention` take it.

Shape suffixes as in `mmskip.ops.attention`; L is the number of key slots a model sees, padding included.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmskip.ops.attention import last_queries_mask, masked_attention, ragged_attention

NAME = "mmskip_ragged"
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Keyword arguments of attention functions that change the scores in ways the kernels do not know."""


ATTRIBUTE = "mmskip_packing"
"""Name under which a mask tensor carries its `Packing`."""


@dataclass(frozen=True)
class Packing:
    """The real tokens of a padded batch, and what they see.

    Attributes:
        q_rows: int64 `[N]`, rows of the real queries in the flattened `[B * Q]` list; None: all of them.
        kv_rows: int64 `[M]`, rows of the keys that any query sees in the flattened `[B * L]` list; None: all of them.
        q_lens: real queries per sample.
        kv_lens: seen keys per sample.
        window: the sliding window in entries, None for full causal attention.
        mask_BQS: bool mask over the packed segments, None where causal order and the window say it all.
    """

    q_rows: Tensor | None
    kv_rows: Tensor | None
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    window: int | None
    mask_BQS: Tensor | None


def register_attention() -> str:
    """Register the backend with transformers, attention and mask function both. Idempotent.

    Returns:
        The name to use as `attn_implementation`.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, ragged_attention_forward)
    AttentionMaskInterface.register(NAME, ragged_mask)
    return NAME


def ragged_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Build the mask of one forward, once for all layers of an attention type (one device sync).

    The arguments are those of `transformers.masking_utils.sdpa_mask`, which says what each query may see. Queries
    that are padding by `attention_mask`, or see nothing, are dropped: their output is zero.

    Returns:
        The bool mask `[B, 1, Q, L]` of sdpa, carrying its `Packing` as an attribute.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    dense = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    if dense is None:
        raise RuntimeError("sdpa_mask returned no mask although it was asked for one")
    # generate() asks for a contiguous mask: were it none yet, the copy would lose the packing.
    dense = dense.contiguous()
    real_BQ = None
    if attention_mask is not None and attention_mask.shape[1] >= q_offset + q_length:
        real_BQ = attention_mask[:, q_offset : q_offset + q_length].bool()
    setattr(dense, ATTRIBUTE, pack_mask(dense, real_BQ, local_size))
    return dense


def pack_mask(mask_B1QL: Tensor, real_BQ: Tensor | None = None, window: int | None = None) -> Packing:
    """Drop padding queries and unseen keys, and recognise causal order among what is left.

    Args:
        mask_B1QL: bool `[B, 1, Q, L]`, True where a query sees a key.
        real_BQ: bool `[B, Q]`, False for queries that are padding. None: all that see a key are real.
        window: a sliding window the mask may follow, in entries.
    """
    mask_BQL = mask_B1QL[:, 0]
    real_BQ = mask_BQL.any(-1) if real_BQ is None else mask_BQL.any(-1) & real_BQ
    mask_BQL = mask_BQL & real_BQ.unsqueeze(2)
    seen_BL = mask_BQL.any(1)
    q_lens, kv_lens = (lens.tolist() for lens in torch.stack([real_BQ.sum(1), seen_BL.sum(1)]).cpu())
    q_order_BQ, kv_order_BL = ((~real).to(torch.int8).argsort(dim=1, stable=True) for real in (real_BQ, seen_BL))
    mask_BQS = mask_BQL.gather(1, q_order_BQ.unsqueeze(2).expand_as(mask_BQL))
    mask_BQS = mask_BQS.gather(2, kv_order_BL.unsqueeze(1).expand_as(mask_BQL))
    mask_BQS = mask_BQS[:, : max(q_lens), : max(kv_lens)]
    fits = all(m >= n for n, m in zip(q_lens, kv_lens, strict=True))
    causal_windows = [
        candidate
        for candidate in (dict.fromkeys((None, window)) if fits else ())
        if torch.equal(last_queries_mask(q_lens, kv_lens, candidate, mask_BQS.device), mask_BQS)
    ]
    return Packing(
        q_rows=real_BQ.flatten().nonzero().squeeze(1),
        kv_rows=seen_BL.flatten().nonzero().squeeze(1),
        q_lens=tuple(q_lens),
        kv_lens=tuple(kv_lens),
        window=causal_windows[0] if causal_windows else None,
        mask_BQS=None if causal_windows else mask_BQS,
    )


class Packings:
    """The packings of one forward whose real tokens are known on the host, so that no layer waits for the device.
    Calls with the same real tokens share one."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Packing] = {}

    def mask(
        self, q_BQ: np.ndarray, kv_BL: np.ndarray, device: torch.device, allowed: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return the mask of a call.

        Args:
            q_BQ, kv_BL: bool, the real queries and keys. A row's real queries are the last of its real keys.
            device: of queries and keys.
            allowed: of batch, head, query and key numbers (tensors that broadcast): whether the query sees the key.
                None: in causal order.

        Returns:
            A bool `[B, 1, Q, L]` of one stored element, carrying its `Packing`; only this backend may read it.
        """
        key = q_BQ.shape, q_BQ.tobytes(), kv_BL.shape, kv_BL.tobytes(), device
        if key not in self._known:
            self._known[key] = known_packing(q_BQ, kv_BL, device)
        packing = self._known[key]
        if allowed is not None:
            packing = replace(packing, mask_BQS=_packed_mask(q_BQ, kv_BL, device, allowed))
        mask = torch.ones((), dtype=torch.bool, device=device).expand(len(q_BQ), 1, q_BQ.shape[1], kv_BL.shape[1])
        setattr(mask, ATTRIBUTE, packing)
        return mask


def known_packing(q_BQ: np.ndarray, kv_BL: np.ndarray, device: torch.device) -> Packing:
    """The packing of real queries and keys (bool, on the host) in causal order, a row's queries its last real keys."""
    q_rows, kv_rows = (
        None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device, non_blocking=True)
        for real in (q_BQ, kv_BL)
    )
    return Packing(q_rows, kv_rows, tuple(q_BQ.sum(1).tolist()), tuple(kv_BL.sum(1).tolist()), None, None)


def _packed_mask(q_BQ: np.ndarray, kv_BL: np.ndarray, device: torch.device, allowed: Callable[..., Tensor]) -> Tensor:
    """Bool `[B, Q', S]` over the packed segments: what `allowed` says of their real queries and keys."""
    places = [np.argsort(~real, axis=1, kind="stable")[:, : int(real.sum(1).max())] for real in (q_BQ, kv_BL)]
    real_q, real_k = (
        torch.from_numpy(np.take_along_axis(real, place, 1)).to(device, non_blocking=True)
        for real, place in zip((q_BQ, kv_BL), places, strict=True)
    )
    q, k = (torch.from_numpy(place).to(device, non_blocking=True) for place in places)
    rows = torch.arange(len(q), device=device)[:, None, None]
    seen: Tensor = allowed(rows, torch.zeros_like(rows), q[:, :, None], k[:, None, :])
    return seen & real_q[:, :, None] & real_k[:, None, :]


def ragged_attention_forward(
    module: torch.nn.Module,
    query_BHQK: Tensor,
    key_BGLK: Tensor,
    value_BGLV: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in the form transformers expects.

    Returns:
        `[B, Q, H, V]`, zero for padding queries, and None for the attention weights.

    Raises:
        ValueError: no mask or an additive one, attention dropout, or a feature the kernels do not know.
    """
    if attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.ndim != 4:
        given = "no mask" if attention_mask is None else f"{tuple(attention_mask.shape)} {attention_mask.dtype}"
        raise ValueError(
            f"{NAME} got {given} in {type(module).__name__}; expected the bool mask [B, 1, Q, L] of a decoder. Run "
            "encoders without a causal mask under 'sdpa'"
        )
    wanted = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if wanted or dropout:
        raise ValueError(
            f"{NAME} has no {', '.join(wanted) or 'attention dropout'}, which {type(module).__name__} needs; use "
            f"'{'eager' if wanted else 'sdpa'}' as attn_implementation"
        )
    B, H, Q, _ = query_BHQK.shape
    packing = getattr(attention_mask, ATTRIBUTE, None) or pack_mask(attention_mask)
    q_NHK = _rows(query_BHQK, packing.q_rows)
    k_MGK, v_MGV = (_rows(x, packing.kv_rows) for x in (key_BGLK, value_BGLV))
    lens = packing.q_lens, packing.kv_lens
    if packing.mask_BQS is None:
        out_NHV = ragged_attention(q_NHK, k_MGK, v_MGV, *lens, window=packing.window, scale=scaling)
    else:
        out_NHV = masked_attention(q_NHK, k_MGK, v_MGV, *lens, packing.mask_BQS, scaling)
    if packing.q_rows is not None:
        out_NHV = out_NHV.new_zeros(B * Q, H, out_NHV.shape[-1]).index_copy(0, packing.q_rows, out_NHV)
    return out_NHV.view(B, Q, H, -1), None


def _rows(x_BHTK: Tensor, rows: Tensor | None) -> Tensor:
    """`[B, H, T, K]` to the chosen rows `[rows, H, K]`."""
    x_MHK = x_BHTK.transpose(1, 2).flatten(0, 1)
    return x_MHK if rows is None else x_MHK.index_select(0, rows)
