"""The one verb: `apply_` finds the family of a model and the handler of a config, and changes the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from mmskip import families
from mmskip.swap import Change, is_swapped, swap_all, unswap

_APPLIED = "_mmskip_applied"
_HANDLERS: dict[tuple[type, str], Callable[[Any, Any], Sequence[Change]]] = {}

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Applied:
    """One method on a model: its config, the family that took it, and the sites it claims."""

    config: Any
    family: str
    sites: tuple[str, ...]


def register(config_type: type, family: str) -> Callable[[Any], Any]:
    """Decorator: the function turns (config, family view of a model) into the changes to be made. It
    validates everything and changes nothing."""

    def add(handler: Callable[[Any, Any], Sequence[Change]]) -> Callable[[Any, Any], Sequence[Change]]:
        _HANDLERS[config_type, family] = handler
        return handler

    return add


def config_types() -> dict[str, type]:
    """Config classes by name, for configs read from files."""
    return {config_type.__name__: config_type for config_type, _ in _HANDLERS}


def apply_(model: M, config: Any) -> M:
    """Change `model` in place as `config` says, and return it.

    Args:
        model: any model that a family fits (a Hugging Face decoder or VLM, also inside a peft model, ...).
        config: the frozen config of a method, e.g. `mmskip.MoDConfig(keep=0.2)`.

    Raises:
        TypeError: `config` is not the config of a method.
        ValueError: no family fits the model, the method does not serve the family, a setting does not fit
            the model, a site is claimed already, or the model is wrapped by FSDP or DDP. The model is then as it was.
    """
    methods = config_types()
    if isinstance(config, nn.Module):
        raise TypeError(f"config is a model ({type(config).__name__}); the order is mmskip.apply_(model, config).")
    if type(config).__name__ not in methods or not isinstance(config, methods[type(config).__name__]):
        raise TypeError(f"config is {config!r}; expected an instance of one of {', '.join(sorted(methods))}.")
    _check_unwrapped(model)
    served = [family for config_type, family in _HANDLERS if config_type is type(config)]
    view = families.find(model, served)
    changes = list(_HANDLERS[type(config), view.family](config, view))
    claims = tuple(change.site for change in changes if change.site.count("."))
    for earlier in applied(model, details=True):
        clash = sorted(set(claims) & set(earlier.sites))
        if clash:
            raise ValueError(
                f"{type(config).__name__} claims {', '.join(clash)}, which {earlier.config!r} holds already; "
                "remove_ that method first, or choose other layers."
            )
    record = Applied(config, view.family, claims)

    def remember() -> None:
        view.root.__dict__[_APPLIED] = (*view.root.__dict__.get(_APPLIED, ()), record)

    swap_all(changes, remember)
    return model


def _check_unwrapped(model: Any) -> None:
    """Weights added to a model that is already spread over processes would be neither sharded nor averaged."""
    wrappers = {"FSDPModule": "fully_shard", "FullyShardedDataParallel": "FSDP", "DistributedDataParallel": "DDP"}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for name in (cls.__name__ for cls in type(module).__mro__):
            if name in wrappers:
                tool = wrappers[name]
                raise ValueError(
                    f"this model is wrapped by {tool} already, which would not see what mmskip adds; call "
                    f"mmskip.apply_ before {tool}."
                )


def applied(model: nn.Module, details: bool = False) -> list[Any]:
    """The configs applied to `model`, oldest first; with `details`, `Applied` records with the sites."""
    records = [record for module in model.modules() for record in module.__dict__.get(_APPLIED, ())]
    return records if details else [record.config for record in records]


def remove_(model: M) -> M:
    """Take all methods off `model` in place: classes, keys and outputs are as before, and return it.

    Raises:
        RuntimeError: another tool (FSDP, ...) changed a module after mmskip, or a method was told to free what it would
            have to give back; nothing is removed then.
    """
    modules = list(model.modules())
    for module in modules:
        if "_mmskip_installed" in module.__dict__ and not is_swapped(module):
            raise RuntimeError(
                f"{type(module).__name__} was changed by another tool after mmskip.apply_ (FSDP2's fully_shard, for "
                "one); undo that first."
            )
        check_end = getattr(module, "mmskip_check_end", None)
        if check_end is not None:
            check_end()
    for module in modules:
        while is_swapped(module):
            unswap(module)
        module.__dict__.pop(_APPLIED, None)
    return model
