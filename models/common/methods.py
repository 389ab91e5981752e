"""Method configs of a LightningModule: read from a YAML, kept in a checkpoint, checked before any data are made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mmskip.config import MethodConfig, from_entry
from mmskip.registry import apply_, config_types


def freeze(methods: Sequence[MethodConfig]) -> list[dict[str, Any]]:
    """Write configs as plain dicts (`class_path`, `init_args`), as they stand in YAML files and checkpoints. (A
    dataclass in the hyper-parameters would break weights-only loading of the checkpoint.)"""
    return [
        {
            "class_path": f"mmskip.{type(method).__name__}",
            "init_args": method.to_dict(),
            **({"version": method.VERSION} if method.VERSION > 1 else {}),
        }
        for method in methods
    ]


def thaw(methods: Sequence[MethodConfig | Mapping[str, Any]] | None) -> list[Any]:
    """Read configs that may be the dicts of `freeze`, also of older versions of a config; None: no methods.

    Raises:
        ValueError: an unknown method, or an unknown or bad setting of one.
    """
    types = config_types()

    def read(method: Any) -> Any:
        if not isinstance(method, Mapping):
            return method
        name = method["class_path"].rpartition(".")[2]
        return from_entry(types, name, method.get("init_args", {}), method.get("version", 1))

    return [read(method) for method in methods or ()]


def check_methods(build: Callable[[], Any], methods: Sequence[MethodConfig]) -> Any:
    """Apply the methods to a model without weights, so that what does not fit is found before any work starts.

    Args:
        build: makes the model; called on torch's meta device.
        methods: in the order in which they are applied.

    Returns:
        The model on the meta device with its methods; None without methods.

    Raises:
        ValueError: a method does not fit the model, or two of them exclude one another.
    """
    if not methods:
        return None
    with torch.device("meta"):
        model = build()
    apply_methods(model, methods)
    return model


def apply_methods(model: nn.Module, methods: Sequence[MethodConfig]) -> None:
    """Apply the methods in order, in place.

    Raises:
        ValueError: one does not fit; those before it stay.
    """
    for method in methods:
        apply_(model, method)
