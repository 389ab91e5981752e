"""Mixture-of-depths routing in vision-language models gives what its definition says, however they are called."""

import copy

import pytest
import torch
from naive_mod import make_naive
from tiny_decoders import assert_same_generation, randomize_routers, routers_of, sharpen
from tiny_vlms import collate, example_rows, tiny_vlm
from vlm_configs import BREAK, IMAGE, VLMS

import mmskip

SIDES = ("left", "right")
NO_PLACEHOLDERS = {"suppress_tokens": list(range(IMAGE, BREAK + 1)), "max_new_tokens": 4}


def routed(name: str, keep: float = 0.3, gate: str = "sigmoid", **config):
    base = tiny_vlm(name)
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=keep, gate=gate, **config))
    randomize_routers(model)
    return model, base


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", VLMS)
def test_keep_everything_is_the_base_vlm_bit_for_bit(name, side):
    base = tiny_vlm(name)
    call, _ = collate(name, example_rows(name), side)
    real = call["attention_mask"].bool()
    with torch.no_grad():
        expected = base(**call).logits
        for gate in ("tanh", "none"):
            model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=1.0, gate=gate))
            with mmskip.trace(model) as trace:
                out = model(**call).logits
            assert torch.equal(out[real], expected[real])
            assert any(layer.kept is not None for layer in trace.forwards[0].layers), "went round the routing path"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", VLMS)
def test_a_mixed_batch_equals_the_naive_reference(name, side):
    model, base = routed(name)
    call, layout = collate(name, example_rows(name), side)
    real = call["attention_mask"].bool()
    base.set_attn_implementation("eager")
    with torch.no_grad():
        dense = base(**call).logits
        expected = make_naive(base, routers_of(model), layout, 0.3, "sigmoid")(**call, use_cache=False).logits
        out = model(**call).logits
    torch.testing.assert_close(out[real], expected[real], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[real], dense[real], atol=1e-3), "routing changed nothing: the test shows nothing"


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_vlm_gradients_equal_the_naive_reference(name):
    model, base = routed(name, gate="linear")
    call, layout = collate(name, example_rows(name))
    base.set_attn_implementation("eager")
    weights = {i: w.detach().clone().requires_grad_() for i, w in routers_of(model).items()}
    real = call["attention_mask"].bool()
    target = torch.randn(int(real.sum()), 90, generator=torch.Generator().manual_seed(5))
    (model(**call).logits[real] * target).sum().backward()
    naive = make_naive(base, weights, layout, 0.3, "linear")
    (naive(**call, use_cache=False).logits[real] * target).sum().backward()
    theirs = {n.replace(".block.", "."): p.grad for n, p in naive.named_parameters()}
    for key, parameter in model.named_parameters():
        if "mmskip" not in key:
            torch.testing.assert_close(parameter.grad, theirs[key], atol=2e-4, rtol=1e-3, msg=key)
    for i, weight in weights.items():
        router = model.get_decoder().layers[i].mmskip_router.weight
        torch.testing.assert_close(router.grad, weight.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(("router", "side"), [("linear", "left"), ("random", "right")])
@pytest.mark.parametrize("name", VLMS)
def test_a_mixed_batch_equals_its_rows_alone(name, router, side):
    model, _ = routed(name, router=router)
    rows = example_rows(name)
    call, _ = collate(name, rows, side)
    real = call["attention_mask"].bool()
    with torch.no_grad():
        together = model(**call).logits
        for i, row in enumerate(rows):
            alone = model(**collate(name, [row])[0]).logits[0]
            torch.testing.assert_close(together[i][real[i]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("name", VLMS)
def test_vlm_generation_with_a_cache_equals_without(name, how):
    model, _ = routed(name)
    call, _ = collate(name, example_rows(name), "left")
    sharpen(model)
    assert_same_generation(model, **call, **how, **NO_PLACEHOLDERS)


@pytest.mark.parametrize("name", VLMS)
def test_generation_routes_the_prompt_as_a_forward_does(name):
    model, _ = routed(name)
    call, _ = collate(name, example_rows(name), "left")
    out = model.generate(**call, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(**call).logits[:, -1]
    torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["eager", "mmskip_ragged"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "aya_vision"])
def test_every_attention_backend_sees_the_same_in_a_vlm(name, how):
    model, base = routed(name)
    call, _ = collate(name, example_rows(name), "left")
    real = call["attention_mask"].bool()
    if how == "eager":
        other = copy.deepcopy(model)
        other.set_attn_implementation("eager")
    else:
        other = mmskip.apply_(base, mmskip.MoDConfig(keep=0.3, gate="sigmoid", attention=how))
        randomize_routers(other)
    with torch.no_grad():
        torch.testing.assert_close(other(**call).logits[real], model(**call).logits[real], atol=1e-5, rtol=1e-5)
