"""Routed models with a cache: in chunks, token by token, in beams, rolled back."""

import copy

import pytest
import torch
from mod_cases import CORE, example, families, routed
from tiny_decoders import (
    DECODERS,
    VOCAB,
    assert_same_generation,
    pad_rows,
    sharpen,
    stream_layout,
)
from transformers import DynamicCache

GENERATING = (
    "llama",
    "mistral_window",
    "gemma3_text",
    "opt",
    "gpt2",
    "gpt_neox",
    "deepseek_v3",
    "gpt_oss",
    "qwen3_next",
)


@pytest.mark.parametrize(("name", "frames_per_call"), families((1, 2, 3, 5), 2))
def test_a_stream_in_chunks_equals_one_forward(name, frames_per_call):
    model, _ = routed(name)
    ids, layout = example(5, lead=0)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        full = model(ids, layout=layout).logits
        for start in range(0, ids.shape[1], 11 * frames_per_call):
            part = slice(start, start + 11 * frames_per_call)
            parts.append(model(ids[:, part], layout=layout[:, part], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-5)


def test_routed_layers_store_only_what_they_processed():
    model, _ = routed("llama", keep=0.2)
    ids, layout = example(7, lead=1)
    cache = DynamicCache(config=model.config)
    model(ids, layout=layout, past_key_values=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [78, 22, 78, 22]
    assert cache.get_seq_length() == 78


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_equals_recomputing(name):
    model, _ = routed(name)
    ids, layout = example(3)
    cache = DynamicCache(config=model.config)
    tokens = torch.randint(3, VOCAB, (1, 6))
    text = torch.full_like(tokens, -1)
    with torch.no_grad():
        full = model(torch.cat([ids, tokens], 1), layout=torch.cat([layout, text], 1)).logits
        model(ids, layout=layout, past_key_values=cache)
        for i in range(tokens.shape[1]):
            step = model(tokens[:, i : i + 1], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(step, full[:, ids.shape[1] + i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate_with_and_without_a_cache_agree(name, how):
    model, _ = routed(name)
    layouts = [stream_layout(3), stream_layout(1)]
    ids = pad_rows([torch.randint(3, VOCAB, row.shape) for row in layouts], 0, "left")
    mask = pad_rows([torch.ones_like(row) for row in layouts], 0, "left")
    call = {"attention_mask": mask, "layout": pad_rows(layouts, -1, "left"), "max_new_tokens": 6, **how}
    sharpen(model)
    assert_same_generation(model, input_ids=ids, **call)


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_assisted_generation_rolls_the_cache_back_exactly(name):
    model, _ = routed(name)
    ids, layout = example(2)
    call = {"layout": layout, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    sharpen(model)
    plain = model.generate(ids, **call)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **call), plain)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CORE)
def test_padded_rows_go_on_from_their_cache_as_they_would_alone(name, side):
    model, _ = routed(name)
    layouts = [stream_layout(3), stream_layout(2, tokens=6)]
    rows = [torch.randint(3, VOCAB, row.shape) for row in layouts]
    more, more_layout = example(1, seed=3, lead=1)
    mask = pad_rows([torch.ones_like(row) for row in layouts], 0, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            pad_rows(rows, 0, side),
            attention_mask=mask,
            position_ids=positions,
            layout=pad_rows(layouts, -1, side),
            past_key_values=cache,
        )
        batch = model(
            more.expand(2, -1),
            attention_mask=torch.cat([mask, torch.ones(2, more.shape[1], dtype=torch.long)], 1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(more.shape[1]),
            layout=(more_layout + 50 * (more_layout >= 0)).expand(2, -1),
            past_key_values=cache,
        ).logits
        for i, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
            whole = torch.cat([row, more[0]])[None]
            alone = model(whole, layout=torch.cat([layout, more_layout[0] + 50 * (more_layout[0] >= 0)])[None]).logits[
                0
            ]
            if side == "right" and name in ("mistral_window", "qwen3_mixed_window", "gemma3_text") and i == 1:
                # transformers measures windows in padded places, so a gap inside the row shifts the base model too
                continue
            torch.testing.assert_close(batch[i], alone[len(row) :], atol=1e-5, rtol=1e-5)


def test_beams_repeat_select_and_reset_keep_a_cache_usable():
    model, _ = routed("llama")
    ids, layout = example(2)
    cache = DynamicCache(config=model.config)
    token = torch.tensor([[5]])
    with torch.no_grad():
        model(ids, layout=layout, past_key_values=cache)
        single = model(token, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        many = model(token.expand(2, 1), past_key_values=cache).logits
        torch.testing.assert_close(many, single.expand(2, -1, -1), atol=1e-6, rtol=1e-6)
        cache.reset()
        torch.testing.assert_close(
            model(ids, layout=layout, past_key_values=cache).logits, model(ids, layout=layout).logits
        )


@pytest.mark.parametrize("removed", [1, 12, 23])
def test_crop_removes_by_position(removed):
    model, _ = routed("llama")
    ids, layout = example(3)
    cache = DynamicCache(config=model.config)
    left = ids.shape[1] - removed
    with torch.no_grad():
        model(ids, layout=layout, past_key_values=cache)
        cache.crop(-removed)
        for i, layer in enumerate(cache.layers):
            assert layer.get_seq_length() == left, i
        fresh = torch.randint(3, VOCAB, (1, 4))
        again = model(fresh, layout=torch.full_like(fresh, -1), past_key_values=cache).logits
        whole = model(
            torch.cat([ids[:, :left], fresh], 1),
            layout=torch.cat([layout[:, :left], torch.full_like(fresh, -1)], 1),
        ).logits
    torch.testing.assert_close(again, whole[:, left:], atol=1e-5, rtol=1e-5)


def test_a_windowed_stream_keeps_a_bounded_cache():
    model, _ = routed("mistral_window")
    cache = DynamicCache(config=model.config)
    ids, layout = example(12, lead=0)
    sizes = []
    for start in range(0, ids.shape[1], 11):
        model(ids[:, start : start + 11], layout=layout[:, start : start + 11], past_key_values=cache)
        sizes.append([layer.keys.shape[-2] for layer in cache.layers])
    assert sizes[-1] == sizes[3]
