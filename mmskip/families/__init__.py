"""Families: the only code that knows a model library. Each finds the sites of a model.

A family is a function `match(model) -> (View, "")` or `(None, reason)`. Those below come with mmskip; a plug-in adds
its own by `@family(name)`, or by an entry point of the group `mmskip.families` that names its `match`.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mmskip.utils.plugins import load_plugins

Match = Callable[[nn.Module], tuple[Any, str]]

BUILT_IN = ("decoder", "vlm", "encoder_decoder", "encoder", "cnn", "unet")
_MATCHES: dict[str, Match] = {}
ALIASES = {
    "hf_decoder": "decoder",
    "hf_vlm": "vlm",
    "hf_encoder_decoder": "encoder_decoder",
    "encoders": "encoder",
    "timm_cnn": "cnn",
    "diffusers_unet": "unet",
}
"""Names of version 0.1, which saved adapters hold."""
LANGUAGE_MODELS = ("decoder", "vlm")


def family(name: str) -> Callable[[Match], Match]:
    """Decorator: register `match` as the family `name`.

    Raises:
        ValueError: the name is taken.
    """

    def add(match: Match) -> Match:
        if name in BUILT_IN or _MATCHES.get(name, match) is not match:
            raise ValueError(f"there is a family {name!r} already; choose another name.")
        _MATCHES[name] = match
        return match

    return add


def names() -> tuple[str, ...]:
    """All families: those of mmskip, then those of plug-ins."""
    for name, match in load_plugins("mmskip.families").items():
        _MATCHES.setdefault(name, match)
    return tuple(dict.fromkeys((*BUILT_IN, *_MATCHES)))


def find(model: nn.Module, among: Sequence[str] = LANGUAGE_MODELS) -> Any:
    """Return the view of the first family in `among` that fits `model`.

    Raises:
        ValueError: no family fits; the message has each family's reason.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    reasons = []
    for name in among:
        view, reason = _match(name)(model)
        if view is not None:
            return view
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"no family fits {type(model).__name__}. Families that work for this method: " + "; ".join(reasons)
    )


def _match(name: str) -> Match:
    name = ALIASES.get(name, name)
    if name in BUILT_IN:
        match: Match = importlib.import_module(f"mmskip.families.{name}").match
        return match
    if name not in names():
        raise ValueError(f"there is no family {name!r}; expected one of {', '.join(names())}.")
    return _MATCHES[name]
