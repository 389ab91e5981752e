"""Every LightningModule takes methods, keeps them in its checkpoint, and refuses those that do not fit before any data
are made."""

import json

import pytest
import torch
from captioning import TEXTS, TOWER
from chat_data import TINY_VLM
from narration_data import LLAMA

import mmskip
from mmskip import EarlyExitConfig, FreeUConfig, LayerMaskConfig, MoDConfig, SkipScaleConfig
from mmskip.models.captioner import Captioner
from mmskip.models.classifier import Classifier
from mmskip.models.common.methods import freeze, thaw
from mmskip.models.diffusion import Diffusion
from mmskip.models.video_llm import VideoLLM
from mmskip.models.vlm import VLM
from mmskip.train.cli.train import main

RESNET = {"model": "resnet18", "model_kwargs": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}, "num_classes": 3}
UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
IDS = {"vocab_size": 20, "pad_token_id": 0, "eos_token_id": 2}
SEQ2SEQ = {"text": TEXTS["bart"], **TOWER, "tokens": {**IDS, "start_token_id": 1, "answers": [[5, 2], [6, 2], [7, 2]]}}
TOKENS = {"silent": 1, "speak": 3, "eos": 2, "open": [4], "assistant": [5], "vocab_size": 20}
MODELS = {
    "VideoLLM": (VideoLLM, {"llm": LLAMA, "feature_dim": 8, "tokens": TOKENS}, MoDConfig(keep=0.5), LayerMaskConfig()),
    "VLM": (
        VLM,
        {"vlm": TINY_VLM, "tokens": {**IDS, "image_token_id": 3, "video_token_id": 4}},
        MoDConfig(keep=0.5),
        LayerMaskConfig(),
    ),
    "Captioner": (Captioner, SEQ2SEQ, EarlyExitConfig(), MoDConfig(keep=0.5)),
    "Classifier": (Classifier, {**RESNET, "augment": "none"}, LayerMaskConfig(), MoDConfig(keep=0.5)),
    "Diffusion": (Diffusion, {"unet": UNET}, FreeUConfig(), MoDConfig(keep=0.5)),
}


def network(model):
    return next(getattr(model, name) for name in ("llm", "net", "unet") if hasattr(model, name))


@pytest.fixture(params=list(MODELS))
def case(request):
    if request.param == "Diffusion":
        pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    return MODELS[request.param]


def test_methods_are_applied_and_a_checkpoint_brings_them_back(case, tmp_path):
    cls, settings, method, _ = case
    model = cls(**settings, methods=[method])
    assert mmskip.applied(network(model)) == [method]
    assert not mmskip.applied(network(cls(**settings)))
    assert model.hparams["methods"] == json.loads(json.dumps(model.hparams["methods"])) == freeze([method])
    torch.save(dict(model.hparams), tmp_path / "hparams.pt")
    again = cls(**torch.load(tmp_path / "hparams.pt", weights_only=True))
    assert mmskip.applied(network(again)) == [method]
    assert again.hparams == model.hparams
    again.load_state_dict(model.state_dict())


def test_a_method_that_does_not_fit_is_refused_on_construction(case):
    cls, settings, _, wrong = case
    settings = {key: None if key in ("tokens", "num_classes", "feature_dim") else v for key, v in settings.items()}
    with pytest.raises(ValueError, match="no family fits"):
        cls(**settings, methods=[wrong])


def test_averaged_weights_of_a_diffusion_model_have_the_methods_too():
    pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")
    model = Diffusion(UNET, methods=[SkipScaleConfig(scale=0.9)])
    assert mmskip.applied(model.sampler_unet) == mmskip.applied(model.unet) == [SkipScaleConfig(scale=0.9)]
    assert mmskip.applied(mmskip.remove_(model.unet)) == []
    assert mmskip.applied(model.sampler_unet) == [SkipScaleConfig(scale=0.9)]


def test_a_classifiers_mask_is_a_deprecated_spelling_of_its_methods():
    mask = LayerMaskConfig(padding="partial")
    with pytest.warns(FutureWarning, match="methods"):
        old = Classifier(**RESNET, mask=mask)
    assert old.methods == Classifier(**RESNET, methods=[mask]).methods == [mask]
    assert Classifier(**RESNET).methods == [LayerMaskConfig()]
    assert Classifier(**RESNET, augment="patches").methods == []
    with pytest.warns(FutureWarning, match="methods"):
        assert Classifier(**RESNET, augment="patches", mask=mask.to_dict()).methods == []


def test_hyper_parameters_of_before_methods_load(tmp_path):
    """A classifier's checkpoint of version 0.1 has `mask`, a captioner's and a diffusion model's nothing."""
    mask = LayerMaskConfig(padding="partial")
    model = Classifier(**RESNET, methods=[mask])
    hparams = {**model.hparams, "mask": mask.to_dict()}
    del hparams["methods"]
    state = {"hyper_parameters": hparams, "state_dict": model.state_dict(), "image_size": 32}
    torch.save(state, tmp_path / "old.ckpt")
    assert Classifier.from_checkpoint(str(tmp_path / "old.ckpt")).methods == [mask]
    captioner = Captioner(**SEQ2SEQ)
    captioner.check_same({key: value for key, value in captioner.hparams.items() if key != "methods"})


def test_old_spellings_of_a_method_in_a_checkpoint_are_the_same_model():
    model = VideoLLM(LLAMA, methods=[MoDConfig(keep=0.5, router="mlp", gate="separate")], feature_dim=8, tokens=TOKENS)
    saved = json.loads(json.dumps(dict(model.hparams)))
    saved["methods"][0]["init_args"]["gate"] = "own"
    with pytest.warns(FutureWarning):
        model.check_same(saved)
    saved["methods"][0]["init_args"]["keep"] = 0.4
    with pytest.raises(ValueError, match="the checkpoint was trained with methods"), pytest.warns(FutureWarning):
        model.check_same(saved)


def test_yaml_gives_methods_to_any_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    method = {"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.5}}
    options = ["--config", "layer_masking.yaml", f"--model.methods={json.dumps([method])}"]
    with pytest.raises(SystemExit):
        main([*options, "--trainer.fast_dev_run=1"])
    assert "no family fits ResNet" in capsys.readouterr().err


def test_thaw_refuses_what_is_no_method():
    with pytest.raises(ValueError, match="NoSuchConfig"):
        thaw([{"class_path": "mmskip.NoSuchConfig", "init_args": {}}])
    assert thaw(None) == []


def test_methods_of_an_older_version_are_upgraded_when_they_are_read():
    old = {"class_path": "mmskip.LayerPlanConfig", "init_args": {"drop": [3], "seed": 7}}
    with pytest.warns(FutureWarning):
        old_named = thaw([{**old, "init_args": {"drop": [3], "kv": "fill"}}])
    (config,) = thaw([old])
    assert config == mmskip.LayerPlanConfig(drop=(3,)) and thaw(freeze([config])) == [config]
    assert old_named == [mmskip.LayerPlanConfig(drop=(3,), cache_policy="recompute")]
