"""Feed-forwards of saturated tokens are skipped: token by token, row by row, cached or not."""

import contract
import pytest
import torch
from tiny_decoders import VOCAB, assert_same_generation, saturating, tiny_decoder
from torch.nn.functional import cosine_similarity

import mmskip
from mmskip import FFNSkipConfig, LACConfig
from mmskip.calibration import ffn_threshold
from mmskip.calibration.ffn_saturation import skipped_share

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
    config = ffn_threshold(model, [IDS], share=0.3, warmup=2)
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
    config = ffn_threshold(model, [IDS], share=0.3, warmup=3)
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
    config = ffn_threshold(model, [IDS], share=0.3)
    with torch.no_grad():
        expected = model(IDS).logits
        never = FFNSkipConfig(**{**config.to_dict(), "warmup": 100})
        assert torch.equal(mmskip.apply_(model, never)(IDS).logits, expected)
        mmskip.remove_(model)
        assert torch.equal(model(IDS).logits, expected)


def test_share_left_out():
    cosines = torch.tensor([[0.1, 0.9], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]])
    # the first token is saturated after block 1, the second after block 0: 2 + 3 of 8 are left out
    assert skipped_share(cosines, 0.5) == 5 / 8 and skipped_share(cosines, 0.95) == 0


def test_models_without_saturation_are_refused():
    model = tiny_decoder("llama", num_hidden_layers=6)
    with torch.no_grad():
        for block, factor in zip(model.model.layers, (1, 5, 50, 1500, 2e5, 1), strict=True):
            block.mlp.down_proj.weight.mul_(factor)  # feed-forwards that change more and more
    with pytest.raises(ValueError, match=r"no saturation: over blocks 1 to 4.*rank correlation"):
        ffn_threshold(model, [IDS])
    with pytest.raises(ValueError, match="scales what its MLP adds"):
        ffn_threshold(tiny_decoder("granite", num_hidden_layers=4), [IDS])
    with pytest.raises(ValueError, match="no single module for its MLP"):
        ffn_threshold(tiny_decoder("opt"), [IDS])
    with pytest.raises(ValueError, match="leave 0 of 4 blocks"):
        ffn_threshold(tiny_decoder("llama"), [IDS], cold_first=4)
    with pytest.raises(ValueError, match="calibrated on no model"):
        mmskip.apply_(tiny_decoder("llama"), FFNSkipConfig())
    for fields, message in (({"threshold": 2}, r"threshold is 2.*\(-1, 1\]"), ({"warmup": -1}, "warmup is -1")):
        with pytest.raises(ValueError, match=message):
            FFNSkipConfig(**fields)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["ffn_skip", "lac"])
def test_gradient_checkpointing_gives_the_same_gradients(policy, reentrant):
    found = []
    for saving in (False, True):
        model = saturating()
        lac = LACConfig(alpha=0.9)
        mmskip.apply_(model, lac if policy == "lac" else ffn_threshold(model, [IDS], share=0.3))
        model.train()
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if "embed" not in name})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)


MADE_FOR = "llama, 4 blocks, width 32, vocabulary 61"
CONTRACT = [
    contract.Case(
        contract.DECODER,
        FFNSkipConfig(threshold=-0.9, model_fingerprint=MADE_FOR),
        FFNSkipConfig(threshold=1.0, warmup=1000, model_fingerprint=MADE_FOR),
        {"threshold": -1.5, "cold_first": -1, "cold_last": -1, "warmup": -1},
    )
]
