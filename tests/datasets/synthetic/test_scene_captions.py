"""The embedded captions and pairs: true of their pictures, balanced, deterministic, complete on disk."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmskip.datasets.captioning.coco import read_captions
from mmskip.datasets.captioning.snli_ve import LABELS, read_pairs
from mmskip.datasets.common.pixels import to_input
from mmskip.datasets.synthetic.captions import (
    PLACES,
    RELATIONS,
    SceneCaptionsConfig,
    generate_captions,
    image_id,
    picture_of,
    walk,
)
from mmskip.datasets.synthetic.world import COLOURS, SHAPES

CONFIG = SceneCaptionsConfig(train=3, val=2, test=2, least=3, most=5)


def cell_of(place: str) -> tuple[int, int]:
    row = next(row for row in PLACES if place in row)
    return row.index(place), PLACES.index(row)


def things_of(caption: str) -> dict[tuple[int, int], tuple[str, str]]:
    """Colour and shape by cell, as a caption gives them."""
    return {cell_of(m[0]): m[1:] for m in re.findall(r"(\w+) a(?:nother)? (\w+) (\w+)", caption)}


def reached(way: str, things: dict[tuple[int, int], tuple[str, str]]) -> tuple[int, int]:
    """The cell that words lead to, parsed from the inside out."""
    if way.startswith("at "):
        return cell_of(way[3:])
    *steps, colour, shape = way.replace(" of", "_of").split()
    cell = next(cell for cell, kind in things.items() if kind == (colour, shape))
    for name in reversed(steps):
        x, y = RELATIONS[name.replace("_", " ")]
        cell = (cell[0] + x, cell[1] + y)
    return cell


def judged(text: str, caption: str, wall: tuple[int, int]) -> str:
    """The label of a statement, from the words alone."""
    labels = {claimed(claim, things_of(caption), wall) for claim in text.split(" and ")}
    return next(label for label in ("contradiction", "neutral", "entailment") if label in labels)


def claimed(text: str, things: dict[tuple[int, int], tuple[str, str]], wall: tuple[int, int]) -> str:
    word, way = text.split(" ", 1)
    cell = reached(way, things)
    if cell == wall:
        return "neutral"
    return "entailment" if word in things[cell] else "contradiction"


def test_captions_and_labels_are_true_of_the_world():
    labels, steps = Counter(), Counter()
    for index in range(120):
        picture, _ = picture_of(CONFIG, "train", index)
        shapes: list[str] = []
        for thing in walk(picture.world):
            article = "another" if thing.shape in shapes else "a"
            assert f"{PLACES[thing.cell[1]][thing.cell[0]]} {article} {thing.kind}" in picture.caption
            shapes.append(thing.shape)
        assert len(picture.caption.split()) == 4 * len(shapes)
        for statement in picture.statements:
            assert judged(statement.text, picture.caption, picture.world.wall) == statement.label, statement
            assert len(re.findall("left|right|above|below", statement.text.split(" at ")[0])) == statement.steps
            labels[statement.label] += 1
            steps[statement.steps] += 1
        for asked, answer in picture.questions:
            kind, place = asked.split(" ", 1)
            assert answer in ("wall", *(COLOURS if kind == "colour" else SHAPES))
            found = judged(f"{answer} {place}", picture.caption, picture.world.wall)
            assert found == ("neutral" if answer == "wall" else "entailment")
        assert not picture_of(CONFIG, "val", index)[0].questions
    assert max(labels.values()) < 1.3 * min(labels.values())
    assert min(steps[number] for number in range(3)) > 0.15 * sum(steps.values())


def test_statements_of_several_claims_are_decided_by_one():
    config = replace(CONFIG, pairs=6, least=2, steps=(0.7, 0.3), claims=(0.4, 0.3, 0.3))
    labels, counts = Counter(), Counter()
    for index in range(120):
        picture, _ = picture_of(config, "train", index)
        things = things_of(picture.caption)
        for statement in picture.statements:
            claims = statement.text.split(" and ")
            assert len(claims) == statement.claims <= len(things)
            found = Counter(claimed(claim, things, picture.world.wall) for claim in claims)
            assert found["entailment"] >= len(claims) - 1
            assert judged(statement.text, picture.caption, picture.world.wall) == statement.label
            assert len({reached(claim.split(" ", 1)[1], things) for claim in claims}) == len(claims)
            labels[statement.label] += 1
            counts[statement.claims] += 1
    assert max(labels.values()) < 1.3 * min(labels.values())
    assert min(counts[number] for number in (1, 2, 3)) > 0.15 * sum(counts.values())


def test_a_caption_goes_to_the_nearest_thing_that_is_left():
    for index in range(40):
        picture, _ = picture_of(CONFIG, "train", index)
        cells = [cell_of(place) for place in re.findall(r"(\w+) a(?:nother)? ", picture.caption)]
        assert cells[0] == min(cells, key=lambda cell: cell[::-1])
        for number in range(1, len(cells)):
            x, y = cells[number - 1]
            order = [((cell[0] - x) ** 2 + (cell[1] - y) ** 2, *cell[::-1]) for cell in cells[number:]]
            assert order[0] == min(order)


def test_the_set_is_whole_deterministic_and_taken_up(tmp_path):
    one, two = (generate_captions(tmp_path / name, CONFIG, progress=False) for name in ("one", "two"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)
    images, report = read_captions(one / "val" / "captions.json")
    assert [image.image_id for image in images] == [image_id("val", 0), image_id("val", 1)]
    assert not report.counts
    pairs, _ = read_pairs(one / "train" / "pairs.jsonl")
    assert len(pairs) == 3 * CONFIG.pairs
    assert {pair.label for pair in pairs} <= set(LABELS)
    (two / "test" / "captions.json").unlink()
    before = (two / "train" / "pairs.jsonl").stat().st_mtime_ns
    generate_captions(two, CONFIG, progress=False)
    assert (two / "test" / "captions.json").read_bytes() == (one / "test" / "captions.json").read_bytes()
    assert (two / "train" / "pairs.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other settings"):
        generate_captions(one, SceneCaptionsConfig(train=4), progress=False)


def test_splits_share_no_picture():
    shown = [picture_of(CONFIG, split, index)[0] for split in ("train", "val") for index in range(3)]
    assert len({picture.caption for picture in shown}) == len(shown)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": 0}, "SceneCaptionsConfig.train"),
        ({"steps": ()}, "SceneCaptionsConfig.steps"),
        ({"steps": (0.0, 0.0)}, "not all 0"),
        ({"claims": (0.5, -0.1)}, "SceneCaptionsConfig.claims"),
        ({"least": 5, "most": 4}, "SceneCaptionsConfig.most"),
        ({"colours": 2, "shapes": 2, "most": 6}, "more than there are kinds"),
    ],
)
def test_bad_settings_name_the_field(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SceneCaptionsConfig(**changed)


def test_objects_show_in_the_picture(tmp_path):
    root = generate_captions(tmp_path, CONFIG, progress=False)
    picture, _ = picture_of(CONFIG, "val", 0)
    from mmskip.datasets.captioning.coco import read_image

    image = to_input(read_image(root / "val" / "images" / f"{image_id('val', 0):07d}.png"), None, 48).numpy()
    cells = image.reshape(3, 3, 16, 3, 16)
    spread = {(x, y): float(np.std(cells[:, y, :, x], axis=(1, 2)).max()) for x in range(3) for y in range(3)}
    empty = [spread[cell] for cell in spread if cell not in {t.cell for t in picture.world.things}]
    empty.remove(spread[picture.world.wall])
    assert min(spread[thing.cell] for thing in picture.world.things) > max(empty)
