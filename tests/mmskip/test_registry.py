"""`apply_` and `remove_`: all or nothing, and nothing remains."""

import copy
import inspect
import json

import pytest
import torch
from tiny_decoders import VOCAB, randomize_routers, stream_layout, tiny_decoder
from torch import nn

import mmskip
from mmskip import swap

LAYOUT = stream_layout(2)[None]
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def fingerprint(model: nn.Module):
    state = {name: (type(m), set(m.__dict__), list(m._modules)) for name, m in model.named_modules()}
    return state, list(model.state_dict())


def test_remove_leaves_the_model_exactly_as_it_was():
    model = tiny_decoder("llama")
    before, expected = fingerprint(model), model(IDS).logits
    mmskip.apply_(model, mmskip.MoDConfig())
    assert mmskip.applied(model) == [mmskip.MoDConfig()]
    mmskip.remove_(model)
    assert fingerprint(model) == before and torch.equal(model(IDS).logits, expected)
    assert mmskip.applied(model) == []


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch, step):
    model = tiny_decoder("llama")
    before, original, calls = fingerprint(model), swap.swap, []

    def failing(change):
        calls.append(change)
        if len(calls) > step:
            raise RuntimeError("half-way")
        original(change)

    monkeypatch.setattr(swap, "swap", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        mmskip.apply_(model, mmskip.MoDConfig())
    assert fingerprint(model) == before


def test_names_keys_and_signatures_stay():
    model = tiny_decoder("llama")
    base = copy.deepcopy(model)
    mmskip.apply_(model, mmskip.MoDConfig())
    assert set(model.state_dict()) - set(base.state_dict()) == {
        "model.layers.1.mmskip_router.weight",
        "model.layers.3.mmskip_router.weight",
    }
    for ours, theirs in zip(model.modules(), base.modules(), strict=False):
        if hasattr(ours, "layers"):
            assert str(type(ours)) == str(type(theirs))
    assert inspect.signature(model.model.layers[1].forward) == inspect.signature(base.model.layers[1].forward)
    assert type(model.model.layers[1]) is type(model.model.layers[3]), "one class per method and base class"
    assert not any(isinstance(m, nn.Linear) for n, m in model.named_modules() if "mmskip" in n)


def test_a_copy_uses_its_own_weights():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(gate="linear"))
    randomize_routers(model)
    other = copy.deepcopy(model)
    expected = model(IDS, layout=LAYOUT).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(IDS, layout=LAYOUT).logits, expected)
    mmskip.remove_(model)
    assert mmskip.applied(other)


def test_hidden_states_and_attentions_are_still_captured():
    model = mmskip.apply_(tiny_decoder("llama", attn="eager"), mmskip.MoDConfig())
    out = model(IDS, layout=LAYOUT, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5 and len(out.attentions) == 4
    assert all(h.shape == out.hidden_states[0].shape for h in out.hidden_states)


def test_applying_twice_is_refused_and_changes_nothing():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig())
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"block\.1.*remove_"):
        mmskip.apply_(model, mmskip.MoDConfig(layers=(1, 2)))
    assert fingerprint(model) == before


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 4, 3))])
def test_a_model_without_decoder_layers_is_refused(model):
    with pytest.raises(ValueError, match=r"no family fits.*decoder"):
        mmskip.apply_(model, mmskip.MoDConfig())


def test_something_that_is_no_model_or_no_config_is_refused():
    with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
        mmskip.apply_("meta-llama/Meta-Llama-3-8B", mmskip.MoDConfig())
    with pytest.raises(TypeError, match="MoDConfig"):
        mmskip.apply_(tiny_decoder("llama"), {"keep": 0.2})
    with pytest.raises(TypeError, match=r"the order is mmskip\.apply_\(model, config\)"):
        mmskip.apply_(mmskip.MoDConfig(), tiny_decoder("llama"))


def test_a_layout_that_is_no_tensor_is_refused():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig())
    with pytest.raises(ValueError, match="layout is a list; expected a LongTensor"):
        model(IDS, layout=LAYOUT.tolist())


def test_a_change_by_another_tool_on_top_blocks_remove():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig())
    block = model.model.layers[1]
    block.__class__ = type("FSDPLlamaDecoderLayer", (type(block),), {})
    with pytest.raises(RuntimeError, match="undo that first"):
        mmskip.remove_(model)
    assert mmskip.applied(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, r"keep is 0; expected a number in \(0, 1\]"),
        ({"keep": 1.2}, "keep is 1.2"),
        ({"keep": True}, "keep is True"),
        ({"keep": None}, "keep is None"),
        ({"keep": []}, "keep is empty"),
        ({"keep": [0.2, -1]}, r"keep\[1\] is -1"),
        ({"keep": "linear"}, "'cosine'"),
        ({"layers": "odd"}, "alternate"),
        ({"layers": []}, "block indices"),
        ({"layers": [1, -2]}, "holds -2"),
        ({"layers": ["1"]}, "holds '1'; expected block indices, integers >= 0"),
        ({"layers": [1, 1]}, "once"),
        ({"router": "best"}, "linear, mlp, norm, random, uniform"),
        ({"gate": "relu"}, "linear, sigmoid, tanh, separate, none"),
        ({"always_keep": "first"}, "none, last"),
        ({"keep_floor": 0}, "keep_floor is 0"),
        ({"noise": -1}, "noise is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_name_field_value_and_range(values, message):
    with pytest.raises(ValueError, match=message):
        mmskip.MoDConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": [7]}, "layers holds 7; the model has 4 blocks"),
        ({"layers": [0, 1]}, "claims block 0"),
        ({"keep": [0.2, 0.3, 0.4], "layers": [1, 3]}, "keep has 3 values; expected 2"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_any_change(values, message):
    model = tiny_decoder("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        mmskip.apply_(model, mmskip.MoDConfig(**values))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("values", "routed", "ratios"),
    [
        ({}, [1, 3, 5, 7], [0.2] * 4),
        ({"layers": "all"}, [1, 2, 3, 4, 5, 6, 7], [0.2] * 7),
        ({"layers": "deep"}, [4, 5, 6, 7], [0.2] * 4),
        ({"layers": "alternate_deep"}, [5, 7], [0.2] * 2),
        ({"layers": [2, 5], "keep": [0.5, 0.25]}, [2, 5], [0.5, 0.25]),
        ({"layers": [0, 1, 2, 3, 4, 5, 6, 7]}, list(range(8)), [0.2] * 8),
        ({"layers": "deep", "keep": "cosine", "keep_floor": 0.15}, [4, 5, 6, 7], [0.388740, 0.188255, 0.15, 0.15]),
    ],
)
def test_layers_and_keep_ratios(values, routed, ratios):
    model = mmskip.apply_(tiny_decoder("llama", num_hidden_layers=8), mmskip.MoDConfig(**values))
    policies = {
        i: swap.state_of(block, type(block)._mmskip_mixin).policy
        for i, block in enumerate(model.model.layers)
        if swap.is_swapped(block)
    }
    assert list(policies) == routed
    assert [p.keep for p in policies.values()] == pytest.approx(ratios, abs=1e-5)
    with torch.no_grad():
        model(IDS, layout=LAYOUT)


def test_every_layer_of_a_stream_may_be_routed():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(layers=(0, 1, 2, 3), gate="sigmoid"))
    randomize_routers(model)
    call = {"layout": LAYOUT, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **call), model.generate(IDS, use_cache=False, **call))


def test_configs_round_trip_through_json_and_cannot_be_changed():
    config = mmskip.MoDConfig(keep=[0.2, 0.5], layers=[1, 3], gate="linear", always_keep="last")
    assert mmskip.MoDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.keep = 0.5
    with pytest.raises(ValueError, match="no kep"):
        mmskip.MoDConfig.from_dict({"kep": 0.2})


def two_configs(model):
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.5, layers=(1,), gate="sigmoid"))
    return mmskip.apply_(model, mmskip.MoDConfig(keep=0.2, layers=(3,), gate="sigmoid"))


def test_two_configs_on_different_blocks_equal_one():
    model, one = tiny_decoder("llama"), tiny_decoder("llama")
    before, dense = fingerprint(model), model(IDS).logits
    two_configs(model)
    mmskip.apply_(one, mmskip.MoDConfig(keep=[0.5, 0.2], layers=(1, 3), gate="sigmoid"))
    with pytest.raises(
        ValueError,
        match=r"and MoDConfig\(keep=0\.5.* do not compose: both claim block\.1\.",
    ):
        mmskip.apply_(model, mmskip.MoDConfig(keep=0.3, layers=(1, 2)))
    randomize_routers(model)
    randomize_routers(one)
    with torch.no_grad(), mmskip.trace(model) as trace:
        out = model(IDS, layout=LAYOUT).logits
    kept = [
        None if layer.kept is None else int(layer.kept[0][LAYOUT[0] == 1].sum()) for layer in trace.forwards[0].layers
    ]
    assert kept == [None, 5, None, 2]
    assert torch.equal(out, one(IDS, layout=LAYOUT).logits)
    call = {"layout": LAYOUT, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **call), model.generate(IDS, use_cache=False, **call))
    mmskip.remove_(model)
    assert fingerprint(model) == before and torch.equal(model(IDS).logits, dense)


def test_two_configs_are_saved_loaded_and_copied_as_two(tmp_path):
    model = two_configs(tiny_decoder("llama"))
    randomize_routers(model)
    expected = model(IDS, layout=LAYOUT).logits
    mmskip.save(model, tmp_path)
    loaded, other = mmskip.load_(tiny_decoder("llama"), tmp_path), copy.deepcopy(model)
    assert mmskip.applied(loaded) == mmskip.applied(model) and len(mmskip.applied(loaded)) == 2
    mmskip.remove_(model)
    for copied in (loaded, other):
        assert torch.equal(copied(IDS, layout=LAYOUT).logits, expected)


def test_an_error_in_the_second_config_leaves_the_first(monkeypatch):
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(layers=(1,)))
    before, original = fingerprint(model), swap.swap
    expected = model(IDS, layout=LAYOUT).logits

    calls = []

    def failing(change):
        calls.append(change)
        if len(calls) > 1:
            raise RuntimeError("half-way")
        original(change)

    monkeypatch.setattr(swap, "swap", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        mmskip.apply_(model, mmskip.MoDConfig(layers=(2, 3)))
    monkeypatch.undo()
    assert fingerprint(model) == before and torch.equal(model(IDS, layout=LAYOUT).logits, expected)
