"""The generated tables of the pages are those of the registry, and say what the contract tests say."""

import itertools

import pytest
from doc_pages import load
from locations import ROOT

tables = load("docs/tables.py")
CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("page", tables.pages())
def test_a_page_has_the_tables_of_the_registry(page):
    assert tables.written(page) == (ROOT / "docs" / page).read_text(encoding="utf-8"), "python docs/tables.py --write"


def test_every_method_of_the_registry_is_shown_with_its_paper():
    shown = tables.families_table()
    for method in tables.methods():
        assert f"`{method.config.__name__}`" in shown
        assert method.papers or method.name == "layer_mask"
    assert set(tables.ASPECTS) == {method.config.__name__ for method in tables.methods()}


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
