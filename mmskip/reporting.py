"""One answer to "what ran, and what is held": `mmskip.report(model)`, whatever the methods.

A method registers a function that turns what it holds and what it did in the latest forwards into a `MethodReport`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from torch import Tensor, nn

from mmskip.composition import Applied
from mmskip.registry import applied


class MethodReport:
    """Base of the dataclasses that `report` returns. `str` of one is for people, `to_dict` for files."""

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary of its fields; tensors become lists."""
        assert is_dataclass(self) and not isinstance(self, type)
        found: dict[str, Any] = _plain(asdict(self))
        return found


@dataclass(frozen=True)
class AppliedReport(MethodReport):
    """Report of a method that keeps no record of what it did: its settings and where it stands.

    Attributes:
        config: settings, as a dictionary.
        family: the family that serves the model.
        sites: names of the sites that the method changes.
    """

    config: dict[str, Any]
    family: str
    sites: tuple[str, ...]

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config.items())
        return f"on {len(self.sites)} sites ({', '.join(self.sites)}) of a model of family {self.family}; {settings}"


Reporter = Callable[[Applied, nn.Module], MethodReport]
_REPORTERS: dict[type, Reporter] = {}


def register_report(config_type: type) -> Callable[[Reporter], Reporter]:
    """Decorator: the function reports on one application of a method, from its `Applied` record and the model.

    It raises nothing where the model did not run yet; its report says so. A method that registers none gets an
    `AppliedReport`.

    Raises:
        ValueError: the config type has a function already.
    """

    def add(reporter: Reporter) -> Reporter:
        if _REPORTERS.get(config_type, reporter) is not reporter:
            raise ValueError(f"{config_type.__name__} has a report function already.")
        _REPORTERS[config_type] = reporter
        return reporter

    return add


def report(model: nn.Module) -> dict[str, MethodReport]:
    """Say what each method on `model` holds, and what it did in the latest forwards.

    ```python
    for name, found in mmskip.report(model).items():
        print(name, found)
    ```

    Returns:
        A dataclass per method, by the name of its config class, oldest first; a second application of one method is
        called `MoDConfig#2`. Empty for a model without methods. What a method has not done yet is None or 0.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module.")
    found: dict[str, MethodReport] = {}
    counts: dict[str, int] = {}
    for record in applied(model, details=True):
        name = type(record.config).__name__
        counts[name] = counts.get(name, 0) + 1
        reporter = _REPORTERS.get(type(record.config), _settings)
        found[name if counts[name] == 1 else f"{name}#{counts[name]}"] = reporter(record, model)
    return found


def _settings(record: Applied, model: nn.Module) -> AppliedReport:
    config = record.config
    settings = config.to_dict() if hasattr(config, "to_dict") else asdict(config)
    return AppliedReport(settings, record.family, record.sites)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    return value
