"""Routed vision-language models in use: LoRA, checkpointing, adapters on disk, copies, and every way to apply."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import randomize_routers
from tiny_vlms import Row, add_image, collate, example_rows, joined, tiny_vlm
from transformers import StaticCache
from vlm_configs import VLMS

import mmskip

NAMES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", "gemma3")
TRAINED = (*NAMES, "internvl", "video_llama_3", "paligemma")
TRAINED_ALL = [*TRAINED, *(pytest.param(name, marks=pytest.mark.slow) for name in VLMS if name not in TRAINED)]
CONFIG = mmskip.MoDConfig(keep=0.3, gate="sigmoid")


def batch(name: str, side: str = "right"):
    call, _ = collate(name, example_rows(name), side)
    return {**call, "labels": call["input_ids"].masked_fill(call["attention_mask"] == 0, -100)}


def lora(**settings):
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)


def router_gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if "mmskip_router" in n and "original_module" not in n}


@pytest.mark.parametrize("name", TRAINED_ALL)
def test_lora_before_mmskip_trains_the_router_of_a_vlm(name):
    model = mmskip.apply_(get_peft_model(tiny_vlm(name), lora()).train(), CONFIG)
    assert mmskip.applied(model) == [CONFIG]
    model(**batch(name)).loss.backward()
    gradients = router_gradients(model)
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert not any("mmskip" in n for n, _ in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", TRAINED_ALL)
def test_lora_after_mmskip_trains_the_router_of_a_vlm_as_a_module_to_save(name, tmp_path):
    base = tiny_vlm(name)
    model = mmskip.apply_(copy.deepcopy(base), CONFIG)
    with pytest.raises(RuntimeError, match="modules_to_save"):
        get_peft_model(copy.deepcopy(model), lora()).train()(**batch(name))
    model = get_peft_model(model, lora(modules_to_save=["mmskip_router"])).train()
    model(**batch(name)).loss.backward()
    gradients = router_gradients(model)
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    mmskip.save(model, tmp_path)
    fresh = mmskip.load_(copy.deepcopy(base), tmp_path)
    trained = [p for n, p in model.named_parameters() if "mmskip_router" in n and "modules_to_save" in n]
    loaded = [p for n, p in fresh.named_parameters() if "mmskip_router" in n]
    assert loaded and all(torch.equal(a, b) for a, b in zip(trained, loaded, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_generation_through_peft_equals_the_merged_vlm(name):
    model = get_peft_model(tiny_vlm(name), lora()).eval()
    mmskip.apply_(model, CONFIG)
    call, _ = collate(name, example_rows(name), "left")
    expected = model.generate(**call, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.merge_and_unload().generate(**call, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", TRAINED_ALL)
def test_checkpointing_a_vlm_gives_the_same_gradients(name, reentrant):
    model = mmskip.apply_(tiny_vlm(name), CONFIG).train()
    randomize_routers(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**batch(name), use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.get_decoder().named_parameters() if "embed" not in n})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_batch_gives_the_router_of_a_vlm_a_zero_gradient(name):
    model = mmskip.apply_(tiny_vlm(name), CONFIG).train()
    call, _ = collate(name, [example_rows(name)[2]])
    model(**call, labels=call["input_ids"]).loss.backward()
    gradients = router_gradients(model)
    assert gradients and all(g is not None and g.abs().sum() == 0 for g in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_vlm_is_as_before_after_remove(name):
    base = tiny_vlm(name)
    model = copy.deepcopy(base)
    classes = [type(m) for m in model.modules()]
    with torch.no_grad():
        call = batch(name)
        expected = base(**call).logits
        mmskip.apply_(model, CONFIG)
        assert set(base.state_dict()) == {key for key in model.state_dict() if "mmskip_" not in key}
        model(**call)
        mmskip.remove_(model)
        assert torch.equal(model(**call).logits, expected)
    assert [type(m) for m in model.modules()] == classes
    assert list(model.state_dict()) == list(base.state_dict())
    assert not any("mmskip" in key for module in model.modules() for key in module.__dict__)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_vlm_and_one_loaded_from_disk_are_independent(name, tmp_path):
    base = tiny_vlm(name)
    model = mmskip.apply_(copy.deepcopy(base), CONFIG)
    randomize_routers(model)
    call, _ = collate(name, example_rows(name), "left")
    mmskip.save(model, tmp_path)
    twins = [copy.deepcopy(model), mmskip.load_(base, tmp_path)]
    with torch.no_grad():
        expected = model(**call).logits
        ids = model.generate(**call, max_new_tokens=3, do_sample=False)
        for parameter in model.parameters():
            parameter.zero_()
        for twin in twins:
            assert torch.equal(twin(**call).logits, expected)
            assert torch.equal(twin.generate(**call, max_new_tokens=3, do_sample=False), ids)


@pytest.mark.parametrize("name", NAMES)
def test_apply_on_the_inner_model_is_apply_on_the_whole(name):
    whole, inner = tiny_vlm(name), tiny_vlm(name)
    mmskip.apply_(whole, mmskip.MoDConfig(keep=0.3, router="norm"))
    mmskip.apply_(inner.model, mmskip.MoDConfig(keep=0.3, router="norm"))
    call, _ = collate(name, example_rows(name))
    with torch.no_grad():
        assert torch.equal(inner(**call).logits, whole(**call).logits)
        with pytest.raises(ValueError, match=r"generate.*mmskip\.apply_"):
            inner.generate(**call, max_new_tokens=2)
    mmskip.remove_(inner)
    mmskip.apply_(inner, mmskip.MoDConfig(keep=0.3, router="norm"))
    assert torch.equal(inner(**call).logits, whole(**call).logits)


@pytest.mark.parametrize("name", NAMES)
def test_an_explicit_layout_wins(name):
    model = mmskip.apply_(tiny_vlm(name), mmskip.MoDConfig(keep=0.3, router="norm"))
    base = tiny_vlm(name)
    call, layout = collate(name, example_rows(name), "left")
    text = torch.full_like(layout, -1)
    with torch.no_grad():
        real = call["attention_mask"].bool()
        assert torch.equal(model(**call, layout=layout).logits, model(**call).logits)
        assert torch.equal(model(**call, layout=text).logits[real], base(**call).logits[real])
        how = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(**call, layout=text, **how), base.generate(**call, **how))
        assert torch.equal(model.generate(**call, layout=layout, **how), model.generate(**call, **how))


@pytest.mark.parametrize("name", ["llava_onevision", "smolvlm", "internvl", "video_llama_3"])
@pytest.mark.parametrize("router", ["norm", "random"])
def test_a_conversation_in_turns_equals_one_forward(name, router):
    model = mmskip.apply_(tiny_vlm(name), mmskip.MoDConfig(keep=0.3, router=router))
    torch.manual_seed(3)
    first, second = Row(), Row()
    first.text(1, 11)
    add_image(name, first)
    first.text(12)
    add_image(name, second, 1)
    second.text(13, 14)
    both = joined(first, second)
    with torch.no_grad():
        whole = model(**collate(name, [both])[0]).logits
        start = model(**collate(name, [first])[0], use_cache=True)
        call, _ = collate(name, [second])
        call["attention_mask"] = torch.ones(1, len(both.ids), dtype=torch.long)
        rest = model(**call, past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_fixed_size_caches_are_refused_in_vlms(name):
    model = mmskip.apply_(tiny_vlm(name), CONFIG)
    call, _ = collate(name, example_rows(name)[:1])
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(**call, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(**call, past_key_values=cache)
