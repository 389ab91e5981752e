"""Token groups and selection: per frame, fixed k, ties, padding; one library for every method."""

import ast

import pytest
import torch
from locations import ROOT

from mmskip.tokens.controls import random_scores, uniform_scores
from mmskip.tokens.groups import TEXT, token_groups
from mmskip.tokens.router import TokenRouter, gate_of
from mmskip.tokens.selection import select


def kept(scores, layout, keep, mask=None, **options):
    layout = torch.tensor(layout)
    groups = token_groups(layout, None if mask is None else torch.tensor(mask))
    return select(torch.tensor(scores, dtype=torch.float32), groups, keep, **options)


def test_top_k_of_each_frame_and_all_text_in_order():
    chosen = kept([[9, 1, 5, 3, 0, 2, 8, 7]], [[-1, 0, 0, 0, -1, 1, 1, 1]], 0.34)
    assert chosen.index_BS.tolist() == [[0, 2, 4, 6]] and chosen.valid_BS is None
    assert chosen.keep_BT.tolist() == [[True, False, True, False, True, False, True, False]]


def test_ties_go_to_the_lower_index():
    assert kept([[1.0] * 7], [[0] * 7], 0.43).index_BS.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("size", "keep", "k"), [(10, 0.2, 2), (1, 0.01, 1), (5, 0.5, 2), (7, 0.5, 4), (3, 1.0, 3)])
def test_k_is_the_rounded_share_and_at_least_one(size, keep, k):
    assert kept([list(range(size))], [[0] * size], keep).index_BS.shape[1] == k == max(1, round(keep * size))


def test_a_forced_last_token_counts_inside_k():
    assert kept([[5, 4, 3, 2]], [[0, 0, 0, 0]], 0.5, force_last=True).index_BS.tolist() == [[0, 3]]


def test_tokens_of_a_frame_need_not_be_adjacent():
    # newline tokens between the rows of an image are text
    chosen = kept([[1, 2, 0, 4, 3]], [[0, 0, -1, 0, 0]], 0.25)
    assert chosen.index_BS.tolist() == [[2, 3]]


def test_rows_with_different_counts_are_padded_behind():
    chosen = kept([[1, 2, 3, 4]] * 2, [[0, 0, 0, 0], [0, 0, -1, -1]], 0.5)
    assert chosen.index_BS.tolist() == [[2, 3, 3], [1, 2, 3]]
    assert chosen.valid_BS.tolist() == [[True, True, False], [True, True, True]]


def test_padding_is_left_out_and_never_selected():
    chosen = kept(
        [[9, 9, 1, 2, 3], [1, 2, 3, 4, 5]], [[0, 0, 0, 0, -1], [0, 0, 0, -1, -1]], 0.5, [[0, 0, 1, 1, 1], [1] * 5]
    )
    assert chosen.index_BS[0][chosen.valid_BS[0]].tolist() == [3, 4]


def test_uniform_keeps_evenly_spaced_tokens():
    groups = token_groups(torch.tensor([[0] * 10 + [1] * 5]))
    scores = uniform_scores(groups, 0.4)
    assert scores[0, :10].sum() == 4 and scores[0, 10:].sum() == 2
    places = scores[0, :10].nonzero().flatten()
    assert (places.diff() >= 2).all()


def test_random_scores_know_nothing_and_repeat_in_evaluation():
    groups = token_groups(torch.arange(50).repeat_interleave(10)[None])
    scores = random_scores(groups, seed=3, training=False)
    assert torch.equal(scores, random_scores(groups, seed=3, training=False))
    assert not torch.equal(scores, random_scores(groups, seed=4, training=False))
    first = scores.view(50, 10).argmax(1)
    assert torch.bincount(first, minlength=10).max() < 15, "a place in the frame is favoured"
    assert not torch.equal(random_scores(groups, 3, True), random_scores(groups, 3, True))


def test_gates():
    scores = torch.tensor([-2.0, 0.0, 3.0])
    assert torch.equal(gate_of(scores, "linear"), scores)
    assert torch.equal(gate_of(scores, "sigmoid"), scores.sigmoid())
    assert gate_of(torch.zeros(1), "tanh") == 1 and gate_of(scores, "tanh").max() < 1.2
    for hidden in (0, 3):
        router = TokenRouter(4, "tanh", hidden=hidden)
        assert (router.gate(torch.randn(5, 4)) == 1).all(), "the first step is not that of the model"


@pytest.mark.parametrize("hidden", [0, 4])
def test_scores_are_fp32_whatever_the_model(hidden):
    router = TokenRouter(8, "linear", dtype=torch.bfloat16, hidden=hidden)
    assert router(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert router(torch.randn(3, 8)).dtype == torch.float32


def test_empty_and_text_only_layouts():
    assert kept([[1, 2, 3]], [[TEXT] * 3], 0.2).index_BS.tolist() == [[0, 1, 2]]


def test_selection_and_merge_exist_once():
    root = ROOT / "mmskip"
    names = {"select", "select_tokens", "merge_tokens", "token_groups", "gate_of"}
    homes: dict[str, list[str]] = {}
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in names and node.col_offset == 0:
                homes.setdefault(node.name, []).append(path.name)
    assert homes == {
        "select": ["selection.py"],
        "token_groups": ["groups.py"],
        "gate_of": ["router.py"],
        "select_tokens": ["tokens.py"],
        "merge_tokens": ["tokens.py"],
    }
