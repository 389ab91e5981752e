"""What the config of every method shares: the JSON round trip and the checks of its fields."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Self


class MethodConfig:
    """Base of the frozen dataclasses that describe a method."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reverses it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for unknown keys and for values out of range."""
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = set(values) - set(names)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no {', '.join(sorted(unknown))}; expected keys among {', '.join(names)}."
            )
        return cls(**values)


def check_ratio(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number in (0, 1].")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}; expected an integer >= 0.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}.")
