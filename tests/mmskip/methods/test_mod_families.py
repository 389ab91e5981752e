"""Every family of decoders: what is added comes off again, is saved, copied, trained; and what cannot be served says
why."""

import copy
import functools

import pytest
import torch
from masked_reference import masked_logits
from peft import LoraConfig, get_peft_model
from tiny_decoders import (
    DECODERS,
    HYBRIDS,
    VOCAB,
    blocks_of,
    randomize_routers,
    routers_of,
    stream_layout,
    tiny_decoder,
)
from tiny_vlms import collate, example_rows, tiny_vlm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import mmskip
from mmskip.families import decoder
from mmskip.hf import structure
from mmskip.hf.routing import block as routing_block
from mmskip.hf.routing import cache as routing_cache

SAMPLE = ("gpt2", "gpt_neox", "deepseek_v3", "gpt_oss", "gemma4_text", "qwen3_next", "nemotron_h")
# with the three of test_mod_training.py at least sixteen; the others are trained in the slow run
TRAINED = (*SAMPLE, "mixtral", "phi3", "gemma", "olmo2", "opt", "cohere", "stablelm")
TRAINED_ALL = [*TRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in DECODERS if name not in TRAINED)]
LAYOUT = stream_layout(2)[None]
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def routed(name, **config):
    model = mmskip.apply_(tiny_decoder(name), mmskip.MoDConfig(**{"keep": 0.3, "gate": "sigmoid", **config}))
    randomize_routers(model)
    return model


@pytest.mark.parametrize("name", DECODERS)
def test_removed_saved_and_copied(name, tmp_path):
    base = tiny_decoder(name)
    keys, dense = list(base.state_dict()), base(IDS).logits
    model = routed(name)
    expected = model(IDS, layout=LAYOUT).logits
    mmskip.save(model, tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(IDS, layout=LAYOUT).logits, expected)
    mmskip.remove_(other)
    assert list(other.state_dict()) == keys and torch.equal(other(IDS).logits, dense)
    assert torch.equal(mmskip.load_(other, tmp_path)(IDS, layout=LAYOUT).logits, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_cost_counts_every_family(name):
    model = routed(name)
    with torch.no_grad(), mmskip.trace(model) as trace:
        out = model(IDS, layout=LAYOUT, use_cache=True)
    cost = mmskip.cost(model, trace)
    assert 1 < cost.ideal_speedup < 3
    windowed = getattr(model.config, "sliding_window", None) is not None
    # a window shorter than the call leaves the dense layer less than the routed one still holds of that call
    assert cost.kv_bytes > 0 and (windowed or cost.kv_bytes < cost.dense_kv_bytes)
    layers = out.past_key_values.layers
    stored = sum(x.keys.nbytes + x.values.nbytes for x in layers if getattr(x, "keys", None) is not None)
    assert cost.kv_bytes == stored


@pytest.mark.parametrize("name", TRAINED_ALL)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = routed(name).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(3)
        model(IDS, layout=LAYOUT, labels=IDS, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", [n for n in TRAINED_ALL if n != "nemotron_h"])  # peft refuses all-linear there itself
@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_in_both_orders_trains_adapters_and_routers(name, lora_first):
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}
    model = tiny_decoder(name)
    config = mmskip.MoDConfig(keep=0.3, gate="sigmoid")
    if lora_first:
        model = mmskip.apply_(get_peft_model(model, LoraConfig(**settings)), config)
    else:
        model = get_peft_model(mmskip.apply_(model, config), LoraConfig(**settings, modules_to_save=["mmskip_router"]))
    model.train()(input_ids=IDS, layout=LAYOUT, labels=IDS).loss.backward()
    routers = {n: p.grad for n, p in model.named_parameters() if "mmskip_router" in n and "original_module" not in n}
    assert routers and all(g is not None and g.abs().sum() > 0 for g in routers.values())
    assert any(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    assert not any("mmskip" in n for n, _ in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_balancing_loss_of_experts_is_exact_or_refused(name):
    """It weighs the router logits of every block by one mask, which fits no block that has fewer tokens."""
    model, call = routed(name), {"labels": IDS, "layout": LAYOUT, "use_cache": False}
    masked = {**call, "attention_mask": torch.ones_like(IDS)}
    for wrong in (masked, {key: v.repeat(2, 1) if key != "use_cache" else v for key, v in call.items()}):
        ids = IDS.expand(len(wrong["labels"]), -1)
        with pytest.raises(ValueError, match=r"output_router_logits.*load-balancing loss cannot count"):
            model(ids, **wrong, output_router_logits=True)
    assert model(IDS, **masked).loss.isfinite()
    out = model(IDS, **call, output_router_logits=True)
    logits = torch.cat(out.router_logits)
    chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 4).sum(1).float().mean(0)
    torch.testing.assert_close(out.aux_loss, 4 * (chosen * logits.softmax(-1).mean(0)).sum())
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits"):
        model(IDS, **masked)


def test_the_balancing_loss_of_experts_is_refused_in_a_vlm():
    model = mmskip.apply_(tiny_vlm("qwen3_vl_moe"), mmskip.MoDConfig(keep=0.3))
    call, _ = collate("qwen3_vl_moe", example_rows("qwen3_vl_moe"))
    with pytest.raises(ValueError, match=r"output_router_logits.*load-balancing loss cannot count"):
        model(**call, labels=call["input_ids"], output_router_logits=True)


@pytest.mark.parametrize("name", HYBRIDS)
def test_blocks_with_a_state_stay_dense(name):
    model = tiny_decoder(name)
    with pytest.raises(ValueError, match=r"block\.2.*must see every token"):
        mmskip.apply_(model, mmskip.MoDConfig(layers=(2,)))
    assert [hasattr(b, "mmskip_router") for b in blocks_of(routed(name, layers="all"))] == [False] * 3 + [True]


def other_decoder(name, **settings):
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**sizes, **settings}))


REFUSED = {
    "falcon": ({}, "passes no unknown keywords"),
    "gptj": ({"rotary_dim": 4}, "passes no unknown keywords"),
    "bloom": ({}, r"BloomBlock declares no causal self-attention.*no unknown keywords"),
    "codegen": ({"rotary_dim": 4}, r"CodeGenBlock declares no causal self-attention.*no unknown keywords"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "MptBlock declares no causal self-attention"),
    "mamba": ({}, "MambaBlock declares no causal self-attention"),
    "llama4_text": (
        {
            "intermediate_size": 48,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "attention_chunk_size": 8,
        },
        "chunked_attention",
    ),
    "deepseek_v32": (
        {
            "intermediate_size": 48,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 4,
            "num_key_value_heads": 4,
            "n_group": 2,
            "topk_group": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 4,
        },
        "indexed_attention",
    ),
    "beam": ({"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}, "attention_scaling"),
    "minimax": (
        {
            "intermediate_size": 48,
            "head_dim": 8,
            "num_key_value_heads": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        "its own cache",
    ),
    "gemma4_text": (
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 50,
            "head_dim": 8,
        },
        "keys and values of others",
    ),
    "falcon_h1": (
        {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_d_ssm": 64,
            "intermediate_size": 48,
            "num_key_value_heads": 2,
        },
        "carries a state from token to token",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decoders_that_cannot_be_served_say_why(name):
    settings, reason = REFUSED[name]
    model = other_decoder(name, **settings)
    before = list(model.state_dict()), {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=f"no family fits.*{reason}"):
        mmskip.apply_(model, mmskip.MoDConfig(layers=(1,)))
    assert before == (list(model.state_dict()), {n: type(m) for n, m in model.named_modules()})


NO_LAYOUT = ("falcon", "gptj", "bloom", "codegen", "mpt", "mamba")
# in one forward or with a cache: what is raised, its words, and the file it comes from
CRASHES = {
    "deepseek_v32": ("forward", TypeError, "not subscriptable", "modeling_deepseek_v32.py"),
    "beam": ("forward", RuntimeError, "must match the size", "modeling_beam.py"),
    "minimax": ("generate", RuntimeError, "24 tokens of the stream in its cache, the model 0", "block.py"),
    "gemma4_text": ("generate", ValueError, "expected positions within", "tokens.py"),
    "falcon_h1": ("generate", ValueError, "Cannot get conv state", "cache_utils.py"),
    "qwen3_next": ("generate", ValueError, "Cannot get conv state", "cache_utils.py"),
}
GENERATE = {"layout": LAYOUT, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def routed_in_spite_of_the_refusal(name, monkeypatch):
    monkeypatch.setattr(decoder, "unfit", lambda *args: "")
    monkeypatch.setattr(structure, "_carries_state", lambda block, causal: False)
    monkeypatch.setattr(structure, "attention_of", lambda block, causal=True: any_state(block))
    monkeypatch.setattr(routing_block, "slot_layer", lenient_slot_layer)
    torch.manual_seed(0)
    model = (tiny_decoder(name) if name not in REFUSED else other_decoder(name, **REFUSED[name][0])).eval()
    base = copy.deepcopy(model)
    # a block with a state: the first of its kind stays dense
    index = 2 if name == "qwen3_next" else len(blocks_of(model)) - 1
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.3, gate="sigmoid", layers=(index,)))
    randomize_routers(model)
    return model, base


def test_every_refusal_is_shown_to_be_needed():
    assert {*NO_LAYOUT, *CRASHES, "llama4_text"} == {*REFUSED, "qwen3_next"}


@pytest.mark.parametrize("name", NO_LAYOUT)
def test_without_the_refusal_the_layout_would_not_reach_the_layers(name, monkeypatch):
    """Unknown keywords are dropped on the way: the error is our own, on the first call instead of in apply_."""
    model, _ = routed_in_spite_of_the_refusal(name, monkeypatch)
    with pytest.raises(ValueError, match="mmskip needs a layout"):
        model(input_ids=IDS % 47 + 1, layout=LAYOUT, use_cache=False)


@pytest.mark.parametrize("name", CRASHES)
def test_without_the_refusal_it_would_crash(name, monkeypatch):
    model, _ = routed_in_spite_of_the_refusal(name, monkeypatch)
    where, error, words, origin = CRASHES[name]
    ids = IDS % 47 + 1
    forward = functools.partial(model, input_ids=ids, layout=LAYOUT, use_cache=False)
    if where == "generate":
        assert forward().logits.isfinite().all()
    with pytest.raises(error, match=words) as caught:
        forward() if where == "forward" else model.generate(ids, **GENERATE)
    assert caught.traceback[-1].path.name == origin


def test_without_the_refusal_chunked_attention_would_be_wrong(monkeypatch):
    """Chunks would be counted in kept tokens instead of positions."""
    model, base = routed_in_spite_of_the_refusal("llama4_text", monkeypatch)
    ids = IDS % 47 + 1
    with torch.no_grad():
        expected = masked_logits(base, routers_of(model), ids, LAYOUT, 0.3, "sigmoid")
        out = model(input_ids=ids, layout=LAYOUT, use_cache=False).logits
    assert not torch.allclose(out, expected, atol=1e-4), "the refusal would not be needed"


def any_state(block):
    """A child with a place in the cache, attention or not."""
    return next((child for child in block.children() if getattr(child, "layer_idx", None) is not None), None)


def lenient_slot_layer(cache, index, window):
    """Puts our cache layer in the place of any other."""
    cache.layers += [routing_cache.SlotCacheLayer() for _ in range(index + 1 - len(cache.layers))]
    if not isinstance(cache.layers[index], routing_cache.SlotCacheLayer):
        cache.layers[index] = routing_cache.SlotCacheLayer(window)
    return cache.layers[index]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_two_configs_compose_in_a_vlm(name):
    base = tiny_vlm(name)
    call, _ = collate(name, example_rows(name), "left")
    ratios = {1: 0.5, 3: 0.2}
    one = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=list(ratios.values()), layers=tuple(ratios)))
    two = copy.deepcopy(base)
    for layer, keep in ratios.items():
        mmskip.apply_(two, mmskip.MoDConfig(keep=keep, layers=(layer,)))
    for model in (one, two):
        randomize_routers(model)
    with torch.no_grad():
        assert torch.equal(two(**call).logits, one(**call).logits)
        assert torch.equal(mmskip.remove_(two)(**call).logits, base(**call).logits)
