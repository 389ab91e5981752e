"""Give single blocks another attention implementation than the model's.

Attention modules of transformers ask `self.config` which function to call. An overridden attention reads a view of
that config which names another function; the config itself, the other blocks and the weights stay as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmskip.families.base import Site
from mmskip.swap import Change, around, state_of


class ConfigView:
    """A config with another attention implementation; everything else is read from the original.

    Args:
        config: the original.
        implementation: name of an attention function registered with transformers.
    """

    def __init__(self, config: Any, implementation: str) -> None:
        self._config = config
        self._attn_implementation = implementation

    @property
    def original(self) -> Any:
        """The original config."""
        return self._config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


@dataclass(frozen=True)
class OverrideState:
    """State of an overridden attention.

    Attributes:
        config: the view that it reads in place of the model's config.
        probe: receives the scores of its attention function, see `mmskip.hf.probes.attention`; None: no scores.
    """

    config: ConfigView
    probe: Any = None


class OverriddenAttention(nn.Module):
    """Mixin of an attention module: its `config` is a view of the model's."""

    @property
    def config(self) -> Any:
        """The config the attention reads."""
        return state_of(self, OverriddenAttention).config


def configured_attention(block: nn.Module) -> nn.Module:
    """Return the self-attention of a block.

    Raises:
        ValueError: the block has none that reads its implementation from a config.
    """
    for child in block.children():
        if getattr(child, "layer_idx", None) is not None and hasattr(child, "config"):
            return child
    raise ValueError(f"{type(block).__name__} has no self-attention that reads its implementation from a config.")


def override_config(config: Any, blocks: Iterable[nn.Module], implementation: str | None) -> Any:
    """Return the config of blocks with another attention implementation; None: the model's.

    Raises:
        ValueError: an implementation other than `mmskip_ragged`, or the model needs soft-capped scores or sinks.
    """
    if implementation is None:
        return config
    from mmskip.ops.hf_attention import NAME, register_attention

    if implementation != NAME:
        raise ValueError(f"attention is {implementation!r}; expected {NAME!r} or None, the model's own.")
    register_attention()
    if getattr(config, "attn_logit_softcapping", None) or any(
        hasattr(configured_attention(b), "sinks") for b in blocks
    ):
        raise ValueError(
            f"{NAME} has no soft-capped scores or attention sinks, which {type(config).__name__} asks for; use "
            "attention=None with attn_implementation='eager'."
        )
    return ConfigView(config, implementation)


def override_change(block: Site, config: ConfigView, probe: Any = None) -> Change:
    """Let the attention of a block read `config`.

    Args:
        probe: see `OverrideState`.

    Raises:
        ValueError: see `configured_attention`.
    """
    attention = configured_attention(block.module)
    site = Site(f"{block.name}.attn", "attn", attention, block.index, block.stack)
    return around(site, OverriddenAttention, OverrideState(config, probe), aspect="attn")
