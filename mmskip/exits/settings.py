"""Settings of one stack's exits: after which layers, by which criterion, or after a fixed layer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmskip.config import check_choice, check_count, check_flag, check_number
from mmskip.exits.criteria import CRITERIA, check_threshold


def short_repr(config: Any, always: tuple[str, ...] = ()) -> str:
    """Return the `repr` of a dataclass without the fields that have their default."""
    shown = [f.name for f in fields(config) if f.name in always or getattr(config, f.name) != f.default]
    return f"{type(config).__name__}({', '.join(f'{name}={getattr(config, name)!r}' for name in shown)})"


@dataclass(frozen=True, repr=False)
class ExitAt:
    """A state exits after the first layer whose score is above a threshold.

    Attributes:
        threshold: in the range of `criterion`, see `mmskip.exits`; the upper end of the range never fires (unless it
            decays).
        criterion: `saturation`, `state_norm` or `learned` (new weights, see `mmskip.methods.early_exit.exit_heads`); of
            a decoder also `confidence`, `margin`, `entropy` or `patience`.
        exit_layers: numbers of the layers, counted from 1, after which an exit is possible; None: every one.
        min_layers: layers that always run, >= 1.
        max_layers: layer after which every remaining state exits, >= `min_layers`; None: the last one.
        decay: share beta, in (0, 1], of the constant part of the threshold (CALM); None: the threshold is constant.
        decay_speed: tau, > 0.
        decay_steps: maximum number of generated tokens, the unit of the decay, >= 1.
        decide_once: whether the first token of a sample decides, after the first of `exit_layers`, for all of its
            tokens. `decay` and `decide_once` serve the decoders of encoder-decoders only.
    """

    threshold: float
    criterion: str = "saturation"
    exit_layers: tuple[int, ...] | None = None
    min_layers: int = 1
    max_layers: int | None = None
    decay: float | None = None
    decay_speed: float = 1.0
    decay_steps: int = 16
    decide_once: bool = False

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_threshold("threshold", self.criterion, self.threshold)
        check_count("min_layers", self.min_layers, 1)
        if self.max_layers is not None and not (is_positive(self.max_layers) and self.max_layers >= self.min_layers):
            raise ValueError(
                f"max_layers is {self.max_layers!r}; expected an integer >= min_layers ({self.min_layers}), or None."
            )
        given = self.exit_layers
        if given is not None and not (given and all(map(is_positive, given)) and len(set(given)) == len(given)):
            raise ValueError(f"exit_layers is {given!r}; expected different layer numbers >= 1, or None.")
        object.__setattr__(self, "exit_layers", None if given is None else tuple(sorted(given)))
        self._check_decay()

    def _check_decay(self) -> None:
        if self.decay is not None and self.criterion in ("patience", "state_norm"):
            raise ValueError(f"decay is for thresholds in [0, 1]; criterion is {self.criterion!r}.")
        check_number("decay", self.decay, 0, 1, open_low=True, optional=True)
        check_number("decay_speed", self.decay_speed, 0, open_low=True)
        check_count("decay_steps", self.decay_steps, 1)
        check_flag("decide_once", self.decide_once)
        if self.decide_once and self.decay is not None:
            raise ValueError("decide_once is True, which needs a threshold that does not decay.")

    def __repr__(self) -> str:
        return short_repr(self)


@dataclass(frozen=True)
class FixedExit:
    """All states exit after the same layer. Nothing is decided while the model runs, so it compiles with
    `fullgraph=True`.

    Attributes:
        layer: number of the last layer that runs, counted from 1, below the number of layers.
    """

    layer: int

    def __post_init__(self) -> None:
        check_count("layer", self.layer, 1)


def parse_exit(name: str, value: Any) -> ExitAt | FixedExit | None:
    """Return the exit that a setting describes: a threshold, an exit, its fields by name, or None.

    Args:
        name: of the setting, for errors.

    Raises:
        ValueError: it describes none, or a field is out of range.
    """
    if value is None or isinstance(value, ExitAt | FixedExit):
        return value
    if is_number(value):
        check_threshold(name, "saturation", value)
        return ExitAt(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; expected a threshold, an ExitAt, a FixedExit, or None.")
    kind = FixedExit if "layer" in value else ExitAt
    names = [f.name for f in fields(kind)]
    unknown = sorted(set(value) - set(names))
    if unknown or not {names[0]} <= set(value):
        problem = f"has no {', '.join(unknown)}" if unknown else f"lacks {names[0]}"
        raise ValueError(f"{name}: {kind.__name__} {problem}; expected keys among {', '.join(names)}.")
    try:
        return kind(**value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def is_positive(value: Any) -> bool:
    """Return whether `value` is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)
