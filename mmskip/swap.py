"""Change a model in place by swapping the classes of its modules.

A module keeps its parameters, keys, hooks and name; only its class becomes a cached subclass that puts a
mixin in front of the original `forward` (the same idea as FSDP2's `fully_shard`).
"""

import copyreg
import functools
import inspect
import pickle
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmskip.families.base import Site

_INSTALLED = "_mmskip_installed"


@dataclass(frozen=True)
class Change:
    """One module to be changed; made by `around`, `replace` or `children`.

    Attributes:
        site: name of the place, `block.3`; new weights are saved under it.
        module: what is changed.
        mixin: put in front of the module's class.
        state: what the mixin reads through `state_of`.
        children: new children, whose names must begin with `mmskip_`.
        aspect: what of the module changes, see `mmskip.composition`.
    """

    site: str
    module: nn.Module
    mixin: type
    state: Any
    children: dict[str, nn.Module] = field(default_factory=dict)
    aspect: str = ""


def around(
    site: Site, mixin: type, state: Any, aspect: str = "", children: Mapping[str, nn.Module] | None = None
) -> Change:
    """Run `mixin.forward` around the forward of a site's module.

    Args:
        state: what the mixin reads through `state_of`.
        aspect: what of the module changes, see `mmskip.composition`.
        children: new children, whose names must begin with `mmskip_`.
    """
    return Change(site.name, site.module, mixin, state, dict(children or {}), aspect)


def replace(site: Site, module: nn.Module, root: nn.Module) -> Change:
    """Put `module` in the place of a site's module, wherever it stands below `root`. The original is kept aside: it is
    no child any more (no parameters, no keys), but moves and changes its dtype with `module`, and `remove_` puts it
    back."""
    holders = tuple((p, key) for p in root.modules() for key, child in p._modules.items() if child is site.module)
    return Change(site.name, module, Replacement, Replaced(site.module, holders), aspect="module")


def children(site: Site, new: Mapping[str, nn.Module], aspect: str = "children") -> Change:
    """Give a site's module new children, whose names must begin with `mmskip_`; its forward stays."""
    return Change(site.name, site.module, Parent, None, dict(new), aspect)


class Parent:
    """Mixin of a module that only gets children."""


@dataclass(frozen=True)
class Replaced:
    """The module that a replacement stands for, and its places.

    Attributes:
        original: the module that stood there.
        holders: the modules whose child it was, with its name there.
    """

    original: nn.Module
    holders: tuple[tuple[nn.Module, str], ...]


class Replacement:
    """Mixin of a module that stands in the place of another."""

    def mmskip_begin(self: Any) -> None:
        """Take the place."""
        state: Replaced = state_of(self, Replacement)
        for parent, key in state.holders:
            parent._modules[key] = self

    def mmskip_end(self: Any) -> None:
        """Give the place back."""
        state: Replaced = state_of(self, Replacement)
        state.original.train(self.training)
        for parent, key in state.holders:
            parent._modules[key] = state.original

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """`.to(...)` and the like, of the original too."""
        state_of(self, Replacement).original._apply(fn, recurse)
        return super()._apply(fn, recurse)  # type: ignore[misc]


def is_swapped(module: nn.Module) -> bool:
    """Return whether the current class of `module` is one of ours."""
    return "_mmskip_base" in type(module).__dict__


def state_of(module: nn.Module, mixin: type) -> Any:
    """Return the state that `mixin` was installed with on `module`."""
    return module.__dict__[_INSTALLED][mixin.__name__][0]


def states(model: nn.Module) -> Iterator[Any]:
    """The states of all mixins installed in `model`."""
    for module in model.modules():
        for state, *_ in module.__dict__.get(_INSTALLED, {}).values():
            yield state


def added(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """New children in `model`: the site, the name, and the module that holds the child."""
    for module in model.modules():
        for _, names, site in module.__dict__.get(_INSTALLED, {}).values():
            for name in names:
                yield site, name, module


def replacements(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of `model` that stand in the place of others, with their sites."""
    for module in model.modules():
        installed = module.__dict__.get(_INSTALLED, {}).get(Replacement.__name__)
        if installed is not None:
            yield installed[2], module


def base_class(module: nn.Module) -> type:
    """Return the class of a module without our mixins."""
    cls = type(module)
    while "_mmskip_base" in cls.__dict__:
        cls = cls._mmskip_base  # type: ignore[attr-defined]
    return cls


def states_of(output: Any) -> Any:
    """Return the hidden states in a block's output: the output, or its first part."""
    return output[0] if isinstance(output, tuple) else output


def with_states(output: Any, states: Any) -> Any:
    """Return a block's output with other hidden states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


def bind(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by the parameter names of the original `forward`."""
    names: tuple[str, ...] = type(module)._mmskip_names  # type: ignore[attr-defined]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def hidden_states(module: nn.Module, argument: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the hidden states that a call of a site's module was given.

    Args:
        argument: of the site, see `Site.argument`.
    """
    names: tuple[str, ...] = type(module)._mmskip_names  # type: ignore[attr-defined]
    return bind(module, args, kwargs)[argument or names[0]]


def bind_call(
    module: nn.Module, key: str, missing: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return what the root handed to its block under `key`, and the block's other arguments by name.

    Args:
        missing: description used in the error message, e.g. 'block.3 got no layout'.

    Raises:
        RuntimeError: it handed down nothing.
    """
    bound = bind(module, args, kwargs)
    call = bound.pop(key, None)
    if call is None:
        raise RuntimeError(
            f"{missing}: {type(module).__name__} was called outside the model that mmskip was "
            "applied to, or a module in between drops unknown keywords."
        )
    return call, bound


def with_first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], change: Any) -> tuple[Any, ...]:
    """Return the positional arguments with the first one changed; one given by name is changed in `kwargs`."""
    if args:
        return (change(args[0]), *args[1:])
    name = type(module)._mmskip_names[0]  # type: ignore[attr-defined]
    kwargs[name] = change(kwargs[name])
    return args


def check_swappable(module: nn.Module, site: str) -> None:
    """Raise if swapping the class of `module` would have no effect on its calls.

    Raises:
        ValueError: the module carries an instance-level `forward` that is neither accelerate's hook nor the
            class's own method.
    """
    own = module.__dict__.get("forward")
    if own is None or "_old_forward" in module.__dict__ or _is_class_forward(module, own):
        return
    raise ValueError(
        f"{site} ({type(module).__name__}) has an instance-level `forward` ({own!r}): calls would bypass "
        "mmskip silently. Apply mmskip before the tool that patched it, or remove that patch first."
    )


def _is_class_forward(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward


@functools.cache
def _kind(base: type) -> type:
    """The metaclass of our subclasses of classes of kind `base`; copies know it as a class like any other, pickle asks
    `_refuse_pickle`."""
    kind = type("Swapped", (base,), {})
    copyreg.pickle(kind, _refuse_pickle)
    return kind


def _refuse_pickle(cls: type) -> Any:
    raise pickle.PicklingError(
        f"{cls.__name__} carries mmskip methods and cannot be pickled (torch.save(model), spawned workers): its class "
        "exists in this process only. Save model.state_dict() or call mmskip.save(model, folder), and build the model "
        "anew where it is needed: mmskip.load_(model, folder)."
    )


@functools.cache
def _subclass(mixin: type, base: type) -> type:
    names = tuple(
        p.name
        for p in inspect.signature(base.forward).parameters.values()  # type: ignore[attr-defined]
        if p.kind is p.POSITIONAL_OR_KEYWORD
    )[1:]
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        # transformers keys its output recorders on str(cls), and save_pretrained writes the class name
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_mmskip_base": base,
        "_mmskip_mixin": mixin,
        "_mmskip_names": names,
    }
    if "forward" in mixin.__dict__:
        namespace["forward"] = _with_signature(mixin.__dict__["forward"], base.forward)  # type: ignore[attr-defined]
    return _kind(type(base))(base.__name__, (mixin, base), namespace)


def _with_signature(forward: Any, original: Any) -> Any:
    """Copy a mixin's `forward` under the original's signature. A copy, not a wrapper: one more call per block costs
    more than many a mixin does."""
    copied = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(copied, original)


def _rebind_forward(module: nn.Module) -> None:
    """Point a stored bound `forward` (accelerate keeps one) at the forward of the present class."""
    own = module.__dict__.get("forward")
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    elif getattr(own, "__self__", None) is module:
        del module.__dict__["forward"]


def swap(change: Change) -> None:
    """Carry out one change.

    A mixin may have hooks. `mmskip_begin` changes more than the class; `mmskip_end` reverts `mmskip_begin`, even a
    partial one; `mmskip_check_end` raises RuntimeError if that is impossible. `mmskip_settle` runs once all changes of
    a method have succeeded and may release what was kept for a rollback.
    """
    module = change.module
    # the class first: it is the step that can fail, and nothing else has changed by then
    module.__class__ = _subclass(change.mixin, type(module))  # type: ignore[arg-type]
    module.__dict__.setdefault(_INSTALLED, {})[change.mixin.__name__] = (
        change.state,
        tuple(change.children),
        change.site,
    )
    for name, child in change.children.items():
        module.add_module(name, child)
    _rebind_forward(module)
    if hasattr(change.mixin, "mmskip_begin"):
        try:
            change.mixin.mmskip_begin(module)
        except BaseException:
            unswap(module)
            raise


def unswap(module: nn.Module) -> None:
    """Undo the latest change of `module`.

    Raises:
        RuntimeError: the present class is not ours (FSDP or another tool swapped it afterwards).
    """
    cls = type(module)
    if not is_swapped(module):
        raise RuntimeError(
            f"{cls.__name__} was changed by another tool after mmskip (its class is {cls.__qualname__!r}, not "
            "mmskip's); undo that first."
        )
    if hasattr(cls._mmskip_mixin, "mmskip_end"):  # type: ignore[attr-defined]
        cls._mmskip_mixin.mmskip_end(module)  # type: ignore[attr-defined]
    module.__class__ = cls._mmskip_base  # type: ignore[attr-defined]
    installed = module.__dict__[_INSTALLED]
    _, names, _ = installed.pop(cls._mmskip_mixin.__name__)  # type: ignore[attr-defined]
    if not installed:
        del module.__dict__[_INSTALLED]
    for name in names:
        del module._modules[name]
    _rebind_forward(module)


def swap_all(changes: Sequence[Change], finish: Callable[[], None] = lambda: None) -> None:
    """Carry out all changes, or none: whatever fails half-way is rolled back.

    Raises:
        ValueError: a module cannot be swapped (see `check_swappable`).
    """
    for change in changes:
        if "forward" in change.mixin.__dict__:
            check_swappable(change.module, change.site)
    done: list[Change] = []
    try:
        for change in changes:
            swap(change)
            done.append(change)
        finish()
    except BaseException:
        for change in reversed(done):
            unswap(change.module)
        raise
    for change in changes:
        if hasattr(change.mixin, "mmskip_settle"):
            change.mixin.mmskip_settle(change.module)
