"""Token reduction in vision-language models, in which the layout comes from the pictures."""

import copy

import pytest
import torch
from tiny_vlms import collate, example_rows, tiny_vlm
from vlm_configs import BREAK, IMAGE, VLMS

import mmskip

SETTINGS = {
    "next": {"after_layer": 2},
    "last": {"after_layer": 2, "query": "last"},
    "similarity": {"score": "similarity", "after_layer": 0},
}
NAMES = ("llava_onevision", "llava_next_video", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "paligemma", "gemma3")


def reduced(name: str, setting: str, keep: float = 0.3):
    base = tiny_vlm(name)
    return mmskip.apply_(copy.deepcopy(base), mmskip.TokenReductionConfig(keep=keep, **SETTINGS[setting])), base


# the linear attention of Qwen3.5 must see every token, so tokens cannot be dropped from a block on
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", [name for name in VLMS if name != "qwen3_5"])
def test_keeping_everything_is_the_base_vlm_bit_for_bit(name, setting):
    model, base = reduced(name, setting, keep=1.0)
    call, _ = collate(name, example_rows(name), "left")
    real = call["attention_mask"].bool()
    with torch.no_grad():
        assert torch.equal(model(**call).logits[real], base(**call).logits[real])


def test_token_reduction_refuses_linear_attention_with_the_reason():
    with pytest.raises(ValueError, match="carries a state from token to token"):
        reduced("qwen3_5", "next")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_equals_its_rows_alone_and_saves(name, setting):
    model, base = reduced(name, setting)
    rows = example_rows(name)
    call, _ = collate(name, rows)
    real = call["attention_mask"].bool()
    with torch.no_grad():
        with mmskip.trace(model) as trace:
            together = model(**call).logits
        for i, row in enumerate(rows):
            alone = model(**collate(name, [row])[0]).logits[0]
            torch.testing.assert_close(together[i][real[i]], alone, atol=1e-5, rtol=1e-5)
    assert mmskip.cost(model, trace).ideal_speedup > 1.05
    assert not torch.allclose(together[real], base(**call).logits[real], atol=1e-3)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_vlm_generation_with_a_cache_equals_without(name, setting):
    model, _ = reduced(name, setting)
    call, _ = collate(name, example_rows(name), "left")
    call |= {"suppress_tokens": list(range(IMAGE, BREAK + 1)), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**call), model.generate(**call, use_cache=False))
