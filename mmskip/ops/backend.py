"""Which implementation of an operation runs on a device, and why.

xFormers is imported only when a CUDA tensor asks for it: it warns at import where its extensions do not fit
the torch version, and its index kernels exist only where Triton sees a GPU.
"""

import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch

ENV_VAR = "MMSKIP_OPS"
"""Environment variable: `auto` (default) uses xFormers on CUDA where it loads, `torch` never does."""


@dataclass(frozen=True)
class Path:
    """The implementation that runs for one operation.

    Attributes:
        name: `"xformers"` or `"torch"`.
        reason: why this one, in words for `python -m mmskip.env`.
    """

    name: str
    reason: str


@functools.cache
def import_xformers(module: str) -> ModuleType | None:
    """Import an xFormers submodule without its import-time warnings.

    Args:
        module: name below the package, such as `"ops.fmha"`.

    Returns:
        The module, or None where it cannot be imported (not installed, or broken on this machine).
    """
    logger = logging.getLogger("xformers")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        return importlib.import_module(f"xformers.{module}")
    except (ImportError, OSError, RuntimeError):
        return None
    finally:
        logger.disabled = was_disabled


def _refuse_xformers(device: torch.device) -> Path | None:
    """Return the torch path and its reason where xFormers is out of the question, else None."""
    wanted = os.environ.get(ENV_VAR, "auto")
    if wanted not in ("auto", "torch"):
        raise ValueError(f"{ENV_VAR}={wanted!r}: expected 'auto' or 'torch'; unset it for 'auto'")
    if wanted == "torch":
        return Path("torch", f"{ENV_VAR}=torch")
    if device.type != "cuda":
        return Path("torch", f"xFormers runs on CUDA only, this is {device.type}")
    if torch.version.hip is not None:
        return Path("torch", "the xFormers kernels are tested on NVIDIA devices only")
    return None


def operation_path(operation: str, device: torch.device) -> Path:
    """Choose the implementation of an operation on a device.

    Args:
        operation: `"select_tokens"` or `"ragged_attention"`.
        device: the device the tensors live on.

    Raises:
        ValueError: if the environment variable `MMSKIP_OPS` holds an unknown value.
    """
    refused = _refuse_xformers(device)
    return _XFORMERS[operation]() if refused is None else refused


def _index_kernels() -> Path:
    indexing = import_xformers("ops.indexing")
    if indexing is None:
        return Path("torch", "xFormers cannot be imported")
    if indexing.index_select_cat_fwd is None or indexing.scaled_index_add_fwd is None:
        return Path("torch", "the index kernels of xFormers need Triton, which does not load here")
    return Path("xformers", "index_select_cat and scaled_index_add load")


def _attention_kernels() -> Path:
    fmha = import_xformers("ops.fmha")
    if fmha is None:
        return Path("torch", "xFormers cannot be imported")
    if not any(op.is_available() for op in fmha.ALL_FW_OPS):
        return Path("torch", "no attention kernel of xFormers fits this torch and device")
    return Path("xformers", "memory_efficient_attention loads")


_XFORMERS = {"select_tokens": _index_kernels, "ragged_attention": _attention_kernels}
