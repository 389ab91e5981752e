"""Routed tiny decoders and their inputs."""

import copy
from unittest.mock import ANY

import torch
from tiny_decoders import DECODERS, VOCAB, randomize_routers, stream_layout, tiny_decoder

import mmskip

CORE = ("llama", "qwen3", "mistral_window", "qwen3_mixed_window", "gemma3_text")


def routed(name: str, keep: float = 0.3, gate: str = "sigmoid", **config):
    overrides = config.pop("model", {})
    model = tiny_decoder(name, **overrides)
    base = copy.deepcopy(model)
    mmskip.apply_(model, mmskip.MoDConfig(keep=keep, gate=gate, **config))
    randomize_routers(model)
    return model, base


def example(frames: int = 4, seed: int = 0, **layout):
    row = stream_layout(frames, **layout)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, row.shape, generator=generator)[None], row[None]


def families(core_values, value):
    """Every family with one value, the representative ones with all."""
    return [(name, v) for name in DECODERS for v in (core_values if name in CORE else (value,))]


class PassingSlotLayer:
    """A slot layer that leaves the cache as it is and announces entries as if all were kept."""

    def __init__(self, cache, index, window):
        self.total = ANY

    def begin(self, slots, valid, total, frames, host_valid):
        return slots, valid, valid is None, host_valid
