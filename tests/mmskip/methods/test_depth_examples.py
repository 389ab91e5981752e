"""The examples in the docstrings of depth methods run."""

import doctest

import pytest

from mmskip import FFNSkipConfig, LACConfig, LayerBitsConfig, LayerPlanConfig, SelfSpeculationConfig


@pytest.mark.parametrize("config", [FFNSkipConfig, LACConfig, LayerBitsConfig, LayerPlanConfig, SelfSpeculationConfig])
def test_the_example_of_a_config_runs(config):
    [example] = [test for test in doctest.DocTestFinder(recurse=False).find(config, config.__name__) if test.examples]
    example.globs[config.__name__] = config
    assert doctest.DocTestRunner().run(example).failed == 0
