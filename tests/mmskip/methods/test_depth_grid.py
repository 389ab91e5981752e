"""Every depth policy beside plans and speculation, which have grids of their own: cached generation equals uncached
with a dynamic and a static cache, padded or not, under sdpa and eager attention, on decoders of many families."""

import pytest
import torch
from tiny_decoders import VOCAB, assert_same_generation, saturating, sharpen, tiny_decoder

import mmskip
from mmskip import LACConfig, LayerBitsConfig, LayerPlanConfig
from mmskip.calibration import ffn_threshold

FAMILIES = (
    "llama",
    "qwen3",
    "mistral_window",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "phi3",
    "olmo2",
    "cohere2",
    "opt",
    "qwen3_moe",
    "gpt_oss",
)
EAGER_ONLY = ("gemma2", "gpt_oss")
REFUSED = {
    ("opt", "ffn_skip"): "no single module for its MLP",
    ("qwen3_moe", "bits"): r"block\.0 .*torchao quantizes nn.Linear layers",
    ("gpt_oss", "bits"): r"block\.0 .*torchao quantizes nn.Linear layers",
}
POLICIES = ("ffn_skip", "lac", "bits", "unified", "cola", "random", "lac_static")
IDS = torch.randint(3, VOCAB, (2, 14), generator=torch.Generator().manual_seed(0))
CALL = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def changed(name, policy):
    """A model under a policy.

    Raises:
        ValueError: refused by `apply_`.
    """
    if policy == "ffn_skip":
        model = tiny_decoder(name, num_hidden_layers=6) if name == "opt" else saturating(name)
        return mmskip.apply_(model, ffn_threshold(model, [IDS], share=0.3, warmup=2))
    model = tiny_decoder(name)
    sharpen(model)
    if policy == "bits":
        pytest.importorskip("torchao", reason="extra `quantize`")
    configs = {
        "lac": LACConfig,
        "bits": lambda: LayerBitsConfig((8, 4, 4, 8)),
        "unified": lambda: LayerPlanConfig.unified(1.5, "balanced", cache_policy="recompute"),
        "cola": lambda: LayerPlanConfig.cola((0, 1, 2, 1, 2, 3)),
        "random": lambda: LayerPlanConfig.random(1, seed=1),
        "lac_static": lambda: LayerPlanConfig.lac(mmskip.importance(model, [IDS]), cache_policy="recompute"),
    }
    return mmskip.apply_(model, configs[policy]())


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached(name, policy, attn):
    if attn == "sdpa" and name in EAGER_ONLY:
        pytest.skip("softcap or sinks, which sdpa leaves out")
    if (name, policy) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, policy]):
            changed(name, policy)
        return
    model = changed(name, policy)
    model.set_attn_implementation(attn)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    for call in (CALL, {**CALL, "attention_mask": mask}):
        assert_same_generation(model, inputs=IDS, **call)
        if policy == "cola":
            with pytest.raises(ValueError, match=r"StaticCache; a plan that repeats blocks"):
                model.generate(IDS, cache_implementation="static", **call)
            continue
        static = model.generate(IDS, cache_implementation="static", **call)
        assert torch.equal(static, model.generate(IDS, use_cache=False, **call))
