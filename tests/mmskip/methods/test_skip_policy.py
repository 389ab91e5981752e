"""`SkipPolicyConfig` of version 0.1 makes the configs of today, wherever it stands."""

import json

import jsonargparse
import pytest
import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from tiny_decoders import VOCAB, saturating

import mmskip
from mmskip import FFNSkipConfig, LACConfig, LayerBitsConfig, LayerPlanConfig, MethodConfig, SkipPolicyConfig
from mmskip.calibration import ffn_threshold
from mmskip.config import from_entry, read_old_spellings
from mmskip.registry import config_types

IDS = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
OLD = {"threshold": 0.9, "cold_first": 1, "cold_last": 2, "warmup": 3, "made_for": "m"}
NEW = FFNSkipConfig(0.9, 1, 2, 3, "m")


def test_calling_it_gives_the_config_of_today_with_a_warning():
    with pytest.warns(FutureWarning, match=r"SkipPolicyConfig\(policy='lac'\) is now LACConfig"):
        assert SkipPolicyConfig("lac", alpha=0.9) == LACConfig(0.9)
    with pytest.warns(FutureWarning, match="is now FFNSkipConfig"):
        assert SkipPolicyConfig(**OLD, alpha=0.8) == SkipPolicyConfig("ffn_skip", *OLD.values()) == NEW
    with pytest.warns(FutureWarning):
        assert SkipPolicyConfig(**NEW.to_dict()) == NEW
    for fields, message in (({"threshold": 2}, "threshold is 2"), ({"policy": "x"}, "policy is 'x'")):
        with pytest.raises(ValueError, match=message):
            SkipPolicyConfig(**fields)
    with pytest.raises(TypeError, match="thresold"):
        SkipPolicyConfig(thresold=0.9)


def test_it_is_calibrated_applied_saved_and_loaded_as_before(tmp_path):
    model = saturating()
    with pytest.warns(FutureWarning, match="mmskip.calibration.ffn_threshold"):
        config = SkipPolicyConfig.calibrated(model, [IDS], share=0.3, warmup=2)
    assert config == ffn_threshold(model, [IDS], share=0.3, warmup=2)
    mmskip.save(mmskip.apply_(model, config), tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    # an adapter as version 0.1 wrote it
    file = tmp_path / "mmskip.json"
    saved = json.loads(file.read_text())
    values = saved["methods"][0]["config"]
    values |= {"policy": "ffn_skip", "alpha": 0.8, "made_for": values.pop("model_fingerprint")}
    saved["methods"][0]["type"] = "SkipPolicyConfig"
    file.write_text(json.dumps(saved))
    with pytest.warns(FutureWarning, match="is now FFNSkipConfig"):
        again = mmskip.load_(saturating(), tmp_path)
    assert mmskip.applied(again) == [config]
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected)


def test_saved_settings_give_the_config_of_today():
    with pytest.warns(FutureWarning):
        assert SkipPolicyConfig.from_dict({"policy": "ffn_skip", **OLD, "alpha": 0.8}) == NEW
    with pytest.warns(FutureWarning):
        assert from_entry(config_types(), "SkipPolicyConfig", {"policy": "lac", "alpha": 0.7}) == LACConfig(0.7)


@pytest.fixture
def _old_spellings():
    loader = jsonargparse.get_loader("yaml")
    set_parsing_settings(subclasses_enabled=[MethodConfig, *config_types().values()])
    read_old_spellings(config_types())
    yield
    jsonargparse.set_loader("yaml", getattr(loader, "original", loader))


@pytest.mark.usefixtures("_old_spellings")
@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        ("SkipPolicyConfig, init_args: {policy: lac, alpha: 0.7, warmup: 0}", LACConfig(0.7), "is now LACConfig"),
        (
            "LayerPlanConfig, init_args: {drop: [1], kv: fill, made_for: m}",
            LayerPlanConfig(drop=(1,), cache_policy="recompute", model_fingerprint="m"),
            "kv is now cache_policy",
        ),
        (
            "LayerBitsConfig, init_args: {bits: [8], made_for: m}",
            LayerBitsConfig((8,), model_fingerprint="m"),
            "made_for",
        ),
    ],
)
def test_yaml_of_version_0_1_is_read(given, config, message):
    parser = ArgumentParser()
    parser.add_argument("--methods", type=list[MethodConfig])
    parser.add_argument("--config", action="config")
    with pytest.warns(FutureWarning, match=message):
        found = parser.instantiate(parser.parse_args([f"--config=methods: [{{class_path: mmskip.{given}}}]"]))
    assert found.methods == [config]
