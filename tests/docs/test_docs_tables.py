"""The generated tables of the pages are those of the registry, and say what the contract tests say."""

import dataclasses
import itertools
import re

import pytest
from doc_pages import PAGES, load, name_of
from locations import ROOT

import mmskip
from mmskip import families
from mmskip.exits import ExitAt, FixedExit
from mmskip.utils import moved

tables = load("docs/tables.py")
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("page", tables.pages())
def test_a_page_has_the_tables_of_the_registry(page):
    assert tables.written(page) == (ROOT / "docs" / page).read_text(encoding="utf-8"), "python docs/tables.py --write"


def test_every_method_of_the_registry_is_shown_with_its_paper():
    shown = tables.families_table()
    for method in tables.methods():
        assert f"`{method.config.__name__}`" in shown
        assert method.config.ASPECTS, method.name
        page = ROOT / "docs" / method.page
        if not page.is_file():  # the site makes one of the module's text
            assert f"::: {method.config.__module__}.{method.config.__name__}" in tables.generated_page(method)
            continue
        assert method.papers or method.name == "layer_mask"
        titles = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.M)
        assert titles == ["Example", "Settings", "Cost", "Limits and refusals"], page
        assert f"::: {method.config.__module__}.{method.config.__name__}\n" in page.read_text(encoding="utf-8")


def test_the_table_of_compositions_is_that_of_the_contract():
    contract = load("tests/contract/test_composition.py")
    by_config = {method.config: method for method in tables.methods()}
    found = set()
    for configs, composes in ((contract.DECODER, contract.DECODER_COMPOSES), (contract.UNET, contract.UNET_COMPOSES)):
        for pair in itertools.combinations(configs, 2):
            first, second = (by_config[type(configs[name])] for name in pair)
            said = tables.composed(first, second)
            found.add(said)
            if frozenset(pair) in composes:
                assert said in ("yes", "elsewhere"), pair
            else:
                assert said in ("no", "elsewhere"), pair
    assert found == {"yes", "no", "elsewhere"}


def test_every_area_and_every_recipe_has_a_row():
    page = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
    areas = [path for path in (ROOT / "models").iterdir() if path.name not in ("common", "__pycache__")]
    for name in (*(f"`models/{area.name}`" for area in areas), *(f"`{path.name}`" for path in CONFIGS.rglob("*.yaml"))):
        assert f"{name} |" in page or f"{name} ([guide]" in page, name


def test_the_public_functions_stand_in_the_reference():
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    named = set(re.findall(r"^::: mmskip\.[\w.]*?(\w+)$", reference, re.M))
    deprecated = {"generate", "skip_norms"}
    assert {name for name in mmskip.__all__ if not name.endswith("Config")} - deprecated <= named


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "migration.md"], ids=name_of)
def test_a_page_uses_the_names_of_today(page):
    text = page.read_text(encoding="utf-8")
    old = [f"mmskip.{path}" for path in moved.MOVED] + [name for name in families.ALIASES if "_" in name]
    old += ["SkipPolicyConfig", "python -m mmskip.search", "mmskip.generate", "skip_norms("]
    today = {field.name for kind in (ExitAt, FixedExit) for field in dataclasses.fields(kind)}
    for method in tables.methods():
        today |= {field.name for field in dataclasses.fields(method.config)}
    for method in tables.methods():
        names, _, _, retired = getattr(method.config, "_renamed", ({}, {}, None, ()))
        old += [f"{name}=" for name in (*names, *retired) if name not in today]
    found = [name for name in old if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w])", text)]
    assert not found, f"{name_of(page)} uses {found}; see docs/migration.md"
