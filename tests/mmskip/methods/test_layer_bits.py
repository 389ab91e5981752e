"""Weights of few bits: the model equals one with rounded weights, comes back as it was, and says what it takes."""

import copy
import sys

import contract
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import VOCAB, assert_same_generation, sharpen, tiny_decoder
from tiny_vlms import collate, example_rows, tiny_vlm

import mmskip
from mmskip import LayerBitsConfig, LayerPlanConfig
from mmskip.methods.layer_bits import report

pytest.importorskip("torchao")
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt_neox", "phi3", "opt", "cohere2")
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
CALL = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def decoder(name="llama"):
    model = tiny_decoder(name)
    sharpen(model)
    return model


def held(model):
    """The report of the bits on a model."""
    return mmskip.report(model)["LayerBitsConfig"]


def rounded(weight, bits):
    """A weight [out, in] in symmetric integers with one scale per row."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / ((high - low) / 2)
    return (weight * (1 / scale)).round().clamp(low, high) * scale  # the largest lies halfway: round as torchao does


@torch.no_grad()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_a_model_with_rounded_weights_and_comes_back(name):
    model, reference = decoder(name), decoder(name)
    before, classes = logits(model), [type(m) for m in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    blocks = mmskip.families.find(reference).blocks
    bits = (16, 8, 4, 3)
    with torch.no_grad():
        for width, block in zip(bits, blocks, strict=True):
            for module in block.modules():
                if isinstance(module, torch.nn.Linear) and width < 16:
                    module.weight.copy_(rounded(module.weight, width))
    mmskip.apply_(model, LayerBitsConfig(bits))
    torch.testing.assert_close(logits(model), logits(reference), atol=2e-3, rtol=2e-3)
    assert set(model.state_dict()) == set(weights)
    assert_same_generation(model, inputs=IDS, **CALL)
    mmskip.remove_(model)
    assert torch.equal(logits(model), before) and [type(m) for m in model.modules()] == classes
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_sixteen_bits_everywhere_is_the_identity():
    model = decoder()
    before = logits(model)
    assert torch.equal(logits(mmskip.apply_(model, LayerBitsConfig((16,) * 4))), before)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="no LayerBitsConfig"):
        report(model)
    assert set(held(model).bits) == {32}


def test_report_counts_what_lies_in_memory():
    model = decoder()
    linear = [m for block in model.model.layers for m in block.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in linear) // 4  # of one block
    rows = sum(m.out_features for m in linear) // 4
    mmskip.apply_(model, LayerBitsConfig((16, 8, 4, 4)))
    reported = held(model)
    with pytest.warns(FutureWarning, match=r"mmskip.report\(model\)\['LayerBitsConfig'\]"):
        assert report(model) == reported
    assert reported.bits == (32, 8, 4, 4) and reported.average == 12
    assert reported.original_bytes == 16 * weights and reported.ideal_bytes == 6 * weights
    # one byte per weight whatever the bits, a float scale and a zero point per row
    assert reported.stored_bytes == 4 * weights + 3 * (weights + 5 * rows)
    assert reported.kept_bytes == 12 * weights and "kept for remove_" in str(reported)


def test_of_a_vlm_the_blocks_of_its_language_model_are_quantized():
    name = "qwen2_5_vl"
    model, reference = tiny_vlm(name), tiny_vlm(name)
    call, _ = collate(name, example_rows(name))
    blocks, bits = mmskip.families.find(reference, ("vlm",)).blocks, (4, 16, 3, 8)
    with torch.no_grad():
        before = model(**call).logits
        for width, block in zip(bits, blocks, strict=True):
            for module in block.modules():
                if isinstance(module, torch.nn.Linear) and width < 16:
                    module.weight.copy_(rounded(module.weight, width))
        mmskip.apply_(model, LayerBitsConfig(bits))
        torch.testing.assert_close(model(**call).logits, reference(**call).logits, atol=2e-3, rtol=2e-3)
        assert held(model).bits == (4, 32, 3, 8)
        assert torch.equal(mmskip.remove_(model)(**call).logits, before)


def test_report_counts_untouched_blocks_with_weights_outside_linear_layers():
    model = mmskip.apply_(tiny_decoder("qwen3_moe", mlp_only_layers=[0]), LayerBitsConfig((8, 16, 16, 16)))
    reported, block = held(model), model.model.layers[1]
    assert reported.bits == (8, 32, 32, 32) and 8 < reported.average < 32
    experts = sum(p.numel() for p in block.parameters() if p.dim() > 1)  # norms aside
    first = sum(m.weight.numel() for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear))
    assert reported.ideal_bytes == first + 3 * 4 * experts


def test_what_torchao_stores_is_tried_in_the_dtype_of_the_model(monkeypatch):
    from mmskip.ops import quantize

    library, seen = quantize.torchao(), []
    fill = library.quantize_
    monkeypatch.setattr(library, "quantize_", lambda m, *a, **k: (seen.append(next(m.parameters())), fill(m, *a, **k)))
    mmskip.apply_(decoder().bfloat16(), LayerBitsConfig((4, 4, 16, 16)))
    assert (seen[0].dtype, seen[0].shape[0]) == (torch.bfloat16, 16)  # the trial


def test_freed_weights_cannot_be_given_back():
    model = mmskip.apply_(decoder(), LayerBitsConfig((4,) * 4, keep_original=False))
    after = logits(model)
    assert held(model).kept_bytes == 0
    with pytest.raises(RuntimeError, match="freed"):
        mmskip.remove_(model)
    assert torch.equal(logits(model), after) and mmskip.applied(model)


@pytest.mark.parametrize("first", [True, False])
def test_composes_with_plans(first):
    model, plan, bits = decoder(), LayerPlanConfig(drop=(1,), drop_attn=(2,)), LayerBitsConfig((8, 16, 4, 8))
    for config in (bits, plan) if first else (plan, bits):
        mmskip.apply_(model, config)
    assert_same_generation(model, inputs=IDS, **CALL)
    planned = logits(model)
    other = mmskip.apply_(decoder(), bits)
    blocks = other.model.layers
    with torch.no_grad():
        x = other.model.embed_tokens(IDS)
        rotary = other.model.rotary_emb(x, torch.arange(12)[None])
        for index in (0, 3):
            after = blocks[index](x, position_embeddings=rotary)
            x = after if index else after + blocks[2].mlp(blocks[2].post_attention_layernorm(after))
        torch.testing.assert_close(planned, other.lm_head(other.model.norm(x)))
    mmskip.remove_(model)
    assert torch.equal(logits(model), logits(decoder()))


def test_save_load_copy_and_lora(tmp_path):
    model = mmskip.apply_(decoder(), LayerBitsConfig((8, 4, 4, 8), group=8))
    expected = logits(model)
    mmskip.save(model, tmp_path)
    assert torch.equal(logits(mmskip.load_(decoder(), tmp_path)), expected)
    twin = copy.deepcopy(model)
    mmskip.remove_(model)
    assert torch.equal(logits(twin), expected)
    torch.manual_seed(0)
    tuned: torch.nn.Module = get_peft_model(decoder(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    lora = {k: v.clone() for k, v in tuned.state_dict().items() if "lora_" in k}
    mmskip.apply_(tuned, LayerBitsConfig((8, 4, 4, 8), group=8))
    tuned(IDS, labels=IDS).loss.backward()
    assert all(torch.equal(v, lora[k]) for k, v in tuned.state_dict().items() if "lora_" in k)
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
def test_lora_after_bits_keeps_its_weights_when_they_are_taken_off(target):
    config = LoraConfig(target_modules=target, init_lora_weights=False)
    tuned: torch.nn.Module = get_peft_model(mmskip.apply_(decoder(), LayerBitsConfig((8, 4, 16, 8))), config)
    reported = held(tuned)
    assert reported.bits == (8, 4, 32, 8) and reported.kept_bytes
    mmskip.remove_(tuned)
    plain: torch.nn.Module = get_peft_model(decoder(), config)
    plain.load_state_dict({k: v for k, v in tuned.state_dict().items() if "lora_" in k}, strict=False)
    assert not mmskip.applied(tuned) and torch.equal(logits(tuned), logits(plain))
    assert [p.requires_grad for p in tuned.parameters()] == [p.requires_grad for p in plain.parameters()]


def test_layers_that_another_tool_replaced_are_told_before_anything_changes():
    model = mmskip.apply_(decoder(), LayerBitsConfig((4,) * 4))
    model.model.layers[2].self_attn.q_proj = torch.nn.Linear(32, 32, bias=False)
    after = logits(model)
    with pytest.raises(RuntimeError, match=r"self_attn\.q_proj.*replaced"):
        mmskip.remove_(model)
    assert torch.equal(logits(model), after) and mmskip.applied(model)


def test_bits_follow_the_table_to_the_average():
    table = mmskip.importance(decoder(), [IDS])
    for column in table.columns:
        found = LayerBitsConfig.by_importance(table, column, average=5, high=8, low=4)
        best = (max if column in ("bi", "lim", "activity") else min)(range(4), key=lambda i: table.columns[column][i])
        assert found.bits.count(8) == 1 and found.bits[best] == 8
    drawn = {LayerBitsConfig.random(4, 6, seed=seed).bits for seed in range(20)}
    assert len(drawn) > 2 and all(sum(bits) == 24 for bits in drawn)
    assert LayerBitsConfig.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match="average is 9"):
        LayerBitsConfig.by_importance(table, "lim", 9)
    with pytest.raises(ValueError, match="column is 'none'"):
        LayerBitsConfig.by_importance(table, "none", 4)
    other = tiny_decoder("qwen3")
    with pytest.raises(ValueError, match="importance of another model"):
        mmskip.apply_(other, LayerBitsConfig.by_importance(table, "lim", 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": (8, 4)}, "bits has 2 numbers"),
        ({"bits": (1, 8, 8, 8)}, "bits holds 1"),
        ({"bits": (8, 9, 8, 8)}, "bits holds 9"),
        ({"bits": (8, 8, 8, 8), "group": 7}, "does not divide"),
        ({"bits": ()}, "bits is empty"),
        ({"bits": (8, 8, 8, 8), "group": 0}, "group is 0"),
        ({"bits": (8, 8, 8, 8), "store": "disk"}, "store is 'disk'"),
        ({"bits": (8, -1, 8, 8)}, "each is -1"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_changes(values, message):
    model = decoder()
    with pytest.raises(ValueError, match=message):
        mmskip.apply_(model, LayerBitsConfig(**values))
    assert not mmskip.applied(model) and torch.equal(logits(model), logits(decoder()))


@pytest.mark.parametrize(("name", "message"), [("gpt2", "Conv1D"), ("qwen3_moe", "block.0")])
def test_weights_outside_linear_layers_are_refused(name, message):
    with pytest.raises(ValueError, match=f"{message}.*quantizes nn.Linear"):
        mmskip.apply_(tiny_decoder(name), LayerBitsConfig((8,) * 4))


@pytest.mark.parametrize("keep", [True, False])
def test_twice_is_refused_and_an_error_half_way_changes_nothing(monkeypatch, keep):
    model = mmskip.apply_(decoder(), LayerBitsConfig((8,) * 4))
    with pytest.raises(ValueError, match="weights already"):
        mmskip.apply_(model, LayerBitsConfig((4,) * 4))
    mmskip.remove_(model)
    from mmskip.hf import quantized_blocks

    quantize, calls = quantized_blocks.quantize_, []

    def failing(*args):
        quantize(*args)
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(quantized_blocks, "quantize_", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        mmskip.apply_(model, LayerBitsConfig((4,) * 4, keep_original=keep))
    assert torch.equal(logits(model), logits(decoder())) and not mmskip.applied(model)


def test_a_missing_back_end_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"mmskip\[quantize\]"):
        mmskip.apply_(decoder(), LayerBitsConfig((8,) * 4))


CONTRACT = [
    contract.Case(
        base,
        LayerBitsConfig(bits=(16, 4, 8, 16)),
        LayerBitsConfig(bits=(16, 16, 16, 16)),
        {"bits": (-3, 16, 16, 16), "group": 1, "store": "disk"},
    )
    for base in (contract.DECODER, contract.VLM)
]
