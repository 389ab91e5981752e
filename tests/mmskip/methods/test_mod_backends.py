"""Routed blocks under the attention backends of transformers, and under one of their own."""

import copy

import pytest
import torch
from mod_cases import routed
from tiny_decoders import VOCAB, pad_rows, routers_of, stream_layout, tiny_decoder
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import mmskip
from mmskip.ops import hf_attention, tokens
from mmskip.ops.hf_attention import register_attention


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        ("eager", "llama"),
        ("eager", "mistral_window"),
        # the compiler behind flex_attention takes minutes
        pytest.param("flex_attention", "mistral_window", marks=pytest.mark.slow),
        ("mmskip_ragged", "llama"),
        ("mmskip_ragged", "mistral_window"),
    ],
)
def test_every_attention_backend_gives_the_same(name, attention):
    register_attention()
    model, _ = routed(name)
    layouts = [stream_layout(2), stream_layout(1)]
    ids = pad_rows([torch.randint(3, VOCAB, row.shape) for row in layouts], 0, "left")
    mask = pad_rows([torch.ones_like(row) for row in layouts], 0, "left")
    call = {"attention_mask": mask, "layout": pad_rows(layouts, -1, "left")}
    with torch.no_grad():
        expected = model(ids, **call).logits[mask.bool()]
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(ids, **call).logits[mask.bool()], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_mixed_window"])
def test_routed_blocks_can_have_a_backend_of_their_own(name, monkeypatch):
    seen = []
    original = hf_attention.ragged_attention_forward
    monkeypatch.setattr(
        hf_attention, "ragged_attention_forward", lambda m, *a, **k: seen.append(m.layer_idx) or original(m, *a, **k)
    )
    model, base = routed(name)
    own = copy.deepcopy(base)
    mmskip.apply_(own, mmskip.MoDConfig(keep=0.3, gate="sigmoid", attention="mmskip_ragged"))
    own.load_state_dict(model.state_dict())
    layouts = [stream_layout(2), stream_layout(1)]
    ids = pad_rows([torch.randint(3, VOCAB, row.shape) for row in layouts], 0, "left")
    mask = pad_rows([torch.ones_like(row) for row in layouts], 0, "left")
    call = {"attention_mask": mask, "layout": pad_rows(layouts, -1, "left")}
    with torch.no_grad():
        expected = model(ids, **call).logits[mask.bool()]
        torch.testing.assert_close(own(ids, **call).logits[mask.bool()], expected, atol=1e-5, rtol=1e-5)
    assert sorted(seen) == sorted(routers_of(own)), "the routed blocks and no others"
    assert torch.equal(own.generate(ids, **call, max_new_tokens=5), model.generate(ids, **call, max_new_tokens=5))
    mmskip.remove_(own)
    with torch.no_grad():
        assert torch.equal(own(ids, attention_mask=mask).logits, base(ids, attention_mask=mask).logits)


class Waits(TorchDispatchMode):
    """Collects the operations inside some blocks whose result the host has to wait for."""

    WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten._unique")

    def __init__(self, blocks):
        super().__init__()
        self.seen = []
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: self.__enter__() and None)
            block.register_forward_hook(lambda *_: self.__exit__(None, None, None))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith(self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_packed_attention_of_routed_blocks_is_built_once_per_call_without_a_wait(name, side, monkeypatch):
    """Rows of different lengths, a second chunk and decoding steps; inside the window and beyond it."""
    model, base = routed(name)
    own = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, gate="sigmoid", attention="mmskip_ragged"))
    own.load_state_dict(model.state_dict())
    built, original = [], hf_attention.known_packing
    monkeypatch.setattr(hf_attention, "known_packing", lambda *a: built.append(1) or original(*a))
    monkeypatch.setattr(tokens, "_check", lambda *a: None)  # looks at positions on a CPU only
    waits = Waits([own.model.layers[i] for i in routers_of(own)])
    rows, text = [stream_layout(3), stream_layout(1, tokens=7)], torch.full((2, 1), -1)
    mask = pad_rows([torch.ones_like(row) for row in rows], 0, side)
    more = stream_layout(2, lead=1).expand(2, -1)
    caches, done = [DynamicCache(config=base.config) for _ in range(2)], 0
    with torch.no_grad():
        for layout in (pad_rows(rows, -1, side), more + 50 * (more >= 0), text, text):
            ids = torch.randint(3, VOCAB, layout.shape)
            done += layout.shape[1]
            mask = torch.cat([mask, mask.new_ones(2, done - mask.shape[1])], 1)
            ours, theirs = (
                m(ids, layout=layout, attention_mask=mask, past_key_values=c).logits
                for m, c in zip((own, model), caches, strict=True)
            )
            real = mask[:, -layout.shape[1] :].bool()
            torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)
    assert not waits.seen
    assert len(built) == 4, "one packing per call, not one per routed block"


def test_packed_attention_follows_a_cache_whose_rows_change():
    """Beams and rollbacks: what the host knows of the stored entries follows them."""
    model, base = routed("llama")
    own = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, gate="sigmoid", attention="mmskip_ragged"))
    own.load_state_dict(model.state_dict())
    rows = [stream_layout(3), stream_layout(1, tokens=7)]
    layout, mask = pad_rows(rows, -1, "left"), pad_rows([torch.ones_like(row) for row in rows], 0, "left")
    ids, token = torch.randint(3, VOCAB, layout.shape), torch.tensor([[5], [7], [9]])
    outputs = []
    for m in (own, model):
        cache = DynamicCache(config=base.config)
        with torch.no_grad():
            m(ids, layout=layout, attention_mask=mask, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
            cache.batch_select_indices(torch.tensor([0, 1, 3]))
            cache.crop(-1)
            seen = torch.cat([mask[[1, 0, 0], :-4], torch.ones(3, 1, dtype=torch.long)], 1)
            outputs.append(m(token, attention_mask=seen, past_key_values=cache).logits)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_a_backend_without_soft_caps_is_refused_where_they_are_needed():
    with pytest.raises(ValueError, match="soft-capped scores or attention sinks, which Gemma2Config"):
        mmskip.apply_(tiny_decoder("gemma2"), mmskip.MoDConfig(attention="mmskip_ragged"))


def test_an_unsupported_attention_backend_is_refused():
    model = tiny_decoder("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*sdpa"):
        mmskip.apply_(model, mmskip.MoDConfig())
