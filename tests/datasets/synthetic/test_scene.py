"""Worlds: narrations are true of the frames."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmskip.datasets.synthetic import render
from mmskip.datasets.synthetic.render import draw_world
from mmskip.datasets.synthetic.world import COLOURS, SHAPES, SceneConfig, plan_world

CONFIG = SceneConfig()


def worlds(count, config=CONFIG):
    return [plan_world(config, np.random.default_rng(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def many():
    return worlds(60)


def test_narrations_are_short_varied_and_of_few_words(many):
    texts = [narration.text for world in many for narration in world.narrations]
    assert {len(text.split()) for text in texts} <= set(range(4, 10))
    assert len({word for text in texts for word in text.split()}) < 80
    assert len(set(texts)) > 0.3 * len(texts), "no sentence can be guessed from being common"
    assert Counter(texts).most_common(1)[0][1] < 0.02 * len(texts)


def test_events_come_about_every_third_frame_at_unguessable_times(many):
    gaps = np.concatenate([np.diff([narration.tick for narration in world.narrations]) for world in many])
    assert gaps.min() >= 2 and 2.7 < gaps.mean() < 3.3
    assert max(Counter(gaps.tolist()).values()) < 0.5 * len(gaps)
    assert all(len({narration.tick for narration in world.narrations}) == len(world.narrations) for world in many)


def test_all_kinds_of_events_happen(many):
    events = Counter(narration.event for world in many for narration in world.narrations)
    assert set(events) == {"enter", "leave", "move", "hit", "hide", "out"}
    assert min(events.values()) > 0.03 * sum(events.values())


def test_stories_are_consistent(many):
    """Objects enter before they leave, hide before they come out, and bear one name at a time."""
    for world in many:
        hidden, left = set(), Counter()
        for narration in world.narrations:
            words = narration.text.split()
            kind = " ".join(words[2:4] if narration.event == "enter" else words[1:3])
            if narration.event == "enter":
                assert (words[0] == "another") == (left[kind] > 0)
            if narration.event == "out":
                hidden.remove(kind)
            else:
                assert kind not in hidden
            if narration.event == "hide":
                hidden.add(kind)
            left[kind] += narration.event == "leave"


def test_again_is_said_from_the_second_time_on():
    world = next(w for w in worlds(60) if any("again" in narration.text for narration in w.narrations))
    again = next(narration for narration in world.narrations if "again" in narration.text)
    name, event = " ".join(again.text.split()[1:3]), again.event
    before = [
        narration
        for narration in world.narrations
        if narration.tick < again.tick and narration.event == event and name in narration.text
    ]
    assert before, "the same object did the same before"


def test_a_scene_never_holds_too_many_objects_or_two_of_a_kind(many):
    for world in many:
        for tick in np.arange(CONFIG.ticks) + 0.5:  # on the tick itself one may have left and the next begin
            kinds = [thing.kind for thing in world.things if render._position(thing, tick) is not None]
            assert len(kinds) <= CONFIG.max_objects
            assert len(set(kinds)) == len(kinds)


def quiet(**changes):
    return replace(CONFIG, **({"noise": 0, "texture": 0, "tint": 0, "specks": 0, "jiggle": 0, "rest": 1} | changes))


def colour_mass(image, colour):
    return float((np.abs(image / 255 - np.array(COLOURS[colour])).max(axis=2) < 0.06).sum())


def test_narrations_match_the_frames():
    config = quiet(cue=0)
    for seed in range(8):
        world = plan_world(config, np.random.default_rng(seed))
        frames = np.stack(list(draw_world(world, 96, 1, np.random.default_rng(seed))))
        for narration in world.narrations:
            words = narration.text.split()
            colour = words[2] if narration.event == "enter" else words[1]
            before, at, after = (colour_mass(frames[narration.tick + step], colour) for step in (-1, 0, 1))
            if narration.event in ("enter", "out"):
                assert before < at, "it appears"
            elif narration.event in ("leave", "hide"):
                assert before > after, "it disappears"
            assert not np.array_equal(frames[narration.tick], frames[narration.tick - 1])


def test_nothing_moves_between_events():
    world = plan_world(quiet(), np.random.default_rng(0))
    frames = np.stack(list(draw_world(world, 96, 1, np.random.default_rng(0))))
    busy = {narration.tick + step for narration in world.narrations for step in (0, 1)}
    still = [tick for tick in range(1, CONFIG.ticks) if tick not in busy]
    assert still and all(np.array_equal(frames[tick], frames[tick - 1]) for tick in still)


def test_the_cue_shows_in_the_narrated_frame_only():
    plain = [
        draw_world(plan_world(quiet(cue=cue), np.random.default_rng(1)), 96, 1, np.random.default_rng(1))
        for cue in (0, 0.8)
    ]
    without, with_cue = (np.stack(list(frames)) for frames in plain)
    ticks = {narration.tick for narration in plan_world(quiet(), np.random.default_rng(1)).narrations}
    differing = {tick for tick in range(CONFIG.ticks) if not np.array_equal(without[tick], with_cue[tick])}
    assert differing == ticks


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_differ_and_are_small(shape):
    def mask(name):
        image = np.zeros((32, 32, 3), np.float32)
        render._paint(image, name, 16, 16, 0.32 * 32, (1.0, 0.0, 0.0))
        return image

    assert 0.08 < (mask(shape).max(axis=2) > 0.5).mean() < 0.4
    for other in SHAPES:
        if other != shape:
            assert np.abs(mask(shape) - mask(other)).sum() > 0.15 * mask(shape).sum()


def test_drawing_is_deterministic_and_sized():
    world = plan_world(CONFIG, np.random.default_rng(0))
    first, second = (list(draw_world(world, 64, 2, np.random.default_rng(5))) for _ in range(2))
    assert len(first) == 2 * CONFIG.ticks and first[0].shape == (64, 64, 3) and first[0].dtype == np.uint8
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_small_stages_work():
    assert all(
        world.narrations
        for world in worlds(20, SceneConfig(ticks=12, colours=2, shapes=2, max_objects=1, start_objects=0))
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"ticks": 2},
        {"cells": 2},
        {"colours": 7},
        {"shapes": 1},
        {"max_objects": 8},
        {"start_objects": 9},
        {"return_rate": 2},
        {"noise": -1},
        {"gaps": (0.5, 0.2)},
        {"weights": (1, 2)},
        {"weights": (0, 1, 1, 1, 1, 1)},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"SceneConfig.{next(iter(settings))}"):
        SceneConfig(**settings)
