"""Apply a method to a model: config type and model family -> handler -> changes."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from mmskip import composition, families
from mmskip.composition import Applied
from mmskip.swap import Change, is_swapped, swap_all, unswap
from mmskip.utils.plugins import load_plugins

_APPLIED = "_mmskip_applied"
Handler = Callable[[Any, Any], Sequence[Change]]
_HANDLERS: dict[type, dict[str, Handler]] = {}

M = TypeVar("M", bound=nn.Module)


def register(config_type: type, *served: str) -> Callable[[Handler], Handler]:
    """Register a handler: a function that turns (config, view of a model) into changes. It validates everything and
    changes nothing.

    Args:
        served: families, in the order in which they are tried. A config may have several handlers.

    Raises:
        ValueError: another config type has the same name.
    """

    def add(handler: Handler) -> Handler:
        for other in [known for known in _HANDLERS if known.__name__ == config_type.__name__]:
            if other is not config_type and _path(other) == _path(config_type):
                del _HANDLERS[other]  # defined anew: a cell of a notebook that runs again
            elif other is not config_type:
                raise ValueError(
                    f"{config_type.__module__}.{config_type.__name__} has the name of "
                    f"{other.__module__}.{other.__name__}, under which its settings are saved; rename it."
                )
        handlers = _HANDLERS.setdefault(config_type, {})
        for family in served:
            if _path(handlers.get(family, handler)) != _path(handler):
                raise ValueError(f"{config_type.__name__} has a handler for the family {family!r} already.")
        handlers.update(dict.fromkeys(served, handler))
        return handler

    return add


def _path(definition: Any) -> tuple[str, str]:
    return definition.__module__, definition.__qualname__


def registered() -> dict[str, type]:
    """Return the config classes that are registered by now, by name; plug-ins are not looked for."""
    return {config_type.__name__: config_type for config_type in _HANDLERS}


def config_types() -> dict[str, type]:
    """Config classes by name, for configs read from files; those of plug-ins (entry points of the group
    `mmskip.methods`, each a module that registers) too."""
    load_plugins("mmskip.methods")
    return registered()


def families_of(config_type: type) -> tuple[str, ...]:
    """Return the families that a method serves, in the order in which they are tried: those of plug-ins, which know
    their models better, come first."""
    return tuple(sorted(_HANDLERS[config_type], key=lambda name: name in families.BUILT_IN))


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
    if isinstance(config, nn.Module):
        raise TypeError(f"config is a model ({type(config).__name__}); the order is mmskip.apply_(model, config).")
    known = config_types()  # loads plug-ins, which may serve their families by methods of mmskip
    if type(config) not in _HANDLERS:
        raise TypeError(f"config is {config!r}; expected an instance of one of {', '.join(sorted(known))}.")
    _check_unwrapped(model)
    view = families.find(model, families_of(type(config)))
    changes = list(_HANDLERS[type(config)][view.family](config, view))
    claims = composition.claims_of(changes)
    composition.check(config, claims, [(record.config, record.claims) for record in applied(model, details=True)])
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
    """Return the configs applied to `model`, oldest first; with `details`, `Applied` records with the claims."""
    records = [record for module in model.modules() for record in module.__dict__.get(_APPLIED, ())]
    return records if details else [record.config for record in records]


def remove_(model: M) -> M:
    """Take all methods off `model` in place: classes, keys and outputs are as before, and return it.

    Raises:
        RuntimeError: another tool (FSDP, ...) changed a module after mmskip, or a method was set to free what removal
            needs; nothing is removed then.
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
    while modules:
        for module in modules:
            while is_swapped(module):
                unswap(module)
            module.__dict__.pop(_APPLIED, None)
        # a module that was replaced is back, and may carry methods from before
        modules = [module for module in model.modules() if is_swapped(module)]
    return model
