"""One report for every method: before a forward, after one, and gone with `remove_`."""

import dataclasses
import json

import pytest
import tiny_seq2seq
import torch
from tiny_decoders import VOCAB, tiny_decoder
from torch import nn

import mmskip
from mmskip import registry
from mmskip.exits.settings import FixedExit
from mmskip.families import family
from mmskip.families.base import View
from mmskip.reporting import AppliedReport, register_report

IDS = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))


def test_a_model_without_methods_has_an_empty_report():
    assert mmskip.report(tiny_decoder("llama")) == {}
    with pytest.raises(TypeError, match=r"model is int; expected a torch\.nn\.Module"):
        mmskip.report(3)


def _decoder(model):
    return model(IDS)


def _routed(model):
    return model(IDS, layout=torch.tensor([-1, 0, 0, 0, -1, -1]).expand(2, -1))


def _unet(model):
    import tiny_unets

    return tiny_unets.output(model, tiny_unets.inputs("unet2d", timestep=9))


def _build_unet():
    return pytest.importorskip("tiny_unets").tiny_unet("unet2d")


def _llama():
    return tiny_decoder("llama").eval()


def _cnn():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))


CASES = [
    (mmskip.MoDConfig(), _llama, _routed),
    (mmskip.TokenReductionConfig(), _llama, _routed),
    (mmskip.LayerPlanConfig(drop=(1,)), _llama, _decoder),
    (mmskip.LayerBitsConfig(bits=(8, 4, 4, 8), group=16), _llama, _decoder),
    (mmskip.EarlyExitConfig(decoder=0.5), _llama, _decoder),
    (mmskip.SelfSpeculationConfig(exit_after=2), _llama, lambda model: model.generate(IDS[:1], max_new_tokens=4)),
    (mmskip.LayerMaskConfig(), _cnn, lambda model: model(torch.zeros(1, 3, 8, 8))),
    (mmskip.StepCacheConfig(), _build_unet, _unet),
    (mmskip.SkipScaleConfig(scale=0.7), _build_unet, _unet),
    (mmskip.FreeUConfig(), _build_unet, _unet),
]


@pytest.mark.parametrize(("config", "build", "call"), CASES, ids=[type(case[0]).__name__ for case in CASES])
def test_every_method_reports_before_and_after_a_forward(config, build, call):
    model = mmskip.apply_(build(), config)
    for ran in (False, True):
        if ran:
            with torch.no_grad():
                call(model)
        (report,) = mmskip.report(model).values()
        assert isinstance(report, mmskip.MethodReport) and dataclasses.is_dataclass(report)
        assert str(report) and json.loads(json.dumps(report.to_dict()))
    assert list(mmskip.report(model)) == [type(config).__name__]
    mmskip.remove_(model)
    assert mmskip.report(model) == {}


def test_exits_are_reported_by_stack():
    model = mmskip.apply_(
        tiny_seq2seq.build("bart").eval(), mmskip.EarlyExitConfig(encoder=FixedExit(3), decoder=FixedExit(2))
    )
    report = mmskip.report(model)["EarlyExitConfig"]
    assert not report.ran and "did not run" in str(report) and report.to_dict() == {"layers": {}, "depth": {}}
    with torch.no_grad():
        model(**tiny_seq2seq.inputs("bart"))
    report = mmskip.report(model)["EarlyExitConfig"]
    assert report.ran and (report.layers["encoder"] == 3).all() and (report.layers["decoder"] == 2).all()
    assert report.depth == {"encoder": 4, "decoder": 4} and "decoder: 2.00 of 4 layers on average" in str(report)
    model.train()
    model(**tiny_seq2seq.inputs("bart"))
    assert not mmskip.report(model)["EarlyExitConfig"].ran


def test_calls_of_a_step_cache_are_reported():
    tiny_unets = pytest.importorskip("tiny_unets")
    model = mmskip.apply_(tiny_unets.tiny_unet("unet2d"), mmskip.StepCacheConfig(interval=3))
    assert "did not run" in str(mmskip.report(model)["StepCacheConfig"])
    with torch.no_grad():
        for time in (900, 700, 500, 300):
            tiny_unets.output(model, tiny_unets.inputs("unet2d", timestep=time))
    report = mmskip.report(model)["StepCacheConfig"]
    assert (report.calls, report.full_calls) == (4, 2) and "2 of 4 calls ran in full" in str(report)


def test_the_report_of_speculation_counts_the_tokens_decoded():
    model = mmskip.apply_(tiny_decoder("llama").eval(), mmskip.SelfSpeculationConfig(exit_after=2))
    assert "nothing was decoded" in str(mmskip.report(model)["SelfSpeculationConfig"])
    model.generate(IDS[:1], max_new_tokens=8, eos_token_id=None)
    report = mmskip.report(model)["SelfSpeculationConfig"]
    assert report.tokens == report.accepted + report.steps >= 7 and report.skipped_attn == (2, 3)


def test_two_configs_of_one_kind_have_a_report_each():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(keep=0.5, layers=(1,)))
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.2, layers=(3,)))
    found = mmskip.report(model)
    assert list(found) == ["MoDConfig", "MoDConfig#2"]
    assert found["MoDConfig#2"].sites == ("block.3",) and found["MoDConfig"].config["keep"] == 0.5


@dataclasses.dataclass(frozen=True)
class _Doubling:
    times: int = 2


class _Doubled(nn.Module):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * 2


class _OnlyLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(2, 2)

    def forward(self, x):
        return self.only(x)


@dataclasses.dataclass(frozen=True)
class _Doubles(mmskip.MethodReport):
    times: int
    value: torch.Tensor


def test_a_plug_in_reports_its_settings_or_registers_more(monkeypatch):
    monkeypatch.setattr("mmskip.families._MATCHES", {})
    monkeypatch.setattr("mmskip.registry._HANDLERS", {})
    monkeypatch.setattr("mmskip.reporting._REPORTERS", {})

    @family("only_linear")
    def match(model):
        view = View()
        view.family, view.root, view.stacks = "only_linear", model, {"block": (model.only,)}
        return (view, "") if isinstance(model, _OnlyLinear) else (None, "no")

    @registry.register(_Doubling, "only_linear")
    def double(config, view):
        return [mmskip.swap.around(view.sites("block")[0], _Doubled, None, "output")]

    model = mmskip.apply_(_OnlyLinear(), _Doubling())
    assert mmskip.report(model) == {"_Doubling": AppliedReport({"times": 2}, "only_linear", ("block.0",))}
    assert "1 sites (block.0) of a model of family only_linear; times=2" in str(mmskip.report(model)["_Doubling"])

    @register_report(_Doubling)
    def doubled(record, model):
        return _Doubles(record.config.times, torch.ones(2))

    assert mmskip.report(model)["_Doubling"].to_dict() == {"times": 2, "value": [1.0, 1.0]}
    with pytest.raises(ValueError, match="_Doubling has a report function already"):
        register_report(_Doubling)(lambda record, model: None)
