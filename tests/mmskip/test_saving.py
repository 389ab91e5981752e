"""Saving and loading: only what mmskip added, whole files, clear refusals."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_decoders import VOCAB, randomize_routers, stream_layout, tiny_decoder

import mmskip

LAYOUT = stream_layout(2)[None]
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def routed(**values):
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(**{"gate": "linear", **values}))
    randomize_routers(model)
    return model


def test_a_saved_adapter_restores_the_outputs(tmp_path):
    model = routed(keep=0.3, layers=(1, 2))
    mmskip.save(model, tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter/mmskip.safetensors")) == {
        "block.1.mmskip_router.weight",
        "block.2.mmskip_router.weight",
    }
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["mmskip.json", "mmskip.safetensors"]
    loaded = mmskip.load_(tiny_decoder("llama"), tmp_path / "adapter")
    assert mmskip.applied(loaded) == mmskip.applied(model)
    assert torch.equal(loaded(IDS, layout=LAYOUT).logits, model(IDS, layout=LAYOUT).logits)


def test_an_adapter_moves_between_plain_and_peft_models(tmp_path):
    mmskip.save(routed(), tmp_path)
    model = get_peft_model(tiny_decoder("llama"), LoraConfig(r=2, target_modules="all-linear"))
    mmskip.load_(model, tmp_path)
    mmskip.save(model, tmp_path / "again")
    first, second = load_file(tmp_path / "mmskip.safetensors"), load_file(tmp_path / "again/mmskip.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_state_dict_round_trip():
    model, other = routed(), routed()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(IDS, layout=LAYOUT).logits, model(IDS, layout=LAYOUT).logits)


def test_loading_onto_a_model_with_the_same_method_keeps_it(tmp_path):
    model = routed()
    mmskip.save(model, tmp_path)
    other = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(gate="linear"))
    mmskip.load_(other, tmp_path)
    assert torch.equal(other(IDS, layout=LAYOUT).logits, model(IDS, layout=LAYOUT).logits)


def test_an_adapter_of_another_configuration_is_refused(tmp_path):
    mmskip.save(routed(keep=0.3), tmp_path)
    other = routed(keep=0.5)
    with pytest.raises(ValueError, match=r"keep=0\.3.*keep=0\.5"):
        mmskip.load_(other, tmp_path)


def test_an_adapter_that_does_not_fit_leaves_the_model_untouched(tmp_path):
    mmskip.save(routed(), tmp_path)
    wide = tiny_decoder("llama", hidden_size=64)
    with pytest.raises(ValueError, match=r"block\.1\.mmskip_router\.weight.*\(32,\).*\(64,\)"):
        mmskip.load_(wide, tmp_path)
    assert mmskip.applied(wide) == [] and not any("mmskip" in key for key in wide.state_dict())


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mmskip\.json"):
        mmskip.load_(tiny_decoder("llama"), tmp_path)
    with pytest.raises(ValueError, match="nothing to save"):
        mmskip.save(tiny_decoder("llama"), tmp_path)
    mmskip.save(routed(), tmp_path)
    description = json.loads((tmp_path / "mmskip.json").read_text())
    for change, message in (
        ({"format": 9}, "format 9"),
        ({"methods": [{"type": "Magic", "config": {}}]}, "Magic"),
        ({"methods": 3}, "not a file written"),
    ):
        (tmp_path / "mmskip.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(ValueError, match=message):
            mmskip.load_(tiny_decoder("llama"), tmp_path)


def test_a_failed_write_leaves_the_earlier_adapter_whole(tmp_path, monkeypatch):
    mmskip.save(routed(keep=0.3), tmp_path)
    before = (tmp_path / "mmskip.safetensors").read_bytes()

    def full_disk(weights, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(sys.modules["mmskip.saving"], "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        mmskip.save(routed(keep=0.3), tmp_path)
    assert (tmp_path / "mmskip.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mmskip.json", "mmskip.safetensors"]


def test_of_several_adapters_the_active_ones_router_is_saved(tmp_path):
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["mmskip_router"])
    model = get_peft_model(mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig()), settings)
    model.add_adapter("two", settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mmskip_router.modules_to_save" in name:
                parameter.fill_(2.0 if ".two." in name else 1.0)
    for adapter, value in (("two", 2.0), ("default", 1.0)):
        model.set_adapter(adapter)
        mmskip.save(model, tmp_path / adapter)
        loaded = mmskip.load_(tiny_decoder("llama"), tmp_path / adapter)
        routers = [p for n, p in loaded.named_parameters() if "mmskip_router" in n]
        assert len(routers) == 2 and all(bool((p == value).all()) for p in routers)
