"""What every method must pass, on tiny random models: the registry times the cases of the methods' own test files.

A registered method without a case for each family that it serves fails here. See CONTRIBUTING, "Adding a method".
"""

import copy
import importlib.util
import json
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Case, Outputs
from peft import LoraConfig, get_peft_model
from tiny_decoders import randomize_routers
from torch import nn

import mmskip
from mmskip import registry, swap

METHODS = Path(__file__).parents[1] / "mmskip" / "methods"


def collect() -> list[Case]:
    """The cases of all test files of methods."""
    cases: list[Case] = []
    for path in sorted(METHODS.glob("test_*.py")):
        if "\nCONTRACT = " in path.read_text():
            name = f"contract_of_{path.stem}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            cases += module.CONTRACT
    return cases


CASES = collect()
every = pytest.mark.parametrize("case", CASES, ids=str)


def fingerprint(model: nn.Module) -> Any:
    """Classes, attributes and children of all modules, and the keys of the weights."""
    state = {name: (type(m), set(m.__dict__), list(m._modules)) for name, m in model.named_modules()}
    return state, list(model.state_dict())


def equal(found: Outputs, expected: Outputs) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("config", "family"),
    [(config, family) for config in registry.config_types().values() for family in registry.families_of(config)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_registered_method_brings_a_case_for_every_family(config, family):
    """`CONTRACT` in tests/mmskip/methods/test_<method>.py, see tests/support/contract.py."""
    assert any(type(case.config) is config and case.base.family == family for case in CASES)


@every
def test_the_identity_is_the_base_model_bit_for_bit(case):
    if case.identity is None:
        assert case.why, "say why there is no identity"
        return
    model = case.base.build()
    expected = case.run(model)
    mmskip.apply_(model, case.identity)
    assert equal(case.run(model), expected)


@every
def test_the_settings_do_something(case):
    assert equal(case.run(case.build(case.config)), case.run(case.build())) == case.exact


@every
def test_remove_leaves_the_model_as_it_was(case):
    model = case.build()
    before, expected = fingerprint(model), case.run(model)
    after_run = fingerprint(model)
    mmskip.apply_(model, case.config)
    assert mmskip.applied(model) == [case.config]
    case.run(model)
    mmskip.remove_(model)
    assert fingerprint(model) in (before, after_run) and mmskip.applied(model) == []
    assert equal(case.run(model), expected)


@every
def test_an_error_half_way_leaves_the_model_as_it_was(case, monkeypatch):
    model, original = case.build(), swap.swap
    before, expected = fingerprint(model), case.run(case.build())
    changes: list[swap.Change] = []
    monkeypatch.setattr(swap, "swap", lambda change: (changes.append(change), original(change)))
    mmskip.apply_(case.build(), case.config)
    for step in sorted({0, len(changes) // 2, len(changes) - 1}):
        left = [step]

        def failing(change: swap.Change, left: list[int] = left) -> None:
            if not left[0]:
                raise RuntimeError("half-way")
            left[0] -= 1
            original(change)

        monkeypatch.setattr(swap, "swap", failing)
        with pytest.raises(RuntimeError, match="half-way"):
            mmskip.apply_(model, case.config)
        assert fingerprint(model) == before
    monkeypatch.undo()
    assert equal(case.run(model), expected)


@every
def test_what_is_saved_is_loaded(case, tmp_path):
    model = case.build(case.config)
    expected = case.run(model)
    mmskip.save(model, tmp_path)
    loaded = mmskip.load_(case.base.build(), tmp_path)
    assert mmskip.applied(loaded) == [case.config] and equal(case.run(loaded), expected)
    entry = json.loads((tmp_path / "mmskip.json").read_text())["methods"][0]
    assert entry["version"] == type(case.config).VERSION and entry["family"] == case.base.family


@every
def test_the_state_dict_is_that_of_the_model_and_new_children(case):
    model, base = case.build(case.config), case.base.build()
    new = {key for key in model.state_dict() if key not in base.state_dict()}
    assert all("mmskip_" in key for key in new) and set(base.state_dict()) <= set(model.state_dict())
    expected, other = case.run(model), case.build(case.config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "mmskip_" in name:
                parameter.add_(1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert equal(case.run(other), expected)


@every
def test_a_copy_is_independent(case):
    model = case.build(case.config)
    expected = case.run(model)
    twin = copy.deepcopy(model)
    mmskip.remove_(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert mmskip.applied(twin) == [case.config] and equal(case.run(twin), expected)


@every
def test_the_config_goes_through_json_and_stays_as_it_is(case):
    kind = type(case.config)
    for config in (case.config, case.identity or case.config):
        again = kind.from_dict(json.loads(json.dumps(config.to_dict())), kind.VERSION)
        assert again == config and hash(again) == hash(config) and replace(config) == config
    with pytest.raises(FrozenInstanceError):
        setattr(case.config, fields(case.config)[0].name, None)
    with pytest.raises(ValueError, match="has no misspelt; expected keys among"):
        kind.from_dict({"misspelt": 1})
    with pytest.raises(ValueError, match="reads versions up to"):
        kind.from_dict({}, kind.VERSION + 1)


@every
def test_bad_values_are_named_with_their_range(case):
    assert case.bad, "give a value out of range per field that has one"
    for name, value in case.bad.items():
        with pytest.raises(ValueError, match=name) as error:
            replace(case.config, **{name: value})
        shown = [value, list(value), *value] if isinstance(value, tuple) else [value]
        assert any(str(item) in str(error.value) for item in shown), f"{error.value} does not show {value!r}"


@pytest.mark.parametrize("case", [case for case in CASES if case.compiles], ids=str)
def test_static_decisions_compile_to_one_graph(case):
    model = case.build(case.config)
    with torch.no_grad():
        expected = case.base.run(model, **case.call)[0]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        call: dict[str, Any] = dict(case.call)
        found = case.base.run(_Only(compiled), **call)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class _Only(nn.Module):
    """Runs a compiled model's forward; its `generate` would run the plain one."""

    def __init__(self, compiled: Any) -> None:
        super().__init__()
        self.compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Nothing: only the forward is compared."""
        return torch.zeros(1)


TRAINED = pytest.mark.parametrize("case", [case for case in CASES if case.trains], ids=str)


@TRAINED
def test_gradient_checkpointing_gives_the_same_gradients(case):
    grads = []
    for checkpointing in (False, True):
        model = case.build(case.config).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        case.loss(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(g.abs().max() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-5)


@TRAINED
@pytest.mark.parametrize("first", ["lora", "method"])
def test_lora_before_and_after_leaves_outputs_and_new_weights(case, first):
    """`all-linear` adapters start as zero, so outputs stay; the method's own weights keep their names."""
    lora = LoraConfig(r=2, target_modules="all-linear")
    expected, new = case.run(case.build(case.config)), _new_keys(case.build(case.config))
    if first == "lora":
        model = get_peft_model(case.base.build(), lora)
        mmskip.apply_(model, case.config)
    else:
        model = get_peft_model(case.build(case.config), lora)
    randomize_routers(model)
    assert all(any(found.endswith(key) for found in _new_keys(model)) for key in new)
    torch.testing.assert_close(case.run(model)[0], expected[0], atol=1e-5, rtol=1e-5)
    model.train()
    if new and first == "method":  # peft froze them
        with pytest.raises(RuntimeError, match="frozen"):
            case.loss(model)
        return
    case.loss(model).backward()
    added = [parameter for name, parameter in model.named_parameters() if "mmskip_" in name]
    assert all(p.requires_grad and p.grad is not None and p.grad.abs().max() > 0 for p in added)
    mmskip.remove_(model)
    assert not _new_keys(model)


def _new_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if "mmskip_" in key]
