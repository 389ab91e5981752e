"""Families: the only code that knows a model library. Each names the sites of a model."""

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

_FAMILIES = ("decoder", "vlm")
WITH_WEIGHTS = (*_FAMILIES, "encoder_decoder", "encoder")
"""Families whose blocks may get new weights."""


def find(model: nn.Module, among: Sequence[str] = _FAMILIES) -> Any:
    """The view of the first family in `among` that fits `model`.

    Raises:
        ValueError: no family fits; the message has each family's reason.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    reasons = []
    for name in among:
        family = importlib.import_module(f"mmskip.families.{name}")
        view, reason = family.match(model)
        if view is not None:
            return view
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"no family fits {type(model).__name__}. Families that work for this method: " + "; ".join(reasons)
    )
