"""Doctests of the docstrings as code: griffe reads them under `Examples:` alone, ours stand under `Example:`."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    """Rename the section."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for everything that has a docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:", "Examples:", obj.docstring.value, flags=re.M)
