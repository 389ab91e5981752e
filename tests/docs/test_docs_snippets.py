"""Every Python block of README and docs runs, with tiny models; blocks marked `parsed only` are parsed, and what they
use of mmskip exists."""

import ast
import importlib
import warnings

import doc_pages
import pytest
import torch
from doc_pages import FRESH, NAMES, PAGES, blocks, decoder_names, load, name_of

import mmskip

PYTHON = {name_of(page): blocks(page, "python") for page in PAGES}
PARSED = [block for found in PYTHON.values() for block in found if not block.run]


@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if any(block.run for block in found)])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in ("diffusers",) if NAMES.get(page) is doc_pages.unet_names or "skip_tuning" in page else ():
        pytest.importorskip(module)
    if "torchao" in (doc_pages.ROOT / page).read_text(encoding="utf-8"):
        pytest.importorskip("torchao")
    make = NAMES.get(page, decoder_names)
    names = {"mmskip": mmskip, "torch": torch, **make()}
    for block in PYTHON[page]:
        if not block.run:
            continue
        if page in FRESH:
            names = {"mmskip": mmskip, "torch": torch, **make()}
        code = compile("\n" * block.line + block.code, page, "exec")
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message=r".*(old (name|path|spelling)|is now called)", category=FutureWarning
            )
            exec(code, names)


@pytest.mark.parametrize("block", PARSED, ids=str)
def test_blocks_that_are_parsed_use_what_exists(block):
    ast.parse(block.code)
    for name in doc_pages.uses(block.code):
        module, _, attribute = name.rpartition(".")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:  # an attribute of an attribute
            module, _, owner = module.rpartition(".")
            found = getattr(importlib.import_module(module), owner)
        if not hasattr(found, attribute):
            importlib.import_module(name)


def test_the_pages_have_blocks():
    """So that a change of format does not leave the tests without any."""
    assert sum(map(len, PYTHON.values())) >= 30 and len(PARSED) <= 5
    for method in (doc_pages.ROOT / "docs" / "methods").glob("*.md"):
        assert method.name == "index.md" or any(block.run for block in PYTHON[name_of(method)]), method


def test_the_guide_of_language_models_names_every_policy():
    page = (doc_pages.ROOT / "docs" / "depth.md").read_text(encoding="utf-8")
    assert len(PYTHON["docs/depth.md"]) >= 6
    plans = {method.config.__name__ for method in load("docs/tables.py").methods() if "decoder" in method.families}
    tokens = {"MoDConfig", "TokenReductionConfig", "EarlyExitConfig"}
    for name in (*(plans - tokens), "oracles", "deployable"):
        assert name in page
