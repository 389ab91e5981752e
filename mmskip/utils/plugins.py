"""Plug-ins: what other packages register by entry points, loaded once, when it is first asked for."""

import functools
import warnings
from importlib.metadata import entry_points
from typing import Any


@functools.cache
def load_plugins(group: str) -> dict[str, Any]:
    """The objects that installed packages name in the entry points of `group`, by name. One that cannot be loaded is
    left out, with a warning."""
    found = {}
    for entry in entry_points(group=group):
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # a broken plug-in must not take the rest down
            warnings.warn(f"the plug-in {entry.name} ({entry.value}) cannot be loaded: {error!r}", stacklevel=2)
    return found
