"""Keep old names of arguments and functions for one release, with a FutureWarning."""

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def warn_deprecated(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that `old` is called `new` now; `stacklevel` as of `warnings.warn`, 3 for the caller's caller."""
    warnings.warn(f"{old} is now {new}; the old name goes in the next release.", FutureWarning, stacklevel=stacklevel)


def renamed_arguments(**names: str) -> Callable[[F], F]:
    """Decorate a function to accept old names of keyword arguments: old name -> name of today.

    Raises:
        TypeError: in a call, an argument is given under its old and its new name.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                if names[old] in kwargs:
                    raise TypeError(f"{old} is the old name of {names[old]}; give one of them.")
                warn_deprecated(f"{function.__qualname__}({old}=...)", f"{names[old]}=...")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def renamed_names(module: str, **names: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a module whose names have changed: old name -> name of today."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_deprecated(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return find
