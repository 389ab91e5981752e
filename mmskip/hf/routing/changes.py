"""The changes by which the blocks of a decoder process a subset of the tokens."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmskip.families.base import Site
from mmskip.hf.attention_override import override_change, override_config
from mmskip.hf.routing.block import RoutedBlock, RoutedState
from mmskip.hf.routing.call import check_backend
from mmskip.hf.routing.generate import LayoutGenerator
from mmskip.hf.routing.root import LayoutRoot, LayoutRootState
from mmskip.hf.routing.vlm import VisionGenerator, VisionRoot, VisionState
from mmskip.protocols import STATE, TokenPolicy
from mmskip.swap import Change, around


def routing_changes(
    view: Any,
    policies: Mapping[int, TokenPolicy],
    children: Mapping[int, dict[str, nn.Module]] | None = None,
    attention: str | None = None,
) -> list[Change]:
    """Let the blocks in `policies` process a subset of the tokens of every call.

    Args:
        view: a decoder or VLM (`mmskip.families.decoder.DecoderView`).
        policies: by block index.
        children: new modules of those blocks, by block index and name.
        attention: attention implementation of those blocks; None: the model's.

    Raises:
        ValueError: a block must see every token, or routed blocks cannot build masks for the attention implementation.
    """
    sites = view.sites("block")
    config = override_config(view.config, [sites[i].module for i in policies], attention)
    check_backend(config)
    kinds = view.attention_types()
    for index in policies:
        if kinds[index] == STATE:
            others = [i for i, kind in enumerate(kinds) if kind != STATE]
            raise ValueError(
                f"{sites[index].name} ({type(sites[index].module).__name__}) carries a state from token to token and "
                f"must see every token; blocks with attention are {others}."
            )
    changes = []
    for index, policy in policies.items():
        state = RoutedState(policy, index, view.windows[index], config, sites[index].name)
        new = (children or {}).get(index)
        changes.append(around(sites[index], RoutedBlock, state, aspect="tokens", children=new))
    if attention is not None:
        changes += [override_change(sites[index], config) for index in policies]
    return changes + _layout_changes(view)


def _layout_changes(view: Any) -> list[Change]:
    """Let the decoder, the VLM around it and `generate` take a layout, unless they do already."""
    changes = []
    new = not isinstance(view.root, LayoutRoot)
    if new:
        changes.append(around(_root("decoder", view.root), LayoutRoot, LayoutRootState(view.blocks)))
    outer = getattr(view, "outer", None)
    mixin: type = LayoutGenerator
    state: Any = view.root
    if outer is not None:
        mixin, state = VisionGenerator, VisionState(outer, view.root)
        new = not isinstance(outer, VisionRoot)
        if new:
            changes.append(around(_root("vlm", outer), VisionRoot, state))
    if new:
        changes += [around(_root("generate", module), mixin, state) for module in view.generators]
    return changes


def _root(name: str, module: nn.Module) -> Site:
    return Site(name, "root", module, 0)
