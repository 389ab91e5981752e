"""Exit criteria equal their formulas, token by token and sample by sample, and see neither padding nor neighbours."""

import math

import pytest
import torch
from torch import nn

from mmskip.exits import criteria as exits
from mmskip.exits.heads import TiedHead
from mmskip.exits.voids import lac_voids

torch.manual_seed(0)
AFTER, BEFORE, LOGITS = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 11) * 3


@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("t", [0, 2])
def test_token_scores_equal_their_formulas(b: int, t: int) -> None:
    a, x, p = AFTER[b, t].tolist(), BEFORE[b, t].tolist(), [math.exp(v) for v in LOGITS[b, t].tolist()]
    p = [v / sum(p) for v in p]
    cosine = sum(i * j for i, j in zip(a, x, strict=True)) / (math.hypot(*a) * math.hypot(*x))
    first, second = sorted(p)[-1], sorted(p)[-2]
    certain = 1 + sum(v * math.log(v) for v in p) / math.log(11)
    head = TiedHead(None, nn.Identity())
    for criterion, expected in (
        ("saturation", cosine),
        ("confidence", first),
        ("margin", first - second),
        ("entropy", certain),
    ):
        after = LOGITS if criterion in exits.HEAD_CRITERIA else AFTER
        score = exits.TokenScores(criterion, head)(after, BEFORE)[b, t]
        assert score == pytest.approx(expected, abs=1e-5), criterion


def test_patience_counts_agreeing_heads_in_a_row() -> None:
    scores = exits.TokenScores("patience", lambda x: x)
    said = [[0, 1], [0, 2], [0, 2], [1, 2]]
    found = [scores(nn.functional.one_hot(torch.tensor([row]), 3).float(), BEFORE).tolist()[0] for row in said]
    assert found == [[0, 0], [1, 0], [2, 1], [0, 2]]


def test_state_norm_is_lacs_rule() -> None:
    norms = [1.0, 3.0, 4.0, 4.5, 3.0]
    scores = exits.TokenScores("state_norm")
    found = [scores(torch.full((1, 1, 1), b), torch.full((1, 1, 1), a)).item() for a, b in zip(norms, norms[1:])]  # noqa: B905, RUF007
    assert found[:2] == [-math.inf, -math.inf]
    assert found[2:] == pytest.approx([1 - 0.5 / (2 - 1), 1 + 1.5 / (2 - 0.5)])
    assert [score > 0.2 for score in found[2:]] == [0.5 < 0.8 * 1.0, True]


def test_a_norm_that_shrinks_at_the_second_layer_is_a_void() -> None:
    """By hand: growths 2, -1, 1; thresholds -, 0.8 * (2 - 2) = 0, 0.8 * (2 - -1) = 2.4."""
    scores, found, seen = exits.TokenScores("state_norm"), [], None
    for before, after in ((1.0, 3.0), (3.0, 2.0), (2.0, 3.0)):
        score = scores(torch.full((1, 1, 1), after), torch.full((1, 1, 1), before))
        void, seen = lac_voids(torch.full((1, 1), after - before), seen)
        assert bool(score > 0.2) == bool(void)
        found.append(score.item())
    assert found == [-math.inf, math.inf, pytest.approx(1 - 1 / 3)]


def test_state_norm_above_one_minus_alpha_is_a_void_of_lac() -> None:
    scores, seen = exits.TokenScores("state_norm"), None
    states = torch.randn(9, 4, 50, 3)
    for before, after in zip(states, states[1:]):  # noqa: B905, RUF007
        void, seen = lac_voids(after.norm(dim=-1) - before.norm(dim=-1), seen, alpha=0.75)
        assert torch.equal(scores(after, before) > 0.25, void)


@pytest.mark.parametrize("criterion", exits.STATE_CRITERIA)
def test_samples_score_as_alone_and_without_padding(criterion: str) -> None:
    lengths, states = (2, 3), [torch.randn(2, 3, 8) for _ in range(4)]
    real = torch.arange(3)[None] < torch.tensor(lengths)[:, None]
    batched = exits.SampleScores(criterion, real)
    rows = [batched(after, before) for before, after in zip(states, states[1:])]  # noqa: B905, RUF007
    for b, length in enumerate(lengths):
        alone = exits.SampleScores(criterion, None)
        for row, before, after in zip(rows, states, states[1:]):  # noqa: B905
            expected = alone(after[b : b + 1, :length], before[b : b + 1, :length])
            torch.testing.assert_close(row[b : b + 1], expected)


def test_an_unchanged_state_is_saturated_and_never_above_the_largest_threshold() -> None:
    x = torch.randn(64, 3, 33, dtype=torch.bfloat16)
    score = exits.saturation(x, x)
    assert score.min() > 0.999 and not (score > 1).any()


def test_calms_threshold_falls_from_strict_to_the_constant_part() -> None:
    at = exits.decayed(0.9, 0.8, 4.0, 10, torch.tensor([0, 5, 1000]))
    assert at.tolist() == pytest.approx([0.8 * 0.9 + 0.2, 0.8 * 0.9 + 0.2 * math.exp(-2), 0.72])


def test_own_heads_classify_and_score() -> None:
    head = exits.ExitHead(8, 5)
    expected = nn.functional.layer_norm(AFTER, (8,)) @ head.weight.T
    torch.testing.assert_close(head(AFTER), expected)
    learned = exits.ExitHead(8, 1)
    assert learned.score(AFTER).shape == (2, 3) and ((learned.score(AFTER) > 0) & (learned.score(AFTER) < 1)).all()


@pytest.mark.parametrize(
    ("criterion", "value", "match"),
    [
        ("saturation", 1.1, r"\[-1, 1\]"),
        ("confidence", -0.1, r"\[0, 1\]"),
        ("patience", -1, r"\[0, inf\]"),
        ("entropy", "x", "'x'"),
    ],
)
def test_thresholds_out_of_range_are_refused(criterion: str, value: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        exits.check_threshold("decoder", criterion, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no head"):
        exits.TokenScores("margin")
