"""What a user gives as FILE.py:FUNCTION."""

import importlib.util
import sys
from pathlib import Path
from typing import Any


def call_function(path: Path, function: str) -> Any:
    """Call a function of a Python file without arguments.

    Raises:
        ValueError: there is no such file or function.
    """
    if not path.is_file() or not function:
        raise ValueError(f"{path}:{function} names no function; expected FILE.py:FUNCTION.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    # two functions of one file must meet the same classes
    module: Any = sys.modules.get(path.stem)
    if module is None or Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{path} has no function {function!r}.")
    return getattr(module, function)()
