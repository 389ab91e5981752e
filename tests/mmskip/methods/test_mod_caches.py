"""Caches that cannot hold rows of different lengths are refused in words that say what to do; and compiled models."""

import functools

import pytest
import torch
from mod_cases import PassingSlotLayer
from tiny_decoders import VOCAB, blocks_of, randomize_routers, stream_layout, tiny_decoder
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, QuantizedCache, StaticCache

import mmskip

LAYOUT = stream_layout(2)[None]
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))
NAMES = ("llama", "mistral_window", "gpt2", "gpt_neox", "qwen3_next")


def routed(name, **config):
    model = mmskip.apply_(tiny_decoder(name), mmskip.MoDConfig(**{"keep": 0.3, "gate": "sigmoid", **config}))
    randomize_routers(model)
    return model


def quantized(config):
    """A quantized cache without the library that would do the quantizing."""
    cache = QuantizedCache.__new__(QuantizedCache)
    cache.layers, cache.offloading = DynamicCache(config=config).layers, False
    return cache


def offloaded(config):
    cache = DynamicCache(config=config)
    cache.offloading = True
    return cache


CACHES = {
    "StaticCache": lambda config: StaticCache(config=config, max_cache_len=64),
    "QuantizedCache": quantized,
    "DynamicCache offloaded to the CPU": offloaded,
    "EncoderDecoderCache": lambda config: EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config)),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", NAMES)
def test_caches_of_another_kind_are_refused_before_they_are_written(name, kind):
    model = routed(name)
    if kind == "EncoderDecoderCache" and name == "qwen3_next":
        pytest.skip("transformers makes no such cache of layers with a state")
    cache = CACHES[kind](model.config)
    with pytest.raises(ValueError, match=rf"past_key_values is an? {kind}.*DynamicCache"):
        model(IDS, layout=LAYOUT, past_key_values=cache)
    layers = [] if kind == "EncoderDecoderCache" else cache.layers
    assert not any(getattr(layer, "is_initialized", False) for layer in layers)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2"])
def test_generate_with_a_static_cache_says_what_to_do(name):
    model = routed(name)
    call = {"layout": LAYOUT, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ValueError, match=r"StaticCache.*leave cache_implementation out"):
        model.generate(IDS, cache_implementation="static", **call)
    assert torch.equal(
        model.generate(IDS, cache_implementation="dynamic", **call), model.generate(IDS, use_cache=False, **call)
    )


def test_without_the_refusal_a_static_cache_would_be_wrong(monkeypatch):
    """A decoded token would attend to the places that routed blocks left empty."""
    from mmskip.hf.routing import block as routing_block
    from mmskip.hf.routing import cache as routing_cache
    from mmskip.hf.routing import root as routing_root

    model = routed("llama")
    token = torch.tensor([[7]])
    monkeypatch.setattr(routing_root, "check_cache", lambda cache: None)
    monkeypatch.setattr(routing_cache, "check_cache", lambda cache: None)
    monkeypatch.setattr(routing_block, "slot_layer", PassingSlotLayer)
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        whole = torch.cat([IDS, token], 1), torch.cat([LAYOUT, torch.full_like(token, -1)], 1)
        expected = model(whole[0], layout=whole[1]).logits[:, -1]
        model(IDS, layout=LAYOUT, past_key_values=cache)
        out = model(token, layout=torch.full_like(token, -1), past_key_values=cache).logits[:, -1]
    assert not torch.allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["all ids", "new ids", "new ids and the whole layout"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma3_text"])
def test_a_second_turn_of_generate_equals_the_whole_conversation(name, form):
    """As in transformers, an attention mask of the whole conversation shows that the ids are new ones only."""
    model, cut = routed(name), 13
    mask = torch.ones_like(IDS)
    how = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(IDS, attention_mask=mask, layout=LAYOUT, **how)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :cut], layout=LAYOUT[:, :cut], past_key_values=cache)
    ids = IDS if form == "all ids" else IDS[:, cut:]
    layout = LAYOUT[:, cut:] if form == "new ids" else LAYOUT
    continued = model.generate(ids, attention_mask=mask, layout=layout, past_key_values=cache, **how)
    torch.testing.assert_close(torch.stack(continued.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("where", ["argument", "config of the call", "config of the model"])
def test_guidance_is_refused_in_generate(where):
    """Its unconditional calls would take the layout of the conditional prompt."""
    model = routed("llama")
    call = {"layout": LAYOUT, "max_new_tokens": 2, "do_sample": False}
    config = GenerationConfig(guidance_scale=1.5)
    if where == "config of the model":
        model.generation_config.guidance_scale = 1.5
    call |= {"argument": {"guidance_scale": 1.5}, "config of the call": {"generation_config": config}}.get(where, {})
    with pytest.raises(ValueError, match=r"guidance_scale is 1\.5.*second prompt"):
        model.generate(IDS, **call)
    assert model.generate(IDS, **{**call, "guidance_scale": 1.0}).shape[1] == IDS.shape[1] + 2


@pytest.mark.parametrize("name", ["mistral_window", "starcoder2", "gemma3_text", "llama"])
def test_a_cache_made_without_a_config_is_exact(name):
    """Its dense layers keep everything, also where the model has windows."""
    model, cut = routed(name), 13
    cache = DynamicCache()
    with torch.no_grad():
        expected = model(IDS, layout=LAYOUT, use_cache=False).logits
        parts = [model(IDS[:, :cut], layout=LAYOUT[:, :cut], past_key_values=cache).logits]
        parts.append(model(IDS[:, cut:], layout=LAYOUT[:, cut:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


TWICE = torch.tensor([[-1, 0, 0, 0, -1, 0, 0, 0, -1, 1, 1, 1]])


@pytest.mark.parametrize("kind", ["apart", "reordered rows", "in generate"])
def test_a_frame_whose_parts_are_divided_by_text_is_refused_in_two_calls(kind):
    model, cut = routed("llama"), 5
    ids, layout = IDS[:, : TWICE.shape[1]].repeat(2, 1), torch.cat([TWICE, torch.full_like(TWICE, -1)])
    cache, bad = DynamicCache(config=model.config), 0
    model(ids[:, :cut], layout=layout[:, :cut], past_key_values=cache)
    rest = {"layout": layout[:, cut:], "past_key_values": cache}
    if kind == "reordered rows":
        cache.reorder_cache(torch.tensor([1, 0]))
        rest["layout"], bad = layout[:, cut:].flip(0), 1
    if kind == "in generate":
        run = functools.partial(model.generate, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    else:
        run = model
    with pytest.raises(ValueError, match=rf"frame 0 of row {bad} continues from an earlier call"):
        run(ids[:, cut:], **rest)
    rest["layout"] = rest["layout"].masked_fill(rest["layout"] == 0, 7)
    assert model(ids[:, cut:], **rest).logits.isfinite().all()


@pytest.mark.parametrize("then", ["the frame", "text", "the frame from its start"])
def test_a_stream_cropped_within_a_frame_does_not_go_on(then):
    model, cache = routed("llama"), DynamicCache()
    start = int((LAYOUT[0] == 1).nonzero()[0])
    left = start if then == "the frame from its start" else start + 4
    with torch.no_grad():
        expected = model(IDS, layout=LAYOUT).logits
        model(IDS, layout=LAYOUT, past_key_values=cache)
        cache.crop(left - IDS.shape[1])
        if left == start:
            out = model(IDS[:, left:], layout=LAYOUT[:, left:], past_key_values=cache).logits
            torch.testing.assert_close(out, expected[:, left:], atol=1e-5, rtol=1e-5)
            return
        layout = LAYOUT[:, left:] if then == "the frame" else torch.tensor([[-1]])
        with pytest.raises(ValueError, match=rf"cropped to {left} tokens, within frame 1 of row 0.*{start} or less"):
            model(IDS[:, -layout.shape[1] :], layout=layout, past_key_values=cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_model_gives_the_same(name):
    """The root reads the layout on the host, where the graph breaks; routed and dense blocks are compiled."""
    model = routed(name)
    model.config.use_cache = False
    with torch.no_grad():
        expected = model(IDS, layout=LAYOUT).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(IDS, layout=LAYOUT).logits, expected, atol=1e-5, rtol=1e-5)


def test_compiled_blocks_are_not_compiled_again_at_the_same_shapes():
    model = routed("llama")
    model.config.use_cache = False
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    for block in blocks_of(model):
        block.compile(backend=counter, fullgraph=True)
    counts = []
    with torch.no_grad():
        for seed in range(4):
            ids = torch.randint(3, VOCAB, IDS.shape, generator=torch.Generator().manual_seed(seed))
            model(ids, layout=LAYOUT)
            counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[0] == counts[-1]


@pytest.mark.slow
def test_decoding_with_compiled_blocks_compiles_nothing_after_its_first_steps():
    model = routed("llama")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        plain, cache = [], DynamicCache(config=model.config)
        model(IDS, layout=LAYOUT, past_key_values=cache)
        tokens = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(1))
        for i in range(12):
            plain.append(model(tokens[:, i : i + 1], past_key_values=cache).logits)
        for block in blocks_of(model):
            block.compile(backend=counter)
        cache, counts = DynamicCache(config=model.config), []
        model(IDS, layout=LAYOUT, past_key_values=cache)
        for i in range(12):
            out = model(tokens[:, i : i + 1], past_key_values=cache).logits
            torch.testing.assert_close(out, plain[i], atol=1e-5, rtol=1e-5)
            counts.append(counter.frame_count)
    assert counts[-1] == counts[1], f"graphs compiled after each of 12 steps: {counts}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_a_compiled_training_step_gives_the_same_gradients(name):
    model = routed(name).train()
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        run(IDS, layout=LAYOUT, labels=IDS, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-5, rtol=1e-4, msg=key)
