"""What names the methods is held against the registry: exports, README, examples in docstrings.

The generated tables of the docs are held against it in `tests/docs/test_docs_tables.py`.
"""

import doctest
import importlib
from dataclasses import fields
from pathlib import Path

import pytest

import mmskip
from mmskip import registry

ROOT = Path(__file__).parents[2]
CONFIGS = {n: c for n, c in registry.config_types().items() if c.__module__.startswith("mmskip.")}
RETIRED = {"SkipPolicyConfig": "skip_policy"}
"""Names of version 0.1 that are kept for one release, with their modules."""
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def test_every_config_is_exported_and_everything_exported_exists():
    assert set(CONFIGS) <= set(mmskip.__all__) and mmskip.__all__ == sorted(mmskip.__all__)
    for name in mmskip.__all__:
        assert getattr(mmskip, name) is not None
    configs = {name for name in mmskip.__all__ if name.endswith("Config")}
    assert configs - {"MethodConfig", *RETIRED} == set(CONFIGS)


def test_no_exported_function_has_the_name_of_a_module():
    """Importing such a module would replace the function."""
    modules = {path.stem for path in (ROOT / "mmskip").glob("*.py")} | {
        path.name for path in (ROOT / "mmskip").iterdir() if (path / "__init__.py").is_file()
    }
    assert set(mmskip.__all__) & modules <= {"search"}, "mmskip.search: see mmskip/utils/moved.py"
    assert callable(mmskip.search)


def test_readme_names_every_method():
    text = (ROOT / "README.md").read_text() + "".join(path.read_text() for path in (ROOT / "docs").rglob("*.md"))
    assert [name for name in CONFIGS if name not in text] == []


@each
def test_every_field_is_documented(config):
    text = config.__doc__ or ""
    assert [f.name for f in fields(config) if f.name not in text] == []


@each
def test_the_example_of_a_config_runs(config):
    found = doctest.DocTestFinder(recurse=False).find(config, config.__name__)
    examples = [test for test in found if test.examples]
    assert examples, f"{config.__name__} has no example in its docstring"
    results = [doctest.DocTestRunner(verbose=False).run(test) for test in examples]
    assert sum(result.failed for result in results) == 0


def test_every_module_of_a_method_registers():
    for path in sorted((ROOT / "mmskip" / "methods").glob("[a-z]*.py")):
        if path.stem in RETIRED.values():
            continue
        module = importlib.import_module(f"mmskip.methods.{path.stem}")
        assert any(config.__module__ == module.__name__ for config in CONFIGS.values()), f"{path.name} has no method"
