"""Policies for the keys and values that skipped layers would have stored for a token, shared by every method.

| policy | entry of the token in a layer that it skips |
|---|---|
| `recompute` | the layer's own keys and values of the state that passes it by, computed when they are needed |
| `copy` | keys and values of the last layer that ran |
| `mask` | none: later tokens do not attend to it there (a masked place is kept, so that positions stay) |
| `skip` | none, and no place either: the cache of that layer is shorter |
"""

import warnings
from collections.abc import Sequence
from typing import Any

from mmskip.config import check_choice

CACHE_POLICIES = ("recompute", "copy", "mask", "skip")
ALIASES = {"project": "recompute", "fill": "recompute", "hole": "mask", "compact": "skip"}
"""Names of version 0.1."""


def canonical(value: Any) -> Any:
    """Return the name of today for one of version 0.1; anything else as it is."""
    return ALIASES.get(value, value) if isinstance(value, str) else value


def check_cache_policy(name: str, value: Any, choices: Sequence[str] = CACHE_POLICIES) -> str:
    """Return the policy that `value` names, with a FutureWarning for a name of version 0.1.

    Args:
        name: of the setting, for the error.
        choices: the policies that the method has.

    Raises:
        ValueError: no such policy.
    """
    found: str = canonical(value)
    check_choice(name, value if found not in choices else found, choices)
    if found != value:
        warnings.warn(f"{name}={value!r} is now called {name}={found!r}.", FutureWarning, stacklevel=4)
    return found
