"""Models of transformers by name, folder or `model_type`, with errors that say which of them was meant."""

import copy
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoConfig, PretrainedConfig

T = TypeVar("T")


def pretrained(what: str, name: str, load: Callable[..., T], hint: str = "") -> T:
    """Load a name or folder by `load` (a `from_pretrained`).

    A name whose first part is a folder of this machine (`data/vlm_base`) is looked for in the local cache only: most
    likely a folder was meant that is not there, and the hub is not asked for it.

    Args:
        what: the setting, for the error.
        hint: what else can be done, a sentence.

    Raises:
        ValueError: it is neither a local folder, nor in the local cache, nor to be downloaded.
    """
    if name.startswith("~"):
        raise ValueError(f"{what}={name!r} begins with '~', which is not expanded here; give the full path.")
    first = Path(name).parts[:1]
    meant_here = name.startswith((".", "/")) or name.count("/") > 1 or ("/" in name and Path(*first).is_dir())
    here = meant_here and not Path(name).exists()
    try:
        return load(name, local_files_only=True) if here else load(name)
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        reason = "the hub was not asked, for the name looks like a folder's" if here else reason
        where = "and not in the local cache" if here else "not in the local cache and not to be downloaded from here"
        raise ValueError(
            f"{what}={name!r} is not a local folder with files of transformers, {where} ({reason})."
            f"{hint and ' ' + hint}"
        ) from error
    except ImportError as error:
        raise ValueError(f"{what}={name!r} needs a package that is not installed: {str(error).strip()}") from error


def config_of(what: str, given: str | Mapping[str, Any], expected: str, hint: str = "") -> PretrainedConfig:
    """Return the configuration of a model: of a name or folder, or from a dict with `model_type`.

    Args:
        what: the setting, for errors.
        expected: what kind of model, with examples of `model_type`.
        hint: see `pretrained`.

    Raises:
        ValueError: see `pretrained`; an unknown `model_type`, or an unknown key of the dict.
    """
    if isinstance(given, str):
        return pretrained(what, given, AutoConfig.from_pretrained, hint)
    values = dict(given)
    model_type = values.pop("model_type", None)
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"{what} has model_type={model_type!r}; expected {expected}") from error
    refuse_unknown(what, values, {*defaults.to_dict(), *getattr(defaults, "attribute_map", {})})
    return AutoConfig.for_model(model_type, **copy.deepcopy(values))


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError if `given` holds a name that is not in `known`, with the nearest ones."""
    known = sorted(known)
    for key in given:
        if key not in known:
            near = get_close_matches(key, known) or known
            raise ValueError(f"{what} has the unknown key {key!r}; did you mean {', '.join(near)}?")
