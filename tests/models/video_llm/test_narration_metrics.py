"""The narration metrics against values computed by hand."""

import math

import pytest

from mmskip.models.video_llm.metrics import (
    NarrationMetrics,
    TurnScore,
    appended_frames,
    averages,
    correct_prefix,
    frame_diff,
)
from mmskip.train.metrics.majority import MajorityBaseline, majority_accuracy


@pytest.mark.parametrize(
    ("speaks", "later", "expected"),
    [
        ([False, False, False, True], [], 0),  # at the right frame
        ([False, True, False, True], [], 2),  # two frames early; what comes after does not count
        ([True], [], 0),
        ([False, False], [False, True], -2),  # late, at the second further frame
        ([False, False, False], [True, False], -1),
        ([False, False, False], [False, False], -2),  # never, as far as it was shown more
        ([False, False], [], 0),  # silent in the last turn: the end of the stream is its cue
    ],
)
def test_frame_diff(speaks, later, expected):
    assert frame_diff(speaks, later) == expected


def test_a_turn_is_extended_no_further_than_the_next_narration_nor_than_its_own_length():
    assert appended_frames(turn_frames=5, next_frames=2) == 2
    assert appended_frames(turn_frames=3, next_frames=9) == 2
    assert appended_frames(turn_frames=1, next_frames=9) == 0


def test_correct_prefix_stops_at_the_first_wrong_token():
    assert correct_prefix([True, True, False, True]) == 2
    assert correct_prefix([True, True]) == 2
    assert correct_prefix([]) == 0


@pytest.mark.parametrize(
    ("diff", "expected"),
    [(0, (4 + 3) / 9), (3, (4 - 3) / 9), (-1, (4 - 1) / 9), (-4, (4 - 1) / 9)],
)
def test_fluency(diff, expected):
    assert TurnScore(1.0, correct=3, text_tokens=5, stream_tokens=4, frame_diff=diff).fluency == pytest.approx(expected)


ON_TIME = TurnScore(nll=4 * math.log(3), correct=2, text_tokens=4, stream_tokens=2, frame_diff=0)
EARLY = TurnScore(nll=0.0, correct=2, text_tokens=2, stream_tokens=6, frame_diff=3)
LATE = TurnScore(nll=2 * math.log(5), correct=0, text_tokens=2, stream_tokens=4, frame_diff=-2)


def test_metrics_average_turns_before_samples():
    metrics = NarrationMetrics()
    metrics.update("a", [ON_TIME, EARLY])
    metrics.update("b", [LATE])
    values = metrics.compute(fps=2.0)
    assert values["lm_ppl"] == pytest.approx(((3 + 1) / 2 + 5) / 2)
    assert values["lm_correctness"] == pytest.approx(((0.5 + 1) / 2 + 0) / 2)
    assert values["time_diff"] == pytest.approx(((0 + 1.5) / 2 + 1.0) / 2)
    assert values["fluency"] == pytest.approx((((2 + 2) / 6 + (6 - 3) / 8) / 2 + 3 / 6) / 2)
    assert (values["samples"], values["turns"]) == (2, 3)


def test_a_turn_without_text_counts_for_its_timing_only():
    silent = TurnScore(nll=0.0, correct=0, text_tokens=0, stream_tokens=4, frame_diff=-3)
    both = averages([[ON_TIME, silent]], fps=1.0)
    alone = averages([[ON_TIME]], fps=1.0)
    for key in ("lm_ppl", "lm_correctness", "fluency"):
        assert both[key] == alone[key]
    assert both["time_diff"] == pytest.approx(1.5)
    assert math.isnan(averages([[silent]], fps=1.0)["lm_ppl"])


def test_a_sample_repeated_by_a_distributed_sampler_counts_once():
    metrics = NarrationMetrics()
    for sample, turns in (("a", [ON_TIME]), ("b", [LATE]), ("a", [ON_TIME])):
        metrics.update(sample, turns)
    metrics.update("text only", [])
    assert metrics.compute(1.0) == averages([[ON_TIME], [LATE]], 1.0)
    metrics.reset()
    assert metrics.compute(1.0)["samples"] == 0


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow():
    assert averages([[TurnScore(5000.0, 0, 2, 1, 0)]], 1.0)["lm_ppl"] == math.inf


def test_majority_baseline_by_hand():
    baseline = MajorityBaseline(vocab_size=10)
    for frames, tokens in ((3, [7, 8, 1]), (3, [7, 9, 1]), (2, [7, 8, 1])):
        baseline.fit(frames, tokens)
    restored = MajorityBaseline(vocab_size=10)
    restored.load_state_dict(baseline.state_dict())
    first, second, third = restored.score([(5, [7, 8, 1]), (2, [7, 9, 1, 4]), (1, [3])])
    assert first.nll == pytest.approx(-math.log(4 / 13) - math.log(3 / 13) - math.log(4 / 13))
    assert (first.correct, first.frame_diff) == (3, 2)  # it speaks at the third of five frames
    assert (second.correct, second.frame_diff) == (1, -1)  # one frame later than it should
    assert second.nll == pytest.approx(-math.log(4 / 13 * 2 / 13 * 4 / 13 * 1 / 10))
    assert (third.correct, third.frame_diff) == (0, 0)  # the end of the stream is its cue


def test_majority_accuracy_by_hand():
    train = [("who", "ann"), ("who", "ann"), ("who", "bob"), ("what", "tea")]
    asked = [("who", "ann"), ("who", "bob"), ("what", "tea"), ("why", "ann")]
    assert majority_accuracy(train, asked) == 0.5 and majority_accuracy(train, []) == 0


def test_majority_baseline_needs_training_turns():
    with pytest.raises(ValueError, match="fit first"):
        MajorityBaseline(10).score([(1, [2])])
