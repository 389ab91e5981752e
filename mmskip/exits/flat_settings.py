"""Settings of version 0.1, one flat list for the decoder and the encoder, turned into those of today."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from mmskip.cache_policy import canonical
from mmskip.exits.settings import ExitAt, FixedExit, is_number

DEFAULT = 0.99
"""Threshold of a decoder that is not mentioned."""
_DECODER = {
    "criterion": "criterion",
    "points": "exit_layers",
    "min_layers": "min_layers",
    "max_layers": "max_layers",
    "decay": "decay",
    "decay_speed": "decay_speed",
    "decay_steps": "decay_steps",
    "once": "decide_once",
}
_ENCODER = {
    "encoder_criterion": "criterion",
    "encoder_points": "exit_layers",
    "encoder_min_layers": "min_layers",
    "encoder_max_layers": "max_layers",
}
FLAT = (*_DECODER, *_ENCODER, "depth", "encoder_depth", "kv")
"""Names that only version 0.1 has."""


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of today, as plain values, for those of version 0.1.

    Args:
        values: by name; None counts as not given. Names that are in neither are passed on.

    Raises:
        ValueError: settings contradict each other, or a value is out of range.
    """
    found = {name: value for name, value in values.items() if name not in FLAT}
    flat = {name: values[name] for name in FLAT if values.get(name) is not None}
    if "kv" in flat:
        found["cache_policy"] = canonical(flat["kv"])
    found["decoder"] = _decoder(found.get("decoder", DEFAULT), flat)
    return found | _encoders(found, flat)


def _decoder(threshold: Any, flat: Mapping[str, Any]) -> Any:
    fields = {new: flat[old] for old, new in _DECODER.items() if old in flat}
    depth = flat.get("depth")
    if depth is not None:
        threshold = None if is_number(threshold) and threshold == DEFAULT else threshold
        _check_single("depth", depth, {"decoder": threshold})
    if threshold is None and flat.get("once"):
        raise ValueError("once is True, which needs a threshold of the decoder that does not decay.")
    return _exit("decoder", threshold, fields, depth, "", "depth")


def _encoders(found: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    fields = {new: flat[old] for old, new in _ENCODER.items() if old in flat}
    depth = flat.get("encoder_depth")
    given = {name: found[name] for name in ("encoder", "image", "text") if found.get(name) is not None}
    if depth is not None:
        _check_single("encoder_depth", depth, given)
    if not set(given) & {"image", "text"}:
        return {"encoder": _exit("encoder", given.get("encoder"), fields, depth, "encoder_", "encoder_depth")}
    return {name: _exit(name, value, fields, None, "encoder_", "encoder_depth") for name, value in given.items()}


def _check_single(name: str, value: Any, others: Mapping[str, Any]) -> None:
    for other, threshold in others.items():
        if threshold is not None:
            raise ValueError(f"{other} is {threshold!r} and {name} {value!r}; choose one of them.")


def _exit(name: str, threshold: Any, fields: dict[str, Any], layer: Any, prefix: str, depth_name: str) -> Any:
    """Return the exit of one stack.

    Args:
        name: of the stack.
        threshold: a number, an exit of today, or None.
        fields: of `ExitAt`.
        layer: of `FixedExit`, or None.
        prefix, depth_name: of the settings of version 0.1, for errors.
    """
    most = fields.get("max_layers")
    if layer is not None and most is not None:
        raise ValueError(f"{prefix}max_layers is {most} and {depth_name} {layer}; choose one of them.")
    if threshold is None and layer is None and most is not None:
        raise ValueError(
            f"{prefix}max_layers is {most}, and nothing is decided below it: give a threshold, or use "
            f"{depth_name}={most} instead."
        )
    try:
        checked = ExitAt(threshold if is_number(threshold) else 0.5, **fields)
        if is_number(threshold):
            return _plain(checked)
        if layer is not None:
            return _plain(FixedExit(layer))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if threshold is not None and checked != ExitAt(0.5):
        raise ValueError(
            f"{', '.join(fields)} stand beside {name}={threshold!r}; give them to the ExitAt of {name} instead."
        )
    return threshold


def _plain(exit_: ExitAt | FixedExit) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    found = {f.name: getattr(exit_, f.name) for f in fields(exit_) if getattr(exit_, f.name) != f.default}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
