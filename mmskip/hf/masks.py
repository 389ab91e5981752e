"""Masks built by the attention backend's own mask function.

Shape suffixes: B batch, S queries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def build_mask(config: Any, allowed: Callable[..., Any], query_BS: Tensor, keys: int, dtype: torch.dtype) -> Any:
    """Build the mask of a call in the form that the model's attention implementation expects.

    Args:
        config: of the decoder.
        allowed: function of batch, head, query and key indices (tensors that broadcast): whether the query sees the
            key.
        query_BS: any tensor with B rows and S queries, on the device of the mask.
        keys: number of keys.
        dtype: of the hidden states, for additive masks.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    build: Callable[..., Any] = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation]
    return build(
        batch_size=query_BS.shape[0],
        q_length=query_BS.shape[1],
        kv_length=keys,
        q_offset=0,
        kv_offset=0,
        mask_function=allowed,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=dtype,
        config=config,
        use_vmap=False,
        device=query_BS.device,
    )
