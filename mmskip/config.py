"""Shared parts of all method configs: versions, the JSON round trip, deprecated names, and the checks of fields."""

import functools
import math
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Self, TypeVar

Convert = Callable[[dict[str, Any]], dict[str, Any]]
C = TypeVar("C", bound=type)


class MethodConfig:
    """Base of the frozen dataclasses that describe a method.

    Attributes:
        VERSION: of the fields and their meaning. `mmskip.save` writes it, and `from_dict` hands older settings to
            `upgrade`. Raise it when a saved value means something else than before; a new field needs no new version.
        ASPECTS: what the method claims of a module (see `mmskip.composition`), for the tables of the documentation.
    """

    VERSION: ClassVar[int] = 1
    ASPECTS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Turn settings that an older `version` wrote into settings of today. Names and values that are only spelt
        differently today are better given to `renamed`, which serves YAML and Python calls too."""
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary; `from_dict` reverses it."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], version: int | None = None) -> Self:
        """Build a config from what `to_dict` returned.

        Args:
            version: the `VERSION` that wrote `values`; None: today's.

        Raises:
            ValueError: an unknown key, a value out of range, or a version newer than this one.
        """
        if version is not None and version not in range(1, cls.VERSION + 1):
            raise ValueError(
                f"{cls.__name__} was saved in version {version!r}; this mmskip reads versions up to {cls.VERSION}: "
                "update it."
            )
        given = dict(values)
        if version is not None and version < cls.VERSION:
            given = cls.upgrade(given, version)
        given = current(cls, given)
        hints = typing.get_type_hints(cls)
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        unknown = set(given) - set(names)
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no {', '.join(sorted(unknown))}; expected keys among {', '.join(names)}."
            )
        return cls(**{name: _built(name, hints[name], value) for name, value in given.items()})


def _plain(value: Any) -> Any:
    """Return a JSON-ready form of a field."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _built(name: str, hint: Any, value: Any) -> Any:
    """The dataclass that a field asks for, where it was given as a dictionary. Among several it is the first one that
    has all keys."""
    if not isinstance(value, Mapping):
        return value
    nested = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)]
    for kind in nested:
        given = current(kind, dict(value))
        if set(given) <= {f.name for f in fields(kind)}:
            hints = typing.get_type_hints(kind)
            try:
                return kind(**{key: _built(f"{name}.{key}", hints[key], item) for key, item in given.items()})
            except TypeError as error:  # a setting without a default is missing
                raise ValueError(f"{name} is {dict(value)!r}: {error}.") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    if nested:
        known = " or ".join(f"{kind.__name__} ({', '.join(f.name for f in fields(kind))})" for kind in nested)
        raise ValueError(f"{name} has the keys {', '.join(map(str, value))}; expected those of {known}.")
    return value


def renamed(
    names: Mapping[str, str] | None = None,
    values: Mapping[str, Mapping[Any, Any]] | None = None,
    convert: Convert | None = None,
    old: Sequence[str] = (),
) -> Callable[[C], C]:
    """Keep the old spelling of a dataclass's settings, with a FutureWarning: as keywords in Python, as keys of
    `from_dict` (saved adapters and runs), as `init_args` in YAML (see `current_settings`), and as attributes.

    To be written above `@dataclass(frozen=True)`:

        @renamed({"after": "after_layer"}, values={"gate": {"own": "separate"}})

    Args:
        names: old field -> field of today.
        values: field of today -> {old value: value of today}.
        convert: for what is more than that: turns settings with keys of `old` into settings of today. It runs after
            `names` and `values`.
        old: the keys that `convert` takes, which are fields no more.
    """

    def add(cls: C) -> C:
        cls._renamed = (dict(names or {}), dict(values or {}), convert, tuple(old))  # type: ignore[attr-defined]
        original = cls.__init__  # type: ignore[misc]
        order = [f.name for f in fields(cls) if f.init]

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if len(args) > len(order):
                raise TypeError(f"{cls.__name__} takes {len(order)} settings, but {len(args)} were given.")
            positional = dict(zip(order, args, strict=False))
            twice = set(positional) & set(kwargs)
            if twice:
                raise TypeError(f"{cls.__name__} got {', '.join(sorted(twice))} twice.")
            original(self, **current(cls, {**positional, **kwargs}))

        cls.__init__ = init  # type: ignore[misc]
        for name, today in (names or {}).items():
            setattr(cls, name, _old_attribute(cls.__name__, name, today))
        return cls

    return add


def _old_attribute(owner: str, name: str, today: str) -> property:
    def read(self: Any) -> Any:
        _warn(owner, f"{name} is now {today}", stacklevel=3)
        return getattr(self, today)

    return property(read, doc=f"Deprecated name of `{today}`.")


def _warn(owner: str, message: str, stacklevel: int = 4) -> None:
    warnings.warn(
        f"{owner}: {message}; the old spelling goes in the next release.", FutureWarning, stacklevel=stacklevel
    )


def current(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Spell the settings of `cls` as they are spelt today, see `renamed`.

    Raises:
        ValueError: a setting is given under its old and its new name.
    """
    if not hasattr(cls, "_renamed"):
        return values
    names, choices, convert, old = cls._renamed
    given = {}
    for key, value in values.items():
        today = names.get(key, key)
        if today != key:
            _warn(cls.__name__, f"{key} is now {today}")
            if today in values:
                raise ValueError(f"{key} is the old name of {today}; give one of them.")
        changes: Mapping[Any, Any] = choices.get(today, {})
        if isinstance(value, str) and value in changes:
            _warn(cls.__name__, f"{today}={value!r} is now {changes[value]!r}")
            value = changes[value]
        given[today] = value
    found = [key for key in old if key in given]
    if found and convert is not None:
        today = convert(dict(given))
        spelt = ", ".join(f"{key}={value!r}" for key, value in today.items() if key not in given or given[key] != value)
        _warn(cls.__name__, f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} now spelt {spelt}")
        given = today
    return given


_RETIRED: dict[str, Callable[[dict[str, Any]], MethodConfig]] = {}


def retired(name: str, convert: Callable[[dict[str, Any]], MethodConfig]) -> None:
    """Keep a config class that is gone readable, in saved adapters, runs and YAML: `convert` turns its settings into
    the config of today."""
    _RETIRED[name] = convert


def from_entry(types: Mapping[str, type], name: str, values: Mapping[str, Any], version: int | None = None) -> Any:
    """Build the config that was saved under a type's name.

    Args:
        types: config classes by name, see `mmskip.registry.config_types`.
        version: see `MethodConfig.from_dict`.

    Raises:
        ValueError: no such type, or a bad setting.
    """
    if name in _RETIRED:
        return _RETIRED[name](dict(values))
    if name not in types:
        raise ValueError(f"{name} is no method; this mmskip knows {', '.join(sorted(types))}.")
    return types[name].from_dict(values, version)  # type: ignore[attr-defined]


def current_settings(tree: Any, types: Mapping[str, type]) -> Any:
    """Spell the method configs in settings read from YAML as they are spelt today.

    Args:
        tree: nested lists and dictionaries; a dictionary with a `class_path` that ends in the name of a config type is
            a method config.
        types: config classes by name, see `mmskip.registry.config_types`.
    """
    if isinstance(tree, list):
        return [current_settings(item, types) for item in tree]
    if not isinstance(tree, dict):
        return tree
    name = str(tree.get("class_path", "")).rpartition(".")[2]
    given = tree.get("init_args")
    settings = dict(given) if isinstance(given, dict) else {}
    if name in _RETIRED:
        config = _RETIRED[name](settings)
        return {**tree, "class_path": f"mmskip.{type(config).__name__}", "init_args": config.to_dict()}
    if name in types:
        return {**tree, "init_args": current(types[name], settings)} if settings else tree
    return {key: current_settings(item, types) for key, item in tree.items()}


def read_old_spellings(types: Mapping[str, type]) -> None:
    """Make jsonargparse's YAML loader spell method configs as they are spelt today; see `current_settings`."""
    import jsonargparse
    import yaml

    loader = jsonargparse.get_loader("yaml")
    loader = getattr(loader, "original", loader)

    def load(stream: str) -> Any:
        return current_settings(loader(stream), types)

    load.original = loader  # type: ignore[attr-defined]
    jsonargparse.set_loader("yaml", load, exceptions=(yaml.YAMLError,))


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Raise ValueError unless `value` is a finite number between `low` and `high`.

    Args:
        open_low, open_high: the bound itself is no valid value.
        integer: only integers are valid.
        optional: None is valid.
    """
    if optional and value is None:
        return
    kinds = int if integer else (int, float)
    if not isinstance(value, bool) and isinstance(value, kinds) and math.isfinite(value):
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if above and below:
            return
    what = "an integer" if integer else "a number"
    none = ", or None" if optional else ""
    raise ValueError(f"{name} is {value!r}; expected {what}{_range(low, high, open_low, open_high)}{none}.")


def _range(low: float, high: float, open_low: bool, open_high: bool) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" {'>' if open_low else '>='} {low:g}"
    if math.isinf(low):
        return f" {'<' if open_high else '<='} {high:g}"
    return f" in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"


def check_ratio(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a number in (0, 1]."""
    check_number(name, value, 0, 1, open_low=True)


def check_count(name: str, value: Any, low: int = 0) -> None:
    """Raise ValueError unless `value` is an integer >= `low`."""
    check_number(name, value, low, integer=True)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}.")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; expected true or false.")


def check_indices(name: str, values: Any, *, repeats: bool = False, empty: bool = True) -> tuple[int, ...]:
    """Return block indices as a tuple: as they were given where they may repeat, else sorted.

    Args:
        repeats: an index may be given more than once.
        empty: no index at all is valid.

    Raises:
        ValueError: `values` is no list of integers >= 0, or an index is given twice, or none is.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping):
        raise ValueError(f"{name} is {values!r}; expected a list of block indices.")
    indices = tuple(_each_index(name, values))
    if not indices and not empty:
        raise ValueError(f"{name} is empty; expected block indices, integers >= 0.")
    if not repeats and len(set(indices)) != len(indices):
        raise ValueError(f"{name} is {list(indices)}; expected each index once.")
    return indices if repeats else tuple(sorted(indices))


def _each_index(name: str, values: Iterable[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} holds {value!r}; expected block indices, integers >= 0.")
        yield value
