"""What the configs of all methods share: versions, old spellings, nested settings, and checks that say the range."""

import copy
import json
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jsonargparse
import pytest
from jsonargparse import ArgumentParser, set_parsing_settings

from mmskip import config as base
from mmskip.config import (
    MethodConfig,
    check_choice,
    check_count,
    check_flag,
    check_indices,
    check_number,
    check_ratio,
    read_old_spellings,
    renamed,
    retired,
)


@dataclass(frozen=True)
class ExitAt:
    threshold: float = 0.9
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FixedExit:
    layer: int = 1


def gather(values: dict[str, Any]) -> dict[str, Any]:
    values["decoder"] = ExitAt(values.pop("threshold"))
    return values


@renamed(
    {"after": "after_layer"},
    values={"gate": {"own": "separate"}},
    convert=gather,
    old=("threshold",),
)
@dataclass(frozen=True)
class ToyConfig(MethodConfig):
    """A method of today, which was spelt differently."""

    VERSION: ClassVar[int] = 3

    after_layer: int = 2
    gate: str = "tanh"
    decoder: ExitAt | FixedExit | None = None
    keep: float | Sequence[float] = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.keep, list):
            object.__setattr__(self, "keep", tuple(self.keep))

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """Version 1 counted from one."""
        if version == 1 and "after_layer" in values:
            values["after_layer"] -= 1
        return values


class Model:
    """Takes method configs, as the project's modules do."""

    def __init__(self, methods: list[MethodConfig] | None = None, method: MethodConfig | None = None):
        self.methods, self.method = methods, method


def test_the_round_trip_through_json_keeps_nested_settings():
    for decoder in (None, ExitAt(0.5, (1, 2)), FixedExit(3)):
        config = ToyConfig(after_layer=1, decoder=decoder, keep=[0.1, 0.2])
        values = json.loads(json.dumps(config.to_dict()))
        again = ToyConfig.from_dict(values, ToyConfig.VERSION)
        assert again.to_dict() == config.to_dict() and type(again.decoder) is type(decoder)
    with pytest.raises(ValueError, match=r"decoder has the keys depth; expected those of ExitAt .* or FixedExit"):
        ToyConfig.from_dict({"decoder": {"depth": 3}})


def test_settings_of_an_older_version_are_upgraded_and_of_a_newer_one_refused():
    assert ToyConfig.from_dict({"after_layer": 3}, version=1).after_layer == 2
    assert ToyConfig.from_dict({"after_layer": 3}, version=2).after_layer == 3
    assert ToyConfig.from_dict({"after_layer": 3}).after_layer == 3
    for version in (0, 4, "1"):
        with pytest.raises(ValueError, match=re.escape(f"saved in version {version!r}; this mmskip reads versions up")):
            ToyConfig.from_dict({}, version=version)
    with pytest.raises(ValueError, match="has no aftr; expected keys among after_layer, gate, decoder, keep"):
        ToyConfig.from_dict({"aftr": 1})


@pytest.mark.parametrize("make", [lambda values: ToyConfig(**values), ToyConfig.from_dict])
def test_old_names_values_and_groups_are_read_with_a_warning(make):
    with pytest.warns(FutureWarning, match="ToyConfig: after is now after_layer"):
        assert make({"after": 5}) == ToyConfig(after_layer=5)
    with pytest.warns(FutureWarning, match="gate='own' is now 'separate'"):
        assert make({"gate": "own"}).gate == "separate"
    with pytest.warns(FutureWarning, match=r"threshold is now spelt decoder="):
        assert make({"threshold": 0.3}) == ToyConfig(decoder=ExitAt(0.3))
    with pytest.raises(ValueError, match="after is the old name of after_layer"), pytest.warns(FutureWarning):
        make({"after": 5, "after_layer": 5})


def test_a_renamed_config_is_a_dataclass_like_any_other(recwarn):
    config = ToyConfig(4, "tanh")
    assert config == replace(ToyConfig(4), gate="tanh") == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(ToyConfig(4)) and "after_layer=4" in repr(config)
    with pytest.raises(TypeError, match="takes 4 settings"):
        ToyConfig(1, 2, 3, 4, 5)
    with pytest.raises(TypeError, match="after_layer twice"):
        ToyConfig(1, after_layer=2)
    assert not recwarn
    with pytest.warns(FutureWarning, match="after is now after_layer"):
        assert config.after == 4


@pytest.fixture
def parser(monkeypatch):
    types = {"ToyConfig": ToyConfig}
    settings = copy.copy(base._RETIRED)
    monkeypatch.setattr(base, "_RETIRED", settings)
    retired("AncientConfig", lambda values: ToyConfig(after_layer=values["start"]))
    loader = jsonargparse.get_loader("yaml")
    read_old_spellings(types)
    read_old_spellings(types)  # once more changes nothing
    set_parsing_settings(subclasses_enabled=[MethodConfig, ToyConfig])
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--config", action="config")
    made.add_class_arguments(Model, "model")
    yield made
    jsonargparse.set_loader("yaml", getattr(loader, "original", loader))


def parsed(parser, arguments):
    config = parser.parse_args(arguments)
    return parser.dump(config), parser.instantiate(config).model


def test_yaml_with_old_spellings_is_read_and_written_anew(parser, tmp_path):
    old = {"class_path": f"{__name__}.ToyConfig", "init_args": {"after": 7, "gate": "own"}}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"model": {"methods": [old], "method": old}}))
    with pytest.warns(FutureWarning, match="after is now after_layer"):
        dumped, model = parsed(parser, ["--config", str(file)])
    assert model.methods == [ToyConfig(7, "separate")] and model.method == model.methods[0]
    assert "after_layer: 7" in dumped and "after:" not in dumped and "own" not in dumped
    with pytest.warns(FutureWarning, match="own"):
        _, model = parsed(parser, ["--model.methods", json.dumps([old])])
    assert model.methods == [ToyConfig(7, "separate")]
    with pytest.raises(Exception, match="aftr"):
        parsed(parser, ["--model.methods", json.dumps([old | {"init_args": {"aftr": 1}}])])


def test_yaml_names_nested_settings_and_retired_configs(parser):
    given = {"class_path": f"{__name__}.ToyConfig", "init_args": {"decoder": {"layer": 3}, "keep": [0.1, 0.2]}}
    _, model = parsed(parser, ["--model.methods", json.dumps([given])])
    assert model.methods == [ToyConfig(decoder=FixedExit(3), keep=(0.1, 0.2))]
    assert base.from_entry({}, "AncientConfig", {"start": 4}) == ToyConfig(4)
    with pytest.raises(ValueError, match="NoConfig is no method; this mmskip knows ToyConfig"):
        base.from_entry({"ToyConfig": ToyConfig}, "NoConfig", {})
    tree = base.current_settings([{"class_path": "mmskip.AncientConfig", "init_args": {"start": 4}}], {})
    assert tree[0]["class_path"] == "mmskip.ToyConfig" and tree[0]["init_args"]["after_layer"] == 4


@pytest.mark.parametrize(
    ("check", "bad", "message"),
    [
        (lambda v: check_number("x", v), (True, "1", None, math.nan, math.inf), "expected a number."),
        (lambda v: check_number("x", v, 0), (-1, -0.5), "expected a number >= 0."),
        (lambda v: check_number("x", v, 1, open_low=True), (1, 0), "expected a number > 1."),
        (lambda v: check_number("x", v, high=0, open_high=True), (0, 1), "expected a number < 0."),
        (lambda v: check_number("x", v, -1, 1, open_low=True), (-1, 1.5), "expected a number in (-1, 1]."),
        (
            lambda v: check_number("x", v, 2, integer=True, optional=True),
            (1, 2.0),
            "expected an integer >= 2, or None.",
        ),
        (lambda v: check_number("x", v, 2, 8, integer=True), (1, 9), "expected an integer in [2, 8]."),
        (lambda v: check_ratio("x", v), (0, 1.2, True), "expected a number in (0, 1]."),
        (lambda v: check_count("x", v), (-1, 1.0, False), "expected an integer >= 0."),
        (lambda v: check_count("x", v, 1), (0,), "expected an integer >= 1."),
        (lambda v: check_choice("x", v, ("a", None)), ("b",), "expected one of a, None."),
        (lambda v: check_flag("x", v), (0, None, "true"), "expected true or false."),
        (lambda v: check_indices("x", v), (3, "12", {1: 2}), "expected a list of block indices."),
    ],
)
def test_a_bad_value_is_named_with_its_range(check, bad, message):
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"x is {value!r}; {message}")):
            check(value)


def test_good_values_pass_and_indices_come_sorted():
    for value in (0, 1, 0.5):
        check_number("x", value, 0, 1)
    check_number("x", None, 1, integer=True, optional=True)
    assert check_indices("x", [3, 1]) == (1, 3) and check_indices("x", [3, 1, 3], repeats=True) == (3, 1, 3)
    assert check_indices("x", range(2)) == (0, 1) and check_indices("x", ()) == ()
    for values, message in (
        ([1, -2], "holds -2"),
        ([True], "holds True"),
        (["1"], "holds '1'"),
        ([2, 2], "each index once"),
    ):
        with pytest.raises(ValueError, match=message):
            check_indices("x", values)
    with pytest.raises(ValueError, match="x is empty"):
        check_indices("x", [], empty=False)
