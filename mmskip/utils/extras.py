"""Optional dependencies: what only some commands and methods need is an extra of the package."""

import importlib
import importlib.util
from types import ModuleType


def require(extra: str, module: str, purpose: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        extra: name of the extra in pyproject.toml that installs it.
        module: to import, such as `"diffusers"`.
        purpose: what needs it, the subject of the error message.

    Raises:
        ValueError: it is not installed or cannot be imported; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(missing(extra, module, purpose, str(error))) from error


def check_installed(extra: str, module: str, purpose: str) -> None:
    """Check that a module of an optional dependency is installed, without importing it.

    Raises:
        ValueError: it is not installed; the message names the extra.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ValueError(missing(extra, module, purpose, "not installed"))


def missing(extra: str, module: str, purpose: str, reason: str) -> str:
    """Return the error message for a missing optional dependency."""
    package = module.partition(".")[0]
    return f"{purpose} needs {package}, which cannot be imported ({reason}): pip install 'mmskip[{extra}]'."
