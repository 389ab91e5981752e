"""Calibration keeps its promise over many calibrations, and says when there are too few samples for one."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

import mmskip
from mmskip.calibration import risk_control
from mmskip.calibration.risk_control import choose, p_value, samples_needed
from mmskip.exits.settings import ExitAt

RISKS = (0.0, 0.02, 0.05, 0.08, 0.11, 0.16, 0.3)
"""True risk of each setting, safest first."""


def _resampled(method: str, delta: float | None, epsilon: float, samples: int, times: int = 200) -> list[float]:
    """The true risk of the setting that each of many calibrations chooses."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(times):
        luck = torch.rand(
            samples, generator=generator
        )  # coupled: a sample that fails at a setting fails at riskier ones
        losses = [(luck < risk).double().tolist() for risk in RISKS]
        index = choose(losses, epsilon, delta, method).index
        found.append(0.0 if index is None else RISKS[index])
    return found


@pytest.mark.parametrize("method", ["ltt", "bonferroni"])
def test_true_risk_exceeds_epsilon_in_at_most_delta_of_200_calibrations(method: str) -> None:
    epsilon, delta = 0.1, 0.1
    found = _resampled(method, delta, epsilon, 300)
    share = sum(risk > epsilon for risk in found) / len(found)
    assert share <= delta + 2 * math.sqrt(delta * (1 - delta) / len(found))
    assert sum(found) / len(found) > 0.03  # it is no promise kept by never leaving the safest setting


def test_conformal_risk_control_keeps_the_mean() -> None:
    found = _resampled("crc", None, 0.1, 100)
    assert 0.05 < sum(found) / len(found) <= 0.1 + 0.01


def test_p_values_are_valid_and_sharp_at_no_loss() -> None:
    assert p_value(0.0, 50, 0.1) == pytest.approx(0.9**50)
    assert p_value(0.1, 50, 0.1) == 1
    generator = torch.Generator().manual_seed(1)
    risks = (torch.rand(4000, 60, generator=generator) < 0.1).double().mean(-1).tolist()
    assert sum(p_value(risk, 60, 0.1) <= 0.1 for risk in risks) / 4000 <= 0.1


@pytest.mark.parametrize(("method", "needed"), [("ltt", 59), ("bonferroni", 90), ("crc", 19)])
def test_too_few_samples_are_refused_with_the_number_needed(method: str, needed: int) -> None:
    losses = [[0.0] * (needed - 1)] * 5
    with pytest.raises(ValueError, match=f"at least {needed} samples"):
        choose(losses, 0.05, 0.05, method)
    assert samples_needed(0.05, 0.05, 5, method) == needed
    assert choose([[0.0] * needed] * 5, 0.05, 0.05, method).index == 4


def test_fixed_sequence_stops_at_the_first_failure_and_bonferroni_does_not() -> None:
    losses = [[0.0] * 200, [1.0] * 200, [0.0] * 200]
    assert choose(losses, 0.1, 0.05, "ltt").index == 0
    assert choose(losses, 0.1, 0.05, "bonferroni").index == 2
    assert choose([[1.0] * 200], 0.1, 0.05, "ltt").index is None


def test_losses_with_another_bound_are_scaled() -> None:
    losses = [[0.0] * 100, [1.0, 0.0, 0.0, 0.0] * 25]
    assert (
        choose([[3 * v for v in row] for row in losses], 1.2, 0.05, bound=3.0).index
        == choose(losses, 0.4, 0.05).index
        == 1
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"delta": 1.0}, "delta is 1.0"),
        ({"method": "guess"}, "method is 'guess'"),
        ({"losses": [[0.0] * 99, [0.0] * 98]}, "different numbers"),
        ({"losses": [[2.0] * 99]}, r"a loss is 2.0; expected all in \[0, 1\]"),
        ({"losses": []}, "no losses"),
    ],
)
def test_bad_values_are_refused(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        choose(**{"losses": [[0.0] * 99], "epsilon": 0.1, "delta": 0.05, **changes})


def test_calibrate_applies_each_config_and_leaves_the_model_as_it_was() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=3).eval()
    configs = [mmskip.LayerMaskConfig(), mmskip.LayerMaskConfig()]
    seen = []

    def risk(changed: torch.nn.Module, batch: list[float]) -> list[float]:
        seen.append(tuple(mmskip.applied(changed)))
        return batch

    found = mmskip.calibrate(model, configs, [[0.0] * 30, [0.0] * 30], risk, 0.1)
    assert found.config is configs[1] and found.samples == 60 and "setting 2" in str(found)
    assert seen == [(configs[0],)] * 2 + [(configs[1],)] * 2 and mmskip.applied(model) == []
    mmskip.apply_(model, configs[0])
    with pytest.raises(ValueError, match="calibrate a model without methods"):
        mmskip.calibrate(model, configs, [[0.0]], risk, 0.1)


class _Coupled(torch.nn.Module):
    """Stands for a model; a config's loss and cost come from the test."""


def test_coupled_thresholds_are_ordered_on_samples_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = mmskip.EarlyExitConfig.grid(image=[1.0, 0.9], text=[1.0, 0.8], decoder=[0.99, 0.9], cache_policy="copy")
    assert len(configs) == 8 and {c.cache_policy for c in configs} == {"copy"}
    risks = {(a, b, c): {1.0: 0.0, 0.9: 0.02}[a] + {1.0: 0.0, 0.8: 0.3}[b] + {0.99: 0.0, 0.9: 0.03}[c]
             for a in (1.0, 0.9) for b in (1.0, 0.8) for c in (0.99, 0.9)}  # fmt: skip
    applied: list[mmskip.EarlyExitConfig] = []
    monkeypatch.setattr(risk_control, "apply_", lambda model, config: applied.append(config))
    monkeypatch.setattr(risk_control, "remove_", lambda model: None)

    def key(config: mmskip.EarlyExitConfig) -> tuple[float, float, float]:
        exits = (config.image, config.text, config.decoder)
        image, text, decoder = (exit_.threshold for exit_ in exits if isinstance(exit_, ExitAt))
        return image, text, decoder

    def risk(model: torch.nn.Module, batch: torch.Tensor) -> list[float]:
        return (batch < risks[key(applied[-1])]).double().tolist()

    def cost(model: torch.nn.Module, batch: torch.Tensor) -> float:
        return sum(key(applied[-1]))

    model, grid = _Coupled().eval(), torch.linspace(0.0005, 1, 1000)
    found = mmskip.calibrate(model, configs, [grid], risk, epsilon=0.1, scout=[grid[::2]], cost=cost)
    assert found.config == mmskip.EarlyExitConfig(image=0.9, text=1.0, decoder=0.9, cache_policy="copy")
    assert configs[found.order[found.index or 0]] == found.config and found.risks[found.index or 0] < 0.06
    tested = [configs[i] for i in found.order]
    assert tested[0] == configs[0] and replace(found.config, text=0.8) in tested
    assert list(found.costs) == sorted(found.costs, reverse=True) and applied[8:] == tested


def test_a_latency_budget_takes_the_least_loss_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(mmskip.calibrate.__globals__["time"], "perf_counter", lambda: clock["now"])
    configs = mmskip.EarlyExitConfig.grid(decoder=[1.0, 0.9, 0.8])
    applied: list[mmskip.EarlyExitConfig] = []
    monkeypatch.setattr(risk_control, "apply_", lambda model, config: applied.append(config))
    monkeypatch.setattr(risk_control, "remove_", lambda model: None)

    def risk(model: torch.nn.Module, batch: int) -> list[float]:
        exits = applied[-1].decoder
        assert isinstance(exits, ExitAt)
        threshold = exits.threshold
        clock["now"] += threshold * (10 if batch == 2 else 1)  # one slow batch moves no median
        return [1 - threshold] * 4

    found = mmskip.calibrate(_Coupled().eval(), configs, [0, 1, 2, 3], risk, latency=0.95)
    assert found.config == configs[1] and found.samples == 16 and found.costs == pytest.approx((1.0, 0.9, 0.8))
    assert "0.9 s" in str(found) or "0.9" in str(found)
    assert mmskip.calibrate(_Coupled().eval(), configs, [0], risk, latency=0.1).config is None
    for wrong in ({}, {"epsilon": 0.1, "latency": 1.0}, {"latency": -1.0}):
        with pytest.raises(ValueError, match="latency"):
            mmskip.calibrate(_Coupled().eval(), configs, [0], risk, **wrong)


def test_a_grid_of_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="EarlyExitConfig has no decodr"):
        mmskip.EarlyExitConfig.grid(decodr=[0.9])


@pytest.mark.parametrize("loss", [0.1, torch.tensor(0.1)])
def test_one_loss_for_a_batch_is_refused(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk_control, "apply_", lambda model, config: None)
    monkeypatch.setattr(risk_control, "remove_", lambda model: None)
    with pytest.raises(ValueError, match="expected one loss per sample of the batch"):
        mmskip.calibrate(_Coupled().eval(), [mmskip.EarlyExitConfig()], [0], lambda model, batch: loss, 0.1)


def test_a_model_that_runs_all_layers_and_an_empty_scout_are_refused() -> None:
    model = torch.nn.Sequential(_Coupled(), _Coupled()).eval()
    asked: list[int] = []

    def risk(model: torch.nn.Module, batch: int) -> list[float]:
        asked.append(batch)
        return [0.0] * batch

    configs = [mmskip.LayerMaskConfig()]
    model[1].train()
    with pytest.raises(ValueError, match="Sequential is in training mode"):
        mmskip.calibrate(model, configs, [100], risk, 0.1)
    model.eval()
    with pytest.raises(ValueError, match="scout has no samples"):
        mmskip.calibrate(model, configs, [100], risk, 0.1, scout=[])
    assert asked == [] and model.training is False
