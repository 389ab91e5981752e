"""The snippets of docs/depth.md run."""

import re

import pytest
import torch
from locations import ROOT
from tiny_decoders import VOCAB, tiny_decoder

import mmskip

PAGE = (ROOT / "docs" / "depth.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    model = tiny_decoder("llama", num_hidden_layers=6)
    names = {"mmskip": mmskip, "model": model, "batches": [ids], "ids": ids, "mask": torch.ones_like(ids)}
    exec(snippet.replace("max_new_tokens=200", "max_new_tokens=40"), names)


def test_the_page_has_snippets_and_names_every_policy():
    assert len(SNIPPETS) == 6
    for name in (
        "LayerPlanConfig",
        "FFNSkipConfig",
        "LACConfig",
        "SelfSpeculationConfig",
        "LayerBitsConfig",
        "oracles",
        "deployable",
    ):
        assert name in PAGE
