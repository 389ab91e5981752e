"""Layer plans: cached generation equals uncached, plans equal what they say, and what cannot be right is refused."""

import copy
import json

import contract
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import HYBRIDS, VOCAB, assert_same_generation, sharpen, stream_layout, tiny_decoder
from transformers import AutoModelForCausalLM, DynamicCache

import mmskip
from mmskip import LayerPlanConfig, families
from mmskip.costs import torch_flops
from mmskip.hf.plans.block import decode_from
from mmskip.methods.layer_plan import export, preview, report, unified_released

FAMILIES = (
    "llama",
    "qwen3",
    "qwen3_mixed_window",
    "mistral_window",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi3",
    "olmo2",
    "cohere2",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
)
PLANS = {
    "identity": {},
    "drop": {"drop": (1, 2)},
    "drop_first": {"drop": (0, 1)},
    "fill": {"drop": (0, 2), "cache_policy": "recompute"},
    "attn": {"drop_attn": (1, 3)},
    "attn_fill": {"drop_attn": (0, 2), "cache_policy": "recompute"},
    "mlp": {"drop_mlp": (0, 2)},
    "joint": {"drop": (2,), "drop_attn": (1,), "drop_mlp": (3,)},
    "loop": {"order": (0, 1, 2, 2, 3)},
    "loop_part": {"order": (0, 1, 2, 1, 2, 3), "drop_attn": (2,)},
    "loop_fill": {"order": (0, 1, 1, 3), "cache_policy": "recompute"},
    "reorder": {"order": (0, 2, 1, 3)},
    "backwards": {"order": (3, 2, 1, 0)},
    "decode": {"drop": (1, 2), "phase": "decode"},
    "decode_fill": {"drop": (0, 2), "drop_mlp": (3,), "phase": "decode", "cache_policy": "recompute"},
    "decode_parts": {"drop_attn": (1,), "drop_mlp": (2,), "phase": "decode"},
    "prefill": {"drop": (1,), "drop_attn": (2,), "phase": "prefill", "cache_policy": "recompute"},
}
QUICK = ("joint", "loop_fill", "decode_fill")


def grid(*quick):
    """Every plan on every family; all plans on one family of full attention and one of mixed, some on the others, are
    quick."""
    return [
        pytest.param(
            name, plan, marks=[] if name in ("llama", "qwen3_mixed_window")[: len(quick)] or plan in quick else SLOW
        )
        for name in FAMILIES
        for plan in PLANS
    ]


SLOW = pytest.mark.slow
IDS = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))


def planned(name, plan):
    model = tiny_decoder(name)
    sharpen(model)
    config = LayerPlanConfig(**PLANS[plan])
    if name == "opt" and config.drop_mlp:
        with pytest.raises(ValueError, match="drop the entire block"):
            mmskip.apply_(model, config)
        pytest.skip("OPT has its MLP inline: refused")
    kinds = families.find(model).kinds
    firsts = {kinds.index(kind) for kind in kinds}
    if config.phase == "decode" and config.cache_policy == "skip" and firsts & {*config.drop, *config.drop_attn}:
        with pytest.raises(ValueError, match=r"attention of block 1.*in the decode phase alone"):
            mmskip.apply_(model, config)
        pytest.skip("block 1 is the first of its attention type: refused")
    return mmskip.apply_(model, config)


@pytest.mark.parametrize(("name", "plan"), grid(*QUICK))
def test_cached_generation_equals_uncached_padded_and_not(name, plan):
    _assert_cached_equals_uncached(name, plan, "sdpa")


@pytest.mark.parametrize(("name", "plan"), grid("joint"))
def test_cached_generation_equals_uncached_under_eager_attention(name, plan):
    _assert_cached_equals_uncached(name, plan, "eager")


def _assert_cached_equals_uncached(name, plan, attn):
    model = planned(name, plan)
    if name not in ("gemma2", "gpt_oss"):
        model.set_attn_implementation(attn)
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert_same_generation(model, inputs=IDS, **call)
    assert_same_generation(model, inputs=IDS, attention_mask=padding(), **call)


def padding():
    """Of a batch whose first row is padded at its start."""
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    return mask


@pytest.mark.parametrize(("name", "plan"), grid("joint"))
def test_static_caches_are_exact_or_refused(name, plan):
    model = planned(name, plan)
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    kinds, config = families.find(model).kinds, LayerPlanConfig(**PLANS[plan])
    stored = [kinds[block] for block in config.order or () if block not in config.drop_attn]
    grows = plan == "loop_fill" or any(stored.count(kind) > kinds.count(kind) for kind in kinds)
    if grows:
        with pytest.raises(ValueError, match=r"StaticCache; a plan that repeats blocks.*'dynamic'"):
            model.generate(IDS, cache_implementation="static", **call)
        return
    for mask in (None, padding()):
        static = model.generate(IDS, attention_mask=mask, cache_implementation="static", **call)
        assert torch.equal(static, model.generate(IDS, attention_mask=mask, use_cache=False, **call))


def run_blocks(model, ids, visits):
    """The reference: the layers of an untouched Llama one after the other, without a cache."""
    decoder = model.model
    x = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(x, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    for index, attn, mlp in visits:
        layer = decoder.layers[index]
        if attn:
            x = x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask)[0]
        if mlp:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x))


@pytest.mark.parametrize(
    ("plan", "visits"),
    [
        ("drop_first", [(2, 1, 1), (3, 1, 1)]),
        ("fill", [(1, 1, 1), (3, 1, 1)]),
        ("joint", [(0, 1, 1), (1, 0, 1), (3, 1, 0)]),
        ("loop_part", [(0, 1, 1), (1, 1, 1), (2, 0, 1), (1, 1, 1), (2, 0, 1), (3, 1, 1)]),
        ("backwards", [(3, 1, 1), (2, 1, 1), (1, 1, 1), (0, 1, 1)]),
    ],
)
def test_a_plan_runs_what_it_says_with_gradients(plan, visits):
    base = tiny_decoder("llama")
    model = mmskip.apply_(tiny_decoder("llama"), LayerPlanConfig(**PLANS[plan]))
    logits, expected = model(IDS).logits, run_blocks(base, IDS, visits)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, own), other in zip(model.named_parameters(), base.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", [*FAMILIES, *HYBRIDS])
def test_the_identity_plan_is_bit_exact_and_leaves_nothing_behind(name):
    model = tiny_decoder(name)
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with torch.no_grad():
        expected = model(IDS).logits
        mmskip.apply_(model, LayerPlanConfig())
        assert torch.equal(model(IDS).logits, expected) and list(model.state_dict()) == keys
    mmskip.remove_(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("mmskip" in key for m in model.modules() for key in vars(m))


def test_the_published_sets_of_unified_layer_skipping():
    assert unified_released(30, 5) == (0, 6, 12, 18, 24, 29)
    assert unified_released(30, 10) == (0, 15, 29)
    assert unified_released(32, 1.5) == (*range(20), 31)
    with pytest.raises(ValueError, match="leaves 1 of 30 blocks"):
        unified_released(30, 20)
    model = tiny_decoder("llama", num_hidden_layers=30)
    text = str(preview(model, LayerPlanConfig.unified(5)))
    assert "[0, 6, 12, 18, 24, 29]" in text and "counted speed-up" in text and "asked for 5" in text


def test_a_speed_up_out_of_reach_is_said(caplog):
    model = tiny_decoder("llama", num_hidden_layers=4)
    found = preview(model, LayerPlanConfig.unified(100, "balanced"))
    assert found.order == (0, 3) and "asked for a speed-up of 100; two of 4 blocks" in caplog.text
    assert f"{found.speedup:.3g}" in caplog.text


def test_balanced_picks_the_nearest_counted_speed_up_head_included():
    model = tiny_decoder("llama", num_hidden_layers=12, vocab_size=400)
    found = preview(model, LayerPlanConfig.unified(1.6, "balanced"))
    below, above = found.reachable
    assert below <= 1.6 < above and min(abs(below - 1.6), abs(above - 1.6)) == abs(found.speedup - 1.6)
    mmskip.apply_(model, LayerPlanConfig.unified(1.6, "balanced"))
    assert mmskip.report(model) == {"LayerPlanConfig": found}
    with pytest.warns(FutureWarning, match="preview there"):
        assert report(model, LayerPlanConfig.unified(1.6, "balanced")) == found
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.randint(3, VOCAB, (1, 255)), past_key_values=cache)
        with mmskip.trace(model) as trace:
            model(IDS[:1, :1], past_key_values=cache)
    assert mmskip.cost(model, trace).ideal_speedup == pytest.approx(found.speedup, rel=1e-6)


@pytest.mark.parametrize("policy", ["skip", "recompute"])
def test_decoded_tokens_skip_and_the_prompt_does_not(policy):
    base, model = tiny_decoder("llama"), tiny_decoder("llama")
    mmskip.apply_(model, LayerPlanConfig(drop=(1, 2), phase="decode", cache_policy=policy))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :10], past_key_values=cache)
        steps = [model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(10, 14)]
        with decode_from(model.model, 10):
            whole = model(IDS).logits
        prompt = base(IDS[:, :10]).logits
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 10:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[:, :10], prompt, atol=1e-5, rtol=1e-5)
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == ([14, 14, 14, 14] if policy == "recompute" else [14, 10, 10, 14])
    if policy == "skip":
        with pytest.raises(RuntimeError, match=r"holds 10 tokens, the stream 14.*cache_policy='recompute'"):
            model(IDS, past_key_values=cache)
    else:
        with torch.no_grad(), decode_from(model.model, 10):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_beams_and_later_turns_on_a_filled_cache(name):
    model = planned(name, "joint")
    assert_same_generation(
        model, inputs=IDS, max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    call = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    first = model.generate(IDS, return_dict_in_generate=True, **call)
    ids = torch.cat([first.sequences, IDS[:, :4]], 1)
    again = model.generate(ids, past_key_values=first.past_key_values, **call)
    assert torch.equal(again, model.generate(ids, use_cache=False, **call))


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_drop_their_attention_blocks_and_refuse_the_others(name):
    model = tiny_decoder(name)
    sharpen(model)
    mmskip.apply_(model, LayerPlanConfig(drop=(1,)))
    assert_same_generation(model, inputs=IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    mmskip.remove_(model)
    for config in (LayerPlanConfig(drop=(2,)), LayerPlanConfig(order=(0, 1, 1, 2, 3)), LayerPlanConfig(drop_attn=(0,))):
        with pytest.raises(ValueError, match="state"):
            mmskip.apply_(model, config)
    assert not mmskip.applied(model)


BAD = {
    "drop holds -1": {"drop": (-1,)},
    "expected each index once": {"drop": (1, 1)},
    "order is empty": {"order": ()},
    "order holds \\[1\\], which drop leaves out": {"order": (0, 1), "drop": (1,)},
    "cache_policy is 'mask'; expected one of skip, recompute": {"cache_policy": "mask"},
    "phase is 'x'": {"phase": "x"},
    "speedup is 0.5": {"rule": "unified", "speedup": 0.5},
    "they go together": {"speedup": 2.0},
    "chooses the blocks": {"rule": "random", "drop": (1,)},
    "mode is 'balanced', which only rule='unified' reads; rule is None": {"mode": "balanced"},
    "count is 2, which only rule='random' reads; rule is None": {"count": 2},
    "seed is 1, which only rule='random' reads; rule is 'unified'": {"rule": "unified", "speedup": 2.0, "seed": 1},
}


def test_names_and_values_of_version_0_1_are_read_with_a_warning(tmp_path):
    config = LayerPlanConfig(drop=(1,), cache_policy="recompute")
    with pytest.warns(FutureWarning, match="kv is now cache_policy"):
        assert LayerPlanConfig(drop=(1,), kv="fill") == config
    with pytest.warns(FutureWarning, match="cache_policy='fill' is now 'recompute'"):
        assert LayerPlanConfig.from_dict({"drop": [1], "kv": "fill", "made_for": None}) == config
    with pytest.warns(FutureWarning, match="kv is now cache_policy"):
        assert config.kv == "recompute"
    with pytest.warns(FutureWarning, match=r"unified\(kv=...\) is now cache_policy"):
        assert LayerPlanConfig.unified(2.0, kv="compact") == LayerPlanConfig.unified(2.0)
    with pytest.raises(ValueError, match="kv is the old name of cache_policy"):
        LayerPlanConfig(kv="fill", cache_policy="skip")
    folder = tmp_path / "old"
    mmskip.save(mmskip.apply_(tiny_decoder("llama"), config), folder)
    file = folder / "mmskip.json"
    saved = json.loads(file.read_text())
    assert saved["methods"][0].pop("version") == 2
    values = saved["methods"][0]["config"]
    del values["cache_policy"], values["model_fingerprint"]
    values |= {"kv": "fill", "made_for": None, "mode": "balanced", "seed": 3}  # the last two were never read
    file.write_text(json.dumps(saved))
    with pytest.warns(FutureWarning, match="kv is now cache_policy"):
        assert mmskip.applied(mmskip.load_(tiny_decoder("llama"), folder)) == [config]


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=message):
        LayerPlanConfig(**BAD[message])


UNFIT = {
    "names block 4; the model has 4 blocks": ("llama", {"drop": (4,)}),
    "made for 5 blocks; this model has 4": ("llama", {"layers": 5}),
    "leaves out every full attention": ("llama", {"drop_attn": (0, 1, 2, 3)}),
    "leaves nothing to run": ("llama", {"drop": (0, 1, 2, 3)}),
    "count is 4": ("llama", {"rule": "random", "count": 4}),
    "leaves out the attention of block 0.*in the decode phase alone": ("llama", {"drop": (0,), "phase": "decode"}),
    "repeats or moves blocks in the decode phase": ("llama", {"order": (0, 1, 1), "phase": "decode"}),
    "phase='prefill' needs cache_policy='recompute'": ("llama", {"drop": (1,), "phase": "prefill"}),
    "leaves out every sliding attention": ("gemma2", {"drop": (0, 2)}),
    "OPTDecoderLayer\\) has no single module for its MLP": ("opt", {"drop_mlp": (1,)}),
    r"LayerPlanConfig\(drop=\(1,\)\) and LayerPlanConfig\(drop=\(2,\)\) do not compose on one model": ("llama", None),
}


@pytest.mark.parametrize("message", UNFIT)
def test_plans_that_do_not_fit_are_refused_before_anything_changes(message):
    name, fields = UNFIT[message]
    model = tiny_decoder(name)
    if fields is None:
        mmskip.apply_(model, LayerPlanConfig(drop=(1,)))
        fields = {"drop": (2,)}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        mmskip.apply_(model, LayerPlanConfig(**fields))
    assert [type(m) for m in model.modules()] == classes


def test_a_cache_filled_without_the_plan_is_refused():
    model = tiny_decoder("llama")
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)
    mmskip.apply_(model, LayerPlanConfig(drop=(0,)))
    assert model(IDS[:, :1], past_key_values=cache).logits.shape[1] == 1
    mmskip.remove_(model)
    with pytest.raises(RuntimeError, match="holds 14 tokens"):
        mmskip.apply_(model, LayerPlanConfig(drop=(1,), cache_policy="recompute"))(IDS, past_key_values=_short(cache))


def _short(cache):
    cache.layers[1].keys = cache.layers[1].keys[..., :-1, :]
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_mixed_window", "smollm3", "gpt2", "gpt_neox", "opt"])
def test_an_exported_plan_is_a_stock_smaller_checkpoint(name, tmp_path):
    model = tiny_decoder(name)
    mmskip.apply_(model, LayerPlanConfig(order=(0, 3, 2, 2, 1)))
    with torch.no_grad():
        expected = model(IDS).logits
        folder = export(model, tmp_path / "small")
        small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert small.config.num_hidden_layers == 5 and not list(tmp_path.glob(".*"))
        torch.testing.assert_close(small(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="holds files already"):
        export(model, folder)


def test_plans_that_are_no_model_of_their_own_are_not_exported(tmp_path):
    model = mmskip.apply_(tiny_decoder("llama"), LayerPlanConfig(drop_attn=(1,)))
    with pytest.raises(ValueError, match="leaves out attentions or MLPs"):
        export(model, tmp_path / "small")
    with pytest.raises(ValueError, match="apply_ one first"):
        export(mmskip.remove_(model), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_round_trips_and_copies(tmp_path):
    model = mmskip.apply_(tiny_decoder("llama"), LayerPlanConfig(drop=(1,), drop_attn=[2]))
    mmskip.save(model, tmp_path)
    again = mmskip.load_(tiny_decoder("llama"), tmp_path)
    copied = copy.deepcopy(model)
    assert mmskip.applied(again) == mmskip.applied(model)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
        copied.model.layers[3].mlp.down_proj.weight.zero_()
        assert torch.equal(model(IDS).logits, expected) and not torch.equal(copied(IDS).logits, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_decoder("llama").train()
        mmskip.apply_(model, LayerPlanConfig(order=(0, 2, 1, 2), drop_attn=(1,)))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("first", ["plan", "lora"])
def test_lora_before_and_after(first):
    model = tiny_decoder("llama")
    config = LayerPlanConfig(drop=(1,), drop_attn=(2,))
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(mmskip.apply_(model, config), lora) if first == "plan" else get_peft_model(model, lora)
    if first == "lora":
        mmskip.apply_(model, config)
    model(input_ids=IDS).logits.square().sum().backward()
    trained = {int(n.split("layers.")[1][0]) for n, p in model.named_parameters() if p.grad is not None and "lora" in n}
    assert trained == {0, 2, 3}


def test_token_routing_composes_with_plans_of_other_blocks_and_is_refused_on_the_same():
    layout = stream_layout(1, tokens=8, text=2, lead=4)[None].expand(2, -1)
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(keep=0.5, layers=(1,), router="norm"))
    with pytest.raises(
        ValueError, match=r"LayerPlan.* and MoDConfig.* do not compose( on one stack)?: both claim block\.1\."
    ):
        mmskip.apply_(model, LayerPlanConfig(drop_attn=(1,)))
    mmskip.apply_(model, LayerPlanConfig(drop=(2,), drop_mlp=(3,)))
    sharpen(model)
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert_same_generation(model, inputs=IDS, layout=layout, **call)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS, layout=layout)
    assert [layer.ran for layer in trace.forwards[0].layers] == [28, 20, 0, 28]


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("plan", ["joint", "loop_part", "reorder", "attn_fill"])
def test_counted_flops_agree_with_torch(name, plan):
    model = mmskip.apply_(tiny_decoder(name, hidden_size=128, intermediate_size=256), LayerPlanConfig(**PLANS[plan]))
    cache = DynamicCache(config=model.config) if "fill" in plan else None
    with torch.no_grad(), mmskip.trace(model) as trace, torch_flops() as counter:
        model(IDS, past_key_values=cache, use_cache=cache is not None)
    cost = mmskip.cost(model, trace)
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=4e-3)
    if cache is not None:
        stored = [sum(t.numel() * t.element_size() for t in (e.keys, e.values)) for e in cache.layers]
        assert [layer.kv_bytes for layer in trace.forwards[0].layers] == stored


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["drop", "joint", "reorder"])
def test_a_plan_compiles_into_one_graph(plan):
    model = mmskip.apply_(tiny_decoder("llama"), LayerPlanConfig(**PLANS[plan]))
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="eager")(IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected)


CONTRACT = [
    contract.Case(
        base,
        LayerPlanConfig(order=(0, 1, 2, 1, 2), drop_mlp=(1,)),
        LayerPlanConfig(),
        {"drop": (-1,), "drop_attn": (1, 1), "cache_policy": "all", "phase": "never", "count": -1, "seed": -1},
        compiles=base is contract.DECODER,
        trains=base is contract.DECODER,
    )
    for base in (contract.DECODER, contract.VLM)
]
