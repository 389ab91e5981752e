"""Narrations become turns on the frame grid, turns become tokens, samples become batches."""

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.narration.tokenizer import StreamTokens, prepare_tokenizer, train_tokenizer
from mmskip.datasets.narration.turns import (
    Narration,
    Turn,
    build_sample,
    collate_narration,
    frame_index,
    plan_turns,
    split_turns,
)

TEXTS = ["the red circle hides", "a small blue square enters", "the star leaves"]


@pytest.fixture(scope="module")
def tokens():
    return StreamTokens.of(prepare_tokenizer(train_tokenizer(TEXTS)))


def narrations(*items):
    return [Narration(time, text) for time, text in items]


def make_sample(tokens, turns, frame_tokens=3, uid="clip", **kwargs):
    features = torch.arange(40.0).view(-1, 1, 1).expand(40, frame_tokens, 2)
    return build_sample(turns, features[kwargs.get("first_frame", 0) :], tokens, uid, **kwargs)


def test_times_round_up_to_the_grid():
    assert [frame_index(time, 2) for time in (0, 0.01, 0.5, 0.51, 1.0)] == [0, 1, 1, 2, 2]
    assert frame_index(0.1 + 0.2, 10) == 3, "0.30000000000000004 is frame 3, not 4"


def test_turns_follow_each_other_and_leave_out_the_first_frame():
    turns, dropped = plan_turns(narrations((1.2, TEXTS[0]), (2.0, TEXTS[1]), (4.9, TEXTS[2])), fps=2, num_frames=20)
    assert [turn.frames for turn in turns] == [(1, 4), (4, 5), (5, 11)]
    assert [turn.time_s for turn in turns] == [1.2, 2.0, 4.9]
    assert not dropped


def test_what_is_dropped_is_counted():
    turns, dropped = plan_turns(
        narrations(
            (0.0, "the first frame"),
            (9.0, "far past the end"),
            (1.1, "replaced by the later"),
            (1.2, "the later"),
            (1.6, "word"),
            (2.0, "the later"),
            (2.5, "something else"),
            (3.0, "the later"),
        ),
        fps=2,
        num_frames=8,
    )
    assert [(turn.frames, turn.narration) for turn in turns] == [
        ((1, 4), "the later"),
        ((4, 6), "something else"),
        ((6, 7), "the later"),
    ]
    assert dropped == {
        "on the first frame": 1,
        "past the end": 1,
        "same frame": 1,
        "too short": 1,
        "duplicate": 1,
    }


def test_a_narration_behind_the_last_frame_but_in_the_video_goes_to_the_last_frame():
    turns, dropped = plan_turns(narrations((3.7, TEXTS[0])), fps=2, num_frames=8)
    assert turns[0].frames == (1, 8) and not dropped


@pytest.mark.parametrize(("fps", "num_frames"), [(0, 5), (-1, 5), (2, 0)])
def test_impossible_grids_are_refused(fps, num_frames):
    with pytest.raises(ValueError, match="fps > 0 and num_frames >= 1"):
        plan_turns([], fps, num_frames)


def test_negative_times_are_refused():
    with pytest.raises(ValueError, match=">= 0 s"):
        plan_turns(narrations((-1, "too early")), 2, 5)


def test_sample_is_the_template_token_by_token(tokens):
    turns = [Turn((1, 3), TEXTS[0], 0.9), Turn((3, 4), TEXTS[2], 1.5)]
    sample = make_sample(tokens, turns)
    v = [tokens.vision] * 3
    first, second = tokens.narration(TEXTS[0]), tokens.narration(TEXTS[2])
    assert sample["input_ids"].tolist() == [
        *[tokens.bos, *tokens.open, *v, tokens.silent, *v, tokens.silent, *v, tokens.speak],
        *[*tokens.assistant, *first, *tokens.open, *v, tokens.speak, *tokens.assistant, *second],
    ]
    assert sample["layout"][sample["layout"] >= 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sample["features"][:, 0, 0].tolist() == [0, 1, 2, 3]


def test_labels_are_decisions_and_narrations_and_nothing_else(tokens):
    turns = [Turn((1, 3), TEXTS[0], 0.9), Turn((3, 4), TEXTS[2], 1.5)]
    sample = make_sample(tokens, turns, instruction=TEXTS[1])
    ids, labels, layout = sample["input_ids"], sample["labels"], sample["layout"]
    learned = labels != IGNORE
    assert torch.equal(labels[learned], ids[learned]) and not (learned & (layout >= 0)).any()
    stream = [index for span in sample["turns"] for index in span.stream]
    behind_vision = [index - 1 for index in learned.nonzero().flatten().tolist() if layout[index - 1] >= 0]
    assert behind_vision == stream, "every frame of a turn, and only those, has a decision to learn"
    assert ids[[index + 1 for index in stream]].tolist() == [tokens.silent, tokens.speak, tokens.speak]
    texts = [tokens.decode(labels[slice(*span.text)]) for span in sample["turns"]]
    assert texts == [span.narration for span in sample["turns"]] == [TEXTS[0], TEXTS[2]]
    assert all(ids[span.text[1] - 1] == tokens.eos for span in sample["turns"])
    assert int(learned.sum()) == len(stream) + sum(stop - start for start, stop in (s.text for s in sample["turns"]))
    assert tokens.decode(ids[1:5]) == TEXTS[1][: len("a small blue square")]


def test_a_later_part_of_a_video_opens_with_the_frame_before_it(tokens):
    turns = [Turn((7, 9), TEXTS[0], 4.0)]
    sample = make_sample(tokens, turns, first_frame=6)
    assert sample["features"][:, 0, 0].tolist() == [6, 7, 8]
    assert sample["turns"][0].frames == (1, 3)


def test_broken_turns_are_refused(tokens):
    with pytest.raises(ValueError, match="no turns"):
        make_sample(tokens, [])
    with pytest.raises(ValueError, match="must start at frame 3"):
        make_sample(tokens, [Turn((1, 3), "a b", 1), Turn((4, 5), "a b", 2)])
    with pytest.raises(ValueError, match=r"needs features \[F >= 51"):
        make_sample(tokens, [Turn((1, 51), "a b", 25)])


@pytest.fixture
def long_video():
    return [Turn((1 + 4 * i, 5 + 4 * i), TEXTS[i % 3], 2.0 + 2 * i) for i in range(6)]


@pytest.mark.parametrize("max_frames", [2, 4, 5, 9, 10, 24, 25, None])
def test_long_videos_are_cut_at_turn_borders(tokens, long_video, max_frames):
    samples, counts = split_turns(long_video, tokens, 3, max_frames=max_frames)
    for turns in samples:
        sample = make_sample(tokens, turns, first_frame=turns[0].frames[0] - 1)
        assert max_frames is None or len(sample["features"]) <= max_frames
    kept = [turn for turns in samples for turn in turns]
    assert [turn.narration for turn in kept] == [turn.narration for turn in long_video]
    assert [turn.frames[1] for turn in kept] == [turn.frames[1] for turn in long_video]
    shortened = 6 if max_frames in (2, 4) else 0
    assert counts["shortened"] == shortened and counts["split"] == len(samples) - 1
    if max_frames in (25, None):
        assert samples == [long_video]


@pytest.mark.parametrize("max_tokens", [22, 24, 30, 61, 100, 1000])
def test_samples_fit_the_token_limit(tokens, long_video, max_tokens):
    samples, _ = split_turns(long_video, tokens, 3, max_tokens=max_tokens, instruction=TEXTS[0])
    assert samples
    for turns in samples:
        first = turns[0].frames[0] - 1
        sample = make_sample(tokens, turns, first_frame=first, instruction=TEXTS[0])
        assert len(sample["input_ids"]) <= max_tokens


def test_a_text_that_never_fits_is_dropped_and_counted(tokens):
    turns = [Turn((1, 3), "the star leaves", 1), Turn((3, 5), "red " * 30, 2), Turn((5, 7), "the star leaves", 3)]
    samples, counts = split_turns(turns, tokens, 3, max_tokens=40)
    assert counts["text too long"] == 1
    assert [[turn.frames for turn in sample] for sample in samples] == [[(1, 3)], [(5, 7)]]


def test_limits_too_small_are_refused(tokens, long_video):
    with pytest.raises(ValueError, match="max_frames must be at least 2"):
        split_turns(long_video, tokens, 3, max_frames=1)
    with pytest.raises(ValueError, match="max_tokens=9 leaves no room"):
        split_turns(long_video, tokens, 3, max_tokens=9)


@pytest.fixture
def pair(tokens):
    return [
        make_sample(tokens, [Turn((1, 3), TEXTS[0], 0.9), Turn((3, 4), TEXTS[2], 1.5)], uid="long"),
        make_sample(tokens, [Turn((1, 2), TEXTS[1], 0.4)], uid="short"),
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_rows_are_the_samples(tokens, pair, side):
    batch = collate_narration(pair, tokens.pad, side)
    for row, sample in enumerate(pair):
        inside = batch["attention_mask"][row] == 1
        for key in ("input_ids", "labels", "layout"):
            assert torch.equal(batch[key][row][inside], sample[key])
        assert (batch["input_ids"][row][~inside] == tokens.pad).all()
        assert (batch["labels"][row][~inside] == IGNORE).all() and (batch["layout"][row][~inside] == -1).all()
        for span, own in zip(batch["turns"][row], sample["turns"], strict=True):
            assert tokens.decode(batch["labels"][row][slice(*span.text)]) == own.narration
            assert [batch["layout"][row][index].item() for index in span.stream] == list(range(*own.frames))
    assert inside[-1] == (side == "left")
    assert batch["uid"] == ["long", "short"]


def test_features_lie_in_the_order_of_the_vision_positions(tokens, pair):
    batch = collate_narration(pair, tokens.pad, "left")
    frames = batch["layout"][batch["layout"] >= 0]
    assert batch["features"].flatten(0, 1)[:, 0].tolist() == frames.tolist()


def test_lightning_can_move_a_batch(tokens, pair):
    batch = collate_narration(pair, tokens.pad)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved["features"].device.type == "meta" and moved["turns"] == batch["turns"]


def test_collate_refuses_nothing_and_unknown_sides(tokens, pair):
    with pytest.raises(ValueError, match="at least one sample"):
        collate_narration([], tokens.pad)
    with pytest.raises(ValueError, match="'right' or 'left', got 'up'"):
        collate_narration(pair, tokens.pad, "up")
