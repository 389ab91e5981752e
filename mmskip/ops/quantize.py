"""Weights of linear layers in few bits, by torchao (the extra `quantize`), which is imported when it is asked for.

torchao's symmetric integers, with a scale per output channel or per group of inputs.
"""

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.utils.command import quiet_imports
from mmskip.utils.extras import require

STORES = ("int8", "packed")
FEWEST, MOST = 2, 8
"""Fewest useful bits: one symmetric bit holds zeros only."""


def torchao() -> Any:
    """Return the `torchao.quantization` module.

    Raises:
        ValueError: torchao is not installed, or does not load here.
    """
    quiet_imports()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("quantize", "torchao.quantization", "a quantized weight")


def quantizer(bits: int, group: int | None, store: str) -> Any:
    """torchao's config for weights of so many bits; `store` as in `LayerBitsConfig`."""
    library = torchao()
    dtype = getattr(torch, f"int{bits}")
    granularity = library.PerAxis(0) if group is None else library.PerGroup(group)
    if store == "packed":
        return library.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype, weight_granularity=granularity, intx_packing_format="opaque_torchao_auto"
        )
    return library.IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


def check_bits(bits: int, group: int | None, store: str, device: torch.device, dtype: torch.dtype) -> None:
    """Whether torchao can store such weights of a dtype on a device, tried on a small layer.

    Raises:
        ValueError: it cannot, with its reason.
    """
    if not FEWEST <= bits <= MOST:
        raise ValueError(
            f"bits holds {bits}; torchao stores symmetric integers of {FEWEST} to {MOST} bits, and 16 leaves a block "
            "as it is."
        )
    inputs = 64 if group is None else 2 * group
    trial = nn.ModuleDict({"trial": nn.Linear(inputs, 16, device=device, dtype=dtype)})
    try:
        quantize_({"trial": bits}, trial, group, store)
        trial["trial"](torch.zeros(1, inputs, device=device, dtype=dtype))
    except (AssertionError, RuntimeError, NotImplementedError, ImportError, ValueError) as error:
        raise ValueError(
            f"torchao cannot store {bits} bits with store={store!r}, group={group} of {dtype} on {device} here: {error}"
        ) from error


def quantize_(bits: Mapping[str, int], module: nn.Module, group: int | None, store: str) -> None:
    """Quantize the weights of linear layers of `module` in place, by name."""
    configs = OrderedDict((name, quantizer(width, group, store)) for name, width in bits.items())
    torchao().quantize_(module, torchao().FqnToConfig(configs), filter_fn=None)


def stored_bytes(weight: Tensor) -> int:
    """Bytes that a weight takes, quantized or not: its numbers as they lie in memory, scales and zero points."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, name).nbytes for name in names)
