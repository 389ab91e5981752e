"""The measuring helpers: what is counted and what is written. No test asserts a time."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import measure as _measure
from common.measure import emit, environment, interleaved_ratio, saved_activation_bytes
from mmskip.utils.timing import paired_models, sharing_copy


def test_ratio_pairs_each_run_of_the_base_with_one_of_the_other():
    times = iter([0, 4, 4, 6, 6, 8, 8, 14])  # base 4, fn 2; then, in turned order, fn 2 and base 6
    calls: list[str] = []
    ratio = interleaved_ratio(
        lambda: calls.append("base"), lambda: calls.append("fn"), pairs=2, warmup=1, clock=lambda: next(times)
    )
    assert calls == ["base", "fn", "base", "fn", "fn", "base"]
    assert (ratio.median, ratio.base_s, ratio.fn_s, ratio.pairs) == (2.5, 5, 2, 2)
    assert ratio.q1 <= ratio.median <= ratio.q3


def test_ratio_leaves_the_garbage_collector_as_it_was_after_an_error():
    def fail() -> None:
        raise RuntimeError("step failed")

    with pytest.raises(RuntimeError, match="step failed"):
        interleaved_ratio(fail, fail, warmup=0)
    assert gc.isenabled()


def test_ratio_refuses_a_single_pair():
    with pytest.raises(ValueError, match="pairs is 1"):
        interleaved_ratio(int, int, pairs=1)


def test_activation_bytes_count_each_storage_once():
    x = torch.randn(1000, requires_grad=True)
    assert saved_activation_bytes(lambda: x.exp().sum()) == 4000
    assert saved_activation_bytes(lambda: x.exp().exp().exp().sum()) == 12000
    assert saved_activation_bytes(lambda: (x.exp().view(10, 100) * x.exp().view(10, 100)).sum()) == 8000


def test_activation_bytes_exclude_parameters_and_excluded_inputs():
    layer = nn.Linear(16, 16)
    x = torch.randn(8, 16)
    assert saved_activation_bytes(lambda: layer(x)) == x.nbytes
    assert saved_activation_bytes(lambda: layer(x), exclude=[x]) == 0
    assert saved_activation_bytes(lambda: x.requires_grad_() @ layer.weight.t(), exclude=[x]) == 0


def test_activation_bytes_are_the_peak_of_what_is_alive():
    """Two passes one after the other hold no more than one, as backward lets go of what it used."""
    x = torch.randn(1000, requires_grad=True)

    def step() -> None:
        x.exp().exp().sum().backward()

    def two_steps() -> None:
        step()
        step()

    assert saved_activation_bytes(two_steps) == saved_activation_bytes(step) == 8000


def test_gradients_are_not_disturbed():
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    want = torch.autograd.grad(layer(x).square().sum(), layer.weight)[0]
    got: list[torch.Tensor] = []
    saved_activation_bytes(lambda: got.extend(torch.autograd.grad(layer(x).square().sum(), layer.weight)))
    assert torch.equal(got[0], want)


def test_environment_says_what_was_measured_where(monkeypatch):
    found = environment()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["device"]
    assert isinstance(found["dirty"], bool | None)
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_emit_writes_the_file_and_prints_one_line_last(tmp_path, capsys):
    result = {"name": "demo", "speedup": 1.5, "ideal": 1.6, "shape": [2, 3]}
    path = emit(result, tmp_path / "deep" / "demo.json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert json.loads(lines[0]) == json.loads(path.read_text())
    assert json.loads(lines[0])["environment"]["torch"]
    assert [file.name for file in path.parent.iterdir()] == ["demo.json"]


def test_emit_goes_to_the_results_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_measure, "RESULTS", tmp_path)
    emit({"name": "demo", "speedup": 1.5, "ideal": 1.6, "shape": [2]})
    assert (tmp_path / "demo.json").exists()


@pytest.mark.parametrize(
    ("change", "message"), [({"ideal": float("nan")}, "JSON"), ({"shape": None}, r"lacks \['shape'\]")]
)
def test_emit_refuses_half_a_result(tmp_path, change, message):
    result = {"name": "demo", "speedup": 1.5, "ideal": 1.6, "shape": [2]} | change
    result = {key: value for key, value in result.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        emit(result, tmp_path / "demo.json")
    assert list(tmp_path.iterdir()) == []


def test_two_models_are_timed_in_one_place_which_is_then_as_it_was():
    owner, seen = SimpleNamespace(model="own"), []
    ratio = paired_models(owner, "model", "base", "other", lambda: seen.append(owner.model), pairs=2)
    assert owner.model == "own" and ratio.pairs == 2
    assert seen.count("base") == seen.count("other") == 4  # two of them untimed
    with pytest.raises(ZeroDivisionError):
        paired_models(owner, "model", "base", "other", lambda: 1 / 0, pairs=2)
    assert owner.model == "own"


def test_a_sharing_copy_has_the_same_weights_and_its_own_modules():
    layer = torch.nn.BatchNorm1d(3)
    copied = sharing_copy(layer)
    assert copied is not layer
    assert copied.weight is layer.weight and copied.running_mean is layer.running_mean
