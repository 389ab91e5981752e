"""Feed-forwards left out of saturated tokens: token by token, row by row, cached or not."""

import pytest
import torch
from tiny_decoders import VOCAB, assert_same_generation, saturating, sharpen, tiny_decoder
from torch.nn.functional import cosine_similarity

import mmskip
from mmskip import LayerPlanConfig, SkipPolicyConfig
from mmskip.calibration.importance import lac_activity
from mmskip.methods.skip_policy import left_out

FAMILIES = (
    "llama",
    "qwen3",
    "qwen3_mixed_window",
    "mistral_window",
    "gpt2",
    "gpt_neox",
    "phi3",
    "qwen3_moe",
    "cohere",
    "gemma2",
)
IDS = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_generation_equals_uncached_padded_and_static(name):
    model = saturating(name)
    config = SkipPolicyConfig.calibrated(model, [IDS], share=0.3, warmup=2)
    mmskip.apply_(model, config)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert_same_generation(model, inputs=IDS, **call)
    assert_same_generation(model, inputs=IDS, attention_mask=mask, **call)
    static = model.generate(IDS, attention_mask=mask, cache_implementation="static", **call)
    assert torch.equal(static, model.generate(IDS, attention_mask=mask, use_cache=False, **call))


def halves(layer, name):
    """What attention and MLP of an untouched block add to a state."""
    if name == "llama":
        return (
            lambda x, **call: layer.self_attn(layer.input_layernorm(x), **call)[0],
            lambda x: layer.mlp(layer.post_attention_layernorm(x)),
        )
    return (
        lambda x, **call: layer.post_attention_layernorm(layer.self_attn(x, **call)[0]),
        lambda x: layer.post_feedforward_layernorm(layer.mlp(x)),
    )


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_tokens_skip_as_the_reference_says_and_the_trace_counts_it(name):
    base, model = saturating(name), saturating(name)
    config = SkipPolicyConfig.calibrated(model, [IDS], share=0.3, warmup=3)
    decoder = base.model
    with torch.no_grad():
        x, ran = decoder.embed_tokens(IDS), []
        rotary = decoder.rotary_emb(x, torch.arange(12)[None])
        causal = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        done = torch.zeros(3, 12, dtype=torch.bool)
        for index, layer in enumerate(decoder.layers):
            attend, feed = halves(layer, name)
            x = x + attend(x, position_embeddings=rotary, attention_mask=causal)
            cold = index in (0, 5)
            y = x + feed(x)
            ran.append(36 if cold else int((~done).sum()))
            if cold:
                x = y
                continue
            y[done] = x[done]
            saturated = cosine_similarity(x, y, dim=-1) >= config.threshold
            saturated[:, :3] = False
            x, done = y, done | saturated
        expected = base.lm_head(decoder.norm(x))
        mmskip.apply_(model, config)
        with mmskip.trace(model) as trace:
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=1e-4)
    counted = [layer.ran if layer.mlp is None else layer.mlp for layer in trace.forwards[0].layers]
    assert counted == ran and min(ran) < 36
    assert mmskip.cost(model, trace).ideal_speedup > 1.02


def test_a_threshold_no_token_reaches_is_the_model_bit_for_bit():
    model = saturating()
    config = SkipPolicyConfig.calibrated(model, [IDS], share=0.3)
    with torch.no_grad():
        expected = model(IDS).logits
        never = SkipPolicyConfig(**{**config.to_dict(), "warmup": 100})
        assert torch.equal(mmskip.apply_(model, never)(IDS).logits, expected)
        mmskip.remove_(model)
        assert torch.equal(model(IDS).logits, expected)


def test_share_left_out():
    cosines = torch.tensor([[0.1, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]])
    # the first token is saturated after block 1, the second after block 0: 2 + 3 of 8 are left out
    assert left_out(cosines, 0.5) == 5 / 8 and left_out(cosines, 0.95) == 0


def test_models_without_saturation_are_refused():
    model = tiny_decoder("llama", num_hidden_layers=6)
    with torch.no_grad():
        for block, factor in zip(model.model.layers, (1, 5, 50, 1500, 2e5, 1), strict=True):
            block.mlp.down_proj.weight.mul_(factor)  # feed-forwards that change more and more
    with pytest.raises(ValueError, match=r"no saturation: over blocks 1 to 4.*rank correlation"):
        SkipPolicyConfig.calibrated(model, [IDS])
    with pytest.raises(ValueError, match="scales what its MLP adds"):
        SkipPolicyConfig.calibrated(tiny_decoder("granite", num_hidden_layers=4), [IDS])
    with pytest.raises(ValueError, match="no single module for its MLP"):
        SkipPolicyConfig.calibrated(tiny_decoder("opt"), [IDS])
    with pytest.raises(ValueError, match="leave 0 of 4 blocks"):
        SkipPolicyConfig.calibrated(tiny_decoder("llama"), [IDS], cold_first=4)
    with pytest.raises(ValueError, match="calibrated on no model"):
        mmskip.apply_(tiny_decoder("llama"), SkipPolicyConfig())
    for fields, message in (({"threshold": 2}, "threshold is 2"), ({"policy": "x"}, "policy is 'x'")):
        with pytest.raises(ValueError, match=message):
            SkipPolicyConfig(**fields)


def test_activity_of_rows_does_not_leak_and_gives_a_static_set():
    model = saturating()
    whole = lac_activity(model, IDS)
    assert whole.shape == (6, 3, 12) and bool(whole[0].all()) and not bool(whole.all())
    assert torch.equal(whole[:, 1:2], lac_activity(model, IDS[1:2]))
    table = mmskip.importance(model, [IDS])
    torch.testing.assert_close(torch.tensor(table.columns["activity"]), whole.float().mean((1, 2)))
    plan = LayerPlanConfig.lac(table, least=1.0)
    assert plan.phase == "decode" and plan.drop == tuple(i for i in range(1, 6) if not bool(whole[i].all()))


@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_window", "gpt2", "gpt_neox", "qwen3_next"])
def test_lac_takes_back_what_voids_did_cached_or_not(name):
    model = tiny_decoder(name)
    sharpen(model)
    mmskip.apply_(model, SkipPolicyConfig("lac"))
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert_same_generation(model, inputs=IDS, **call)
    assert_same_generation(model, inputs=IDS, attention_mask=mask, **call)


def test_lac_equals_its_reference_and_rows_do_not_depend_on_each_other():
    base, model = saturating(), mmskip.apply_(saturating(), SkipPolicyConfig("lac", alpha=0.9))
    decoder = base.model
    with torch.no_grad():
        x, taken_back = decoder.embed_tokens(IDS), 0
        rotary, grown = decoder.rotary_emb(x, torch.arange(12)[None]), []
        for layer in decoder.layers:
            y = layer(x, position_embeddings=rotary)
            growth = y.norm(dim=-1) - x.norm(dim=-1)
            if grown:
                before = torch.stack(grown)
                void = growth < 0.9 * (before.amax(0) - before.amin(0))
                taken_back += int(void.sum())
                y = torch.where(void[..., None], x, y)
            grown.append(growth)
            x = y
        expected, found = base.lm_head(decoder.norm(x)), model(IDS).logits
        torch.testing.assert_close(found, expected)
        assert 0 < taken_back < 5 * IDS.numel()
        torch.testing.assert_close(model(IDS[1:2]).logits, found[1:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="alpha is -1"):
        SkipPolicyConfig("lac", alpha=-1)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["ffn_skip", "lac"])
def test_gradient_checkpointing_gives_the_same_gradients(policy, reentrant):
    found = []
    for saving in (False, True):
        model = saturating()
        lac = SkipPolicyConfig("lac", alpha=0.9)
        mmskip.apply_(model, lac if policy == "lac" else SkipPolicyConfig.calibrated(model, [IDS], share=0.3))
        model.train()
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if "embed" not in name})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


def test_policies_share_no_block_with_a_plan_that_would_run_it_twice():
    for first in (True, False):
        configs = (SkipPolicyConfig("lac"), LayerPlanConfig.cola((0, 1, 1, 2, 3)))
        model = mmskip.apply_(tiny_decoder("llama"), configs[not first])
        with pytest.raises(ValueError, match="claims"):
            mmskip.apply_(model, configs[first])
