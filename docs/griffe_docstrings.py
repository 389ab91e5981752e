"""Docstrings as griffe reads them: doctests stand under `Example:` or bare, and parameters may share one line."""

import re
from typing import Any

from griffe import Extension, Object

SHARED = re.compile(r"^    (\w+(?:, \w+)+):((?:.*\n?)(?:^        .*\n?|^\n(?=        ))*)", re.M)
BARE = re.compile(r"(?:^>>> .*\n(?:^(?:>>> |\.\.\. |\S).*\n?)*)", re.M)


class Docstrings(Extension):
    """Rewrite docstrings before they are parsed."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for everything that may have a docstring."""
        if obj.docstring is None:
            return
        text = re.sub(r"^Example:", "Examples:", obj.docstring.value, flags=re.M)
        text = BARE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
        obj.docstring.value = SHARED.sub(_each, text)


def _each(match: re.Match[str]) -> str:
    """One entry per parameter of a shared line."""
    rest = match[2].rstrip("\n")
    tail = match[2][len(rest) :]
    return "\n".join(f"    {name}:{rest}" for name in match[1].split(", ")) + tail
