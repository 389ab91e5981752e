"""Each refusal of a routed vision-language model is needed: with the check taken out, the result is wrong."""

import pytest
import torch
from mod_cases import PassingSlotLayer
from tiny_vlms import collate, example_rows, tiny_vlm
from transformers import StaticCache
from vlm_configs import NO_PLACEHOLDERS

import mmskip
from mmskip.hf.routing import block as routing_block
from mmskip.hf.routing import root as routing_root
from mmskip.hf.routing import vlm, vlm_layout
from mmskip.hf.routing.vlm_layout import layout_of_call

FEW = mmskip.MoDConfig(keep=0.3, router="norm")


def same(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def wrong_or_failing(run, expected):
    """Whether the result of `run` differs from what is right, or there is none."""
    try:
        return not same(run(), expected)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return True


def answers(model, call, **how):
    out = model.generate(**call, do_sample=False, return_dict_in_generate=True, output_logits=True, **how)
    return torch.stack(out.logits)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_an_image_cut_by_two_calls_would_be_chosen_from_in_parts(name, monkeypatch):
    monkeypatch.setattr(routing_root, "seen_after", lambda seen, new: None)
    monkeypatch.setattr(vlm, "_check_begins_outside", lambda blocks, start: None)
    model = mmskip.apply_(tiny_vlm(name), FEW)
    call, layout = collate(name, example_rows(name)[:1])
    expected = answers(model, call, **NO_PLACEHOLDERS)
    inside = int((layout[0] >= 0).nonzero()[0]) + 2
    assert not same(answers(model, call, prefill_chunk_size=inside, **NO_PLACEHOLDERS), expected)


def test_guidance_would_give_the_second_prompt_the_layout_of_the_first(monkeypatch):
    """Words of the negative prompt would be dropped where the prompt has an image."""
    monkeypatch.setattr(vlm, "check_guidance", lambda model, call: None)
    model = mmskip.apply_(tiny_vlm("llava_onevision"), FEW)
    call, layout = collate("llava_onevision", example_rows("llava_onevision")[:1])
    words = torch.arange(1, 13)[None]
    assert (layout[:, :12] >= 0).any()
    out = model.generate(
        **call, guidance_scale=2.0, negative_prompt_ids=words, max_new_tokens=1, do_sample=False,
        return_dict_in_generate=True, output_scores=True, suppress_tokens=None,
    )  # fmt: skip
    with torch.no_grad():
        first = model(**call).logits[:, -1].log_softmax(-1)
        second = model(input_ids=words, layout=torch.full_like(words, -1)).logits[:, -1].log_softmax(-1)
    assert not same(out.scores[0], 2 * (first - second) + second)


def test_pictures_guessed_from_runs_of_equal_ids_would_be_one_picture():
    """What is left to go by where the grid is missing: neighbouring frames would compete for one budget."""
    model, name = mmskip.apply_(tiny_vlm("qwen2_5_vl"), FEW), "qwen2_5_vl"
    call, layout = collate(name, example_rows(name)[3:4])
    runs = torch.where(layout >= 0, 0, -1)
    with torch.no_grad(), mmskip.trace(model) as trace:
        assert not same(model(**call, layout=runs).logits, model(**call).logits)
    guessed, right = (forward.layers[1].kept[0] for forward in trace.forwards)
    frames = layout[layout >= 0].unique()
    assert {int(right[layout[0] == frame].sum()) for frame in frames} == {1}
    assert {int(guessed[layout[0] == frame].sum()) for frame in frames} != {1}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "video_llama_3"])
def test_grids_in_another_order_would_tear_pictures_apart(name, monkeypatch):
    """Without the comparison with the ids, tokens of two images would form one group."""
    model = tiny_vlm(name)
    call, layout = collate(name, example_rows(name)[1:2])
    sizes = [int((layout == image).sum()) for image in layout[layout >= 0].unique()]
    assert len(set(sizes)) > 1, "pictures of one size cannot be confused"
    swapped = {key: value.flip(0) if key.endswith("grid_thw") else value for key, value in call.items()}
    with pytest.raises(ValueError, match="would be split"):
        layout_of_call(model.model, swapped)
    monkeypatch.setattr(vlm_layout, "_check_places", lambda *args: None)
    torn = layout_of_call(model.model, swapped)
    mmskip.apply_(model, FEW)
    with torch.no_grad():
        assert not same(model(**call, layout=torn).logits, model(**call).logits)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_a_static_cache_would_hold_the_wrong_tokens_in_a_vlm(name, monkeypatch):
    monkeypatch.setattr(routing_root, "check_cache", lambda cache: None)
    monkeypatch.setattr(routing_block, "slot_layer", PassingSlotLayer)
    model = mmskip.apply_(tiny_vlm(name), FEW)
    call, _ = collate(name, example_rows(name)[:1])
    expected = answers(model, call, use_cache=False, **NO_PLACEHOLDERS)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    assert wrong_or_failing(lambda: answers(model, call, past_key_values=cache, **NO_PLACEHOLDERS), expected)
