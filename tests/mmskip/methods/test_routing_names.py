"""Names of version 0.1 of the methods that route tokens, and the examples in their docstrings."""

import doctest
import json

import pytest
import torch
from tiny_decoders import tiny_decoder

import mmskip
from mmskip.methods import mixture_of_depths, token_reduction


@pytest.mark.parametrize(
    ("kind", "old", "new", "warning"),
    [
        (mmskip.MoDConfig, {"gate": "own"}, {"gate": "separate"}, "gate='own' is now 'separate'"),
        (mmskip.TokenReductionConfig, {"after": 1}, {"after_layer": 1}, "after is now after_layer"),
    ],
)
def test_old_names_are_read_and_warned_of(kind, old, new, warning):
    config = kind(**new)
    assert config.to_dict().items() >= new.items()
    for build in (lambda: kind(**old), lambda: kind.from_dict(old)):
        with pytest.warns(FutureWarning, match=warning):
            assert build() == config


def test_an_adapter_with_an_old_gate_loads(tmp_path):
    torch.manual_seed(0)
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(gate="separate"))
    for name, weight in model.named_parameters():
        if "mmskip_" in name:
            torch.nn.init.normal_(weight)
    mmskip.save(model, tmp_path)
    [path] = tmp_path.glob("*.json")
    text = path.read_text()
    assert '"separate"' in text
    path.write_text(text.replace('"separate"', '"own"'))
    assert json.loads(path.read_text())
    other = tiny_decoder("llama")
    with pytest.warns(FutureWarning, match="gate='own' is now 'separate'"):
        mmskip.load_(other, tmp_path)
    assert mmskip.applied(other) == mmskip.applied(model)
    added = {name: weight for name, weight in model.state_dict().items() if "mmskip_" in name}
    assert added and all(torch.equal(other.state_dict()[name], weight) for name, weight in added.items())


def test_helpers_keep_their_old_names():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(keep=0.4))
    with pytest.warns(FutureWarning, match="keep_in_use is now read_keep"):
        assert mixture_of_depths.keep_in_use(model) == mixture_of_depths.read_keep(model) == 0.4
    with pytest.warns(FutureWarning, match="policies is now find_policies"):
        assert mixture_of_depths.policies(model) == mixture_of_depths.find_policies(model)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mixture_of_depths.nothing  # noqa: B018


@pytest.mark.parametrize("config", [mixture_of_depths.MoDConfig, token_reduction.TokenReductionConfig])
def test_the_example_of_a_config_runs(config):
    [example] = [test for test in doctest.DocTestFinder(recurse=False).find(config, config.__name__) if test.examples]
    assert doctest.DocTestRunner().run(example).failed == 0
