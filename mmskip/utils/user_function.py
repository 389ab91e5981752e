"""Load a user-defined factory given as FILE.py:FUNCTION."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def call_function(path: Path, function: str) -> Any:
    """Call a function of a Python file without arguments.

    The file is run once per process and kept in `sys.modules`: two functions of one file share its classes, and
    dataclasses can resolve their annotations.

    Raises:
        ValueError: there is no such file or function.
    """
    if not path.is_file() or not function:
        raise ValueError(f"{path}:{function} names no function; expected FILE.py:FUNCTION.")
    module = _load(path.resolve())
    if not hasattr(module, function):
        raise ValueError(f"{path} has no function {function!r}.")
    return getattr(module, function)()


def _load(path: Path) -> ModuleType:
    # a unique name keeps a file called json.py from hiding a library
    name = f"mmskip_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    for known in (path.stem, name):
        module = sys.modules.get(known)
        if module is not None and Path(getattr(module, "__file__", None) or "").resolve() == path:
            return module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
