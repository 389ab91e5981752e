"""`python -m mmskip.env` says what runs here, and never fails on a machine without a GPU or xFormers."""

import logging
import subprocess
import sys

import pytest
import torch

from mmskip import env
from mmskip.env import pick_device
from mmskip.ops import backend


def test_report_names_versions_device_and_paths():
    text = env.report()
    assert f"torch {torch.__version__.split('+')[0]}" in text
    for operation in ("select_tokens", "merge_tokens", "ragged_attention"):
        assert f"{operation}: " in text
    assert "mmskip_ragged" in text


def test_a_cpu_runs_torch_and_says_why():
    paths = env.operation_paths(torch.device("cpu"))
    assert {path.name for path in paths.values()} == {"torch"}
    assert "CUDA only" in paths["ragged_attention"].reason


def test_missing_packages_are_said_to_be_missing():
    assert env.package_versions(["mmskip-no-such-package"]) == {"mmskip-no-such-package": "not installed"}


def test_the_variable_switches_xformers_off(monkeypatch):
    monkeypatch.setenv(backend.ENV_VAR, "torch")
    assert backend.operation_path("ragged_attention", torch.device("cuda")) == backend.Path("torch", "MMSKIP_OPS=torch")


def test_an_unknown_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv(backend.ENV_VAR, "fast")
    with pytest.raises(ValueError, match="MMSKIP_OPS='fast': expected 'auto' or 'torch'"):
        backend.operation_path("select_tokens", torch.device("cpu"))


def test_a_cuda_machine_without_xformers_falls_back_quietly(monkeypatch, caplog):
    monkeypatch.setattr(backend, "import_xformers", lambda module: None)
    with caplog.at_level(logging.WARNING):
        assert backend.operation_path("select_tokens", torch.device("cuda")).name == "torch"
        assert backend.operation_path("ragged_attention", torch.device("cuda")).name == "torch"
    assert caplog.records == []


def test_runs_as_a_module_without_warnings():
    run = subprocess.run([sys.executable, "-m", "mmskip.env"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "device c" in run.stdout
    assert "xformers" not in run.stderr.lower()


def test_a_device_is_picked_with_its_index_or_refused(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    for name, count, message in (
        ("gpu", 0, "expected auto, cpu"),
        ("cuda:1", 1, "1 CUDA devices"),
        ("cuda", 0, "0 CUDA"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(ValueError, match=message):
            pick_device(name)
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    # torch.cuda.set_device takes no device without an index
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
