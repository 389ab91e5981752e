"""Settings of version 0.1 are those of today, in Python, in saved dictionaries and in YAML, with one warning."""

import json
import warnings
from typing import Any

import pytest
from jsonargparse import ArgumentParser, set_parsing_settings

import mmskip
from mmskip import EarlyExitConfig, MethodConfig
from mmskip.config import read_old_spellings
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.registry import config_types

DEFAULTS = {
    "decoder": 0.99, "encoder": None, "criterion": "saturation", "encoder_criterion": "saturation", "kv": "project",
    "min_layers": 1, "encoder_min_layers": 1, "points": None, "encoder_points": None, "decay": None,
    "decay_speed": 1.0, "decay_steps": 16, "compact": "auto", "compact_overhead": 0.25, "image": None, "text": None,
    "depth": None, "encoder_depth": None, "once": False, "max_layers": None, "encoder_max_layers": None,
}  # fmt: skip
"""What `to_dict` of version 0.1 wrote for the default."""
TWICE = ExitAt(0.9, "learned", exit_layers=(1, 2))
CASES: list[tuple[dict[str, Any], EarlyExitConfig]] = [
    ({"criterion": "entropy"}, EarlyExitConfig(ExitAt(0.99, "entropy"))),
    (
        {"encoder": 0.95, "decoder": 0.9, "criterion": "entropy", "points": [2, 1], "kv": "copy"},
        EarlyExitConfig(ExitAt(0.9, "entropy", exit_layers=(1, 2)), 0.95, cache_policy="copy"),
    ),
    ({"kv": "hole"}, EarlyExitConfig(cache_policy="mask")),
    ({"kv": "project", "decoder": 0.5}, EarlyExitConfig(0.5, cache_policy="recompute")),
    ({"depth": 3}, EarlyExitConfig(FixedExit(3))),
    (
        {"depth": 3, "encoder_depth": 2, "compact": "never"},
        EarlyExitConfig(FixedExit(3), FixedExit(2), compact="never"),
    ),
    ({"decoder": None, "encoder_depth": 2}, EarlyExitConfig(None, FixedExit(2))),
    (
        {"once": True, "points": [2], "max_layers": 4},
        EarlyExitConfig(ExitAt(0.99, exit_layers=(2,), max_layers=4, decide_once=True)),
    ),
    (
        {"decay": 0.9, "decay_speed": 2.0, "decay_steps": 20, "min_layers": 2},
        EarlyExitConfig(ExitAt(0.99, min_layers=2, decay=0.9, decay_speed=2.0, decay_steps=20)),
    ),
    (
        {"decoder": None, "image": 0.9, "text": 0.9, "encoder_criterion": "learned", "encoder_points": [1, 2]},
        EarlyExitConfig(None, image=TWICE, text=TWICE),
    ),
    (
        {"encoder": 0.5, "encoder_min_layers": 2, "encoder_max_layers": 3},
        EarlyExitConfig(encoder=ExitAt(0.5, min_layers=2, max_layers=3)),
    ),
]
NAMES = [",".join(flat) for flat, _ in CASES]


@pytest.mark.parametrize(("flat", "expected"), CASES, ids=NAMES)
def test_old_settings_are_those_of_today(flat: dict[str, Any], expected: EarlyExitConfig) -> None:
    for make in (
        lambda: EarlyExitConfig(**flat),
        lambda: EarlyExitConfig.from_dict(flat),
        lambda: EarlyExitConfig.from_dict({**DEFAULTS, **flat}),
    ):
        with pytest.warns(FutureWarning, match="EarlyExitConfig: .* now spelt ") as caught:
            assert make() == expected
        assert len(caught) == 1
    single = {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
    with pytest.warns(FutureWarning, match="now spelt "):
        assert EarlyExitConfig.grid(**single) == [expected]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EarlyExitConfig.from_dict(json.loads(json.dumps(expected.to_dict()))) == expected


def test_the_warning_is_the_setting_to_write() -> None:
    with pytest.warns(FutureWarning) as caught:
        EarlyExitConfig(0.9, criterion="entropy", points=(1, 2))
    assert "decoder={'threshold': 0.9, 'criterion': 'entropy', 'exit_layers': [1, 2]}" in str(caught[0].message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 2, "decoder": 0.5}, "decoder is 0.5 and depth 2; choose one"),
        ({"encoder_depth": 2, "encoder": 0.5}, "encoder is 0.5 and encoder_depth 2; choose one"),
        ({"encoder_depth": 2, "image": 0.5, "text": 0.5}, "image is 0.5 and encoder_depth 2; choose one"),
        ({"depth": 0}, "decoder: layer is 0"),
        ({"encoder_criterion": "margin", "encoder": 0.5}, "encoder: criterion is 'margin'"),
        ({"kv": "drop"}, "cache_policy is 'drop'"),
        ({"kv": "compact"}, "cache_policy is 'skip'"),
        ({"min_layers": 0}, "decoder: min_layers is 0"),
        ({"points": ()}, "decoder: exit_layers is"),
        ({"decoder": 1.2, "criterion": "entropy"}, "decoder: threshold is 1.2"),
        ({"once": True, "decoder": None, "encoder": 0.9}, "once is True"),
        ({"once": True, "decay": 0.5}, "decoder: decide_once is True"),
        ({"max_layers": 1, "min_layers": 2}, "max_layers is 1; expected an integer >= min_layers"),
        ({"encoder_max_layers": 2}, "encoder_max_layers is 2, and nothing is decided below it"),
        ({"depth": 3, "max_layers": 2}, "max_layers is 2 and depth 3; choose one"),
        ({"criterion": "entropy", "decoder": ExitAt(0.5)}, "criterion stand beside decoder"),
    ],
)
def test_contradictions_are_refused_as_before(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyExitConfig(**settings)


class Holder:
    """Takes method configs, as the project's modules do."""

    def __init__(self, methods: list[MethodConfig]):
        self.methods = methods


def parsed(init_args: dict[str, Any]) -> Any:
    """The config that the command line's parser makes of a method's `init_args`."""
    set_parsing_settings(subclasses_enabled=list(config_types().values()))
    read_old_spellings(config_types())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "model")
    method = {"class_path": "mmskip.EarlyExitConfig", "init_args": init_args}
    settings = parser.parse_string(json.dumps({"model": {"methods": [method]}}))
    again = parser.parse_string(parser.dump(settings, skip_none=False))  # as Lightning saves it
    (config,) = parser.instantiate(settings).model.methods
    assert parser.instantiate(again).model.methods == [config]
    return config


@pytest.mark.parametrize(
    ("init_args", "expected"),
    [
        ({}, EarlyExitConfig()),
        ({"decoder": 0.9, "encoder": None}, EarlyExitConfig(0.9)),
        ({"decoder": 1}, EarlyExitConfig(1)),
        ({"decoder": {"layer": 3}, "cache_policy": "copy"}, EarlyExitConfig(FixedExit(3), cache_policy="copy")),
        (
            {"decoder": {"threshold": 0.9, "criterion": "entropy", "exit_layers": [1, 2]}},
            EarlyExitConfig(ExitAt(0.9, "entropy", exit_layers=(1, 2))),
        ),
        ({"decoder": None, "image": 0.9, "text": {"threshold": 0.8}}, EarlyExitConfig(None, image=0.9, text=0.8)),
    ],
    ids=str,
)
def test_yaml_gives_numbers_and_nested_settings(init_args: dict[str, Any], expected: EarlyExitConfig) -> None:
    assert parsed(init_args) == expected


@pytest.mark.parametrize(("flat", "expected"), CASES, ids=NAMES)
def test_old_yaml_is_read(flat: dict[str, Any], expected: EarlyExitConfig) -> None:
    for given in (flat, {**DEFAULTS, **flat}):
        with pytest.warns(FutureWarning, match="now spelt "):
            assert parsed(given) == expected


def test_grids_combine_exits() -> None:
    exits = [ExitAt(threshold, max_layers=3) for threshold in (1.0, 0.9)]
    found = EarlyExitConfig.grid(decoder=exits, encoder=[1.0, 0.8], cache_policy="copy")
    assert len(found) == 4 and {config.cache_policy for config in found} == {"copy"}
    assert found[0] == mmskip.EarlyExitConfig(exits[0], 1.0, cache_policy="copy")
