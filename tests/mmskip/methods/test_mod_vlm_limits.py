"""What routed vision-language models refuse, and that the refusal is needed; quantized weights; packed sequences."""

import copy

import pytest
import torch
from masked_reference import masked_routing
from tiny_decoders import randomize_routers, routers_of
from tiny_vlms import Row, add_image, add_video, collate, example_rows, joined, tiny_vlm
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, DynamicCache
from vlm_configs import IMAGE, NO_PLACEHOLDERS

import mmskip
from mmskip.families import decoder
from mmskip.hf import structure

TEXT = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 16, "patch_size": 4, "projection_dim": 16}


def tiny(kind: str, **settings):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**settings)).eval()


def mllama():
    text = {**TEXT, "cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "attention_heads": 2,
        "num_global_layers": 1,
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, 1]],
        "intermediate_layers_indices": [0],
    }
    return tiny("mllama", text_config=text, vision_config=tower)


def llama4():
    tower = {**TOWER, "image_size": 16, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32}
    text = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8, "attention_chunk_size": 8}
    return tiny("llama4", text_config=text, vision_config={**tower, "projector_output_dim": 32})


def vipllava():
    text = {"model_type": "llama", **TEXT}
    return tiny(
        "vipllava", text_config=text, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layers=[-1, -2]
    )


@pytest.mark.parametrize(("build", "reason"), [(mllama, "cross_attention_mask"), (llama4, "chunked_attention")])
def test_language_models_that_a_subset_cannot_serve_are_refused_with_the_reason(build, reason):
    model = build()
    with pytest.raises(ValueError, match=rf"vlm: the language model of \w+ does not fit: .*{reason}"):
        mmskip.apply_(model, mmskip.MoDConfig())
    assert mmskip.applied(model) == []


def in_spite_of_the_refusal(build, index, monkeypatch):
    """The language model inside `build()`, whose block `index` is routed all the same, and a dense copy."""
    monkeypatch.setattr(decoder, "unfit", lambda *args: "")
    monkeypatch.setattr(structure, "_carries_state", lambda block, causal: False)
    monkeypatch.setattr(
        structure,
        "attention_of",
        lambda block, causal=True: next(c for c in block.children() if hasattr(c, "layer_idx")),
    )
    model = build()
    base = copy.deepcopy(model)
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.3, gate="sigmoid", layers=(index,)))
    randomize_routers(model)
    return model.get_decoder(), base.get_decoder()


def test_without_the_refusal_cross_attention_would_get_the_mask_of_all_tokens(monkeypatch):
    decoder, base = in_spite_of_the_refusal(mllama, 3, monkeypatch)
    pictures = {"cross_attention_states": torch.randn(1, 5, 32), "cross_attention_mask": torch.zeros(1, 1, 14, 5)}
    call = {"input_ids": torch.arange(3, 17)[None], "use_cache": False, **pictures}
    with torch.no_grad():
        assert base(**call).last_hidden_state.isfinite().all()
        with pytest.raises(RuntimeError, match="must match the size"):
            decoder(**call, layout=torch.tensor([[-1] * 2 + [0] * 12]))


def test_without_the_refusal_chunks_would_be_counted_in_kept_tokens(monkeypatch):
    decoder, base = in_spite_of_the_refusal(llama4, 1, monkeypatch)
    layout = torch.tensor([[-1] * 2 + [0] * 12 + [-1] * 2])
    call = {"input_ids": torch.arange(3, 19)[None], "use_cache": False}
    with torch.no_grad():
        base.set_attn_implementation("eager")
        with masked_routing(base, routers_of(decoder), layout, 0.3, "sigmoid"):
            expected = base(**call)[0]
        assert not torch.allclose(decoder(**call, layout=layout)[0], expected, atol=1e-4)


def test_a_model_that_is_neither_gets_the_reason_of_each_family():
    with pytest.raises(ValueError, match=r"decoder: .*needs.*; vlm: needs a transformers vision-language model"):
        mmskip.apply_(nn.Linear(2, 2), mmskip.MoDConfig())


def test_a_vlm_with_unknown_groups_is_routed_by_an_explicit_layout():
    model = vipllava()
    base = copy.deepcopy(model)
    mmskip.apply_(model, mmskip.MoDConfig(keep=1.0, router="norm"))
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6]])
    call = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"does not know how VipLlavaModel.*layout="):
            model(**call)
        with pytest.raises(ValueError, match=r"does not know how VipLlavaModel.*layout="):
            model.generate(**call, max_new_tokens=2)
        layout = torch.where(ids == IMAGE, 0, -1)
        assert torch.equal(model(**call, layout=layout).logits, base(**call).logits)
        how = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(model.generate(**call, layout=layout, **how), base.generate(**call, **how))


def test_a_model_whose_pictures_are_unknown_would_be_routed_over_all_of_them():
    model = vipllava()
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, *[IMAGE] * 16, 6]])
    call = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.1, router="norm"))
    each = torch.where(ids == IMAGE, (torch.arange(ids.shape[1]) > 17).long(), -1)
    with torch.no_grad():
        guessed, right = (model(**call, layout=layout).logits for layout in (each.clamp(max=0), each))
    assert not torch.allclose(guessed, right, atol=1e-4), "one picture or two: the same result"


def test_paligemma_without_token_types_is_refused_because_its_base_has_no_single_answer():
    base = tiny_vlm("paligemma")
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3))
    call, _ = collate("paligemma", example_rows("paligemma")[1:2])
    del call["token_type_ids"]
    with torch.no_grad():
        with pytest.raises(ValueError, match="token_type_ids"):
            model(**call)
        sdpa = base(**call).logits
        base.set_attn_implementation("eager")
        assert not torch.allclose(base(**call).logits, sdpa, atol=1e-3), "the backends agree: no reason to refuse"


def test_a_prompt_of_paligemma_in_chunks_is_refused_because_the_first_could_not_see_the_rest():
    model = mmskip.apply_(tiny_vlm("paligemma"), mmskip.MoDConfig(keep=0.3, router="norm"))
    call, _ = collate("paligemma", example_rows("paligemma")[1:2])
    with torch.no_grad():
        with pytest.raises(ValueError, match="token_type_ids"):
            model.generate(**call, max_new_tokens=2, prefill_chunk_size=5)
        causal = {**call, "token_type_ids": torch.ones_like(call["token_type_ids"])}
        assert not torch.allclose(model(**call).logits, model(**causal).logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llava_onevision", "mistral3", "qwen2_5_vl", "gemma3"])
def test_prefill_in_chunks_is_exact_or_refused(name):
    model = mmskip.apply_(tiny_vlm(name), mmskip.MoDConfig(keep=0.3, router="norm"))
    call, layout = collate(name, example_rows(name)[:1])
    how = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**call, **how)
    groups = layout[0].tolist()
    sizes = {True: [], False: []}
    for size in range(3, len(groups)):
        cuts = range(size, len(groups), size)
        sizes[any(set(groups[:cut]) & set(groups[cut:]) - {-1} for cut in cuts)].append(size)
    for size in sizes[True][:3]:
        with pytest.raises(ValueError, match=r"continues from an earlier call|begins within an image"):
            model.generate(**call, **how, prefill_chunk_size=size)
    assert sizes[True] and sizes[False]
    for size in sizes[False][:3]:
        assert torch.equal(model.generate(**call, **how, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("form", ["all ids", "new ids", "new ids and their layout", "new ids and the whole layout"])
@pytest.mark.parametrize("name", ["llava_onevision", "internvl", "mistral3", "gemma3", "aya_vision"])
def test_a_second_turn_of_generate_on_its_cache_equals_the_whole_conversation(name, form):
    model = mmskip.apply_(tiny_vlm(name), mmskip.MoDConfig(keep=0.3, gate="sigmoid"))
    randomize_routers(model)
    torch.manual_seed(2)
    first, second = Row(), Row()
    first.text(1, 11)
    add_image(name, first)
    first.text(12)
    second.text(13)
    add_image(name, second, 1)
    second.text(14, 15)
    whole, layout = collate(name, [joined(first, second)])
    later = {**collate(name, [second])[0], **{k: whole[k] for k in whole if "pixel" not in k and "size" not in k}}
    start = len(first.ids)
    if form != "all ids":
        later["input_ids"] = later["input_ids"][:, start:]
    if "layout" in form:
        later["layout"] = layout if "whole" in form else layout[:, start:]
    cache = DynamicCache(config=model.config.get_text_config())
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **NO_PLACEHOLDERS}
    begin = collate(name, [first])[0] | ({"layout": layout[:, :start]} if "layout" in form else {})
    model.generate(**begin, past_key_values=cache, max_new_tokens=1, do_sample=False)
    continued, expected = model.generate(**later, past_key_values=cache, **how), model.generate(**whole, **how)
    torch.testing.assert_close(torch.stack(continued.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


def test_guidance_is_refused_in_the_generate_of_a_vlm():
    model = mmskip.apply_(tiny_vlm("llava_onevision"), mmskip.MoDConfig(keep=0.3, router="norm"))
    call, _ = collate("llava_onevision", example_rows("llava_onevision")[:1])
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0.*second prompt"):
        model.generate(**call, guidance_scale=2.0, max_new_tokens=2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_packed_sequences_equal_their_rows_alone(name):
    model = mmskip.apply_(tiny_vlm(name), mmskip.MoDConfig(keep=0.3, gate="sigmoid"))
    randomize_routers(model)
    torch.manual_seed(5)
    rows = [Row(), Row()]
    for row, add in zip(rows, (add_image, add_video), strict=True):
        row.text(1, 11)
        add(name, row)
        row.text(12, 13)
    calls = [collate(name, [row])[0] for row in rows]
    positions = []
    for call in calls:
        del call["attention_mask"]
        text = torch.arange(call["input_ids"].shape[1])[None]
        if name.startswith("qwen"):
            vision, _ = model.model.get_rope_index(**call)
            text = torch.cat([text[None], vision])
        positions.append(text)
    packed = {key: torch.cat([c[key] for c in calls if key in c], int("ids" in key)) for c in calls for key in c}
    with torch.no_grad():
        out = model(**packed, position_ids=torch.cat(positions, -1), use_cache=False).logits[0]
        alone = [model(**call).logits[0] for call in calls]
    torch.testing.assert_close(out, torch.cat(alone), atol=1e-5, rtol=1e-5)


class Int8Linear(nn.Linear):
    """A linear layer of int8 weights and a float scale, as quantizing libraries make them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        scale = linear.weight.detach().abs().amax().float() / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm"])
def test_quantized_vlms_keep_their_weights_and_get_a_router_of_the_hidden_dtype(name):
    base = tiny_vlm(name).to(torch.bfloat16)
    for block in base.get_decoder().layers:
        for parent in list(block.modules()):
            for key, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, key, Int8Linear(child))
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=1.0))
    call, _ = collate(name, example_rows(name))
    real = call["attention_mask"].bool()
    with torch.no_grad(), mmskip.trace(model) as trace:
        assert torch.equal(model(**call).logits[real], base(**call).logits[real])
    assert mmskip.cost(model, trace).dense_flops == mmskip.cost(tiny_vlm(name), trace).dense_flops
    added = {key: value for key, value in model.state_dict().items() if "mmskip" in key}
    assert added and all(value.dtype == torch.bfloat16 for value in added.values())
    for key, value in base.state_dict().items():
        assert model.state_dict()[key].dtype == value.dtype and torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "gemma3"])
def test_trace_and_cost_count_the_language_model(name):
    model = mmskip.apply_(tiny_vlm(name), mmskip.MoDConfig(keep=0.3, router="norm", layers=(3,)))
    rows = example_rows(name)[:1]
    call, layout = collate(name, rows)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(**call)
    record = trace.forwards[0]
    sizes = [int((layout == group).sum()) for group in layout[layout >= 0].unique()]
    kept = int((layout < 0).sum()) + sum(max(1, round(0.3 * size)) for size in sizes)
    assert [layer.ran for layer in record.layers] == [layout.numel()] * 3 + [kept]
    assert record.head_rows == layout.numel()
    cost = mmskip.cost(model, trace)
    assert 1 < cost.ideal_speedup < 4 / 3 and 0 < cost.kv_bytes < cost.dense_kv_bytes
