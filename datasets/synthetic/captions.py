"""The embedded set of captions and entailment pairs: pictures of the generated scenes, made on first use.

Captions name the objects with their places, each time the nearest one that is left; a shape that was named before is
"another" one. A pair claims a colour or a shape for the thing at a place, which is named directly ("red at northwest")
or by way of one or two other things ("blue below right of red ring": below the thing that is right of the red ring), or
several of these ("red at northwest and bar at south"): the numbers of steps and of claims are the difficulty of a
sample. It is true where all claims are, false where one is. A thing that would be where the wall is cannot be seen, so
that the label is "neutral". Labels are balanced whatever the words, so neither task can be done without the picture.
Training pictures have questions of the same form as well ("colour below right of red ring"), from which a small model
learns sooner where to look.

The files have the formats of COCO and SNLI-VE:

    manifest.json           the settings, written first
    <split>/images/<id>.png
    <split>/pairs.jsonl
    train/questions.jsonl   image, question, answer
    <split>/captions.json   written last: it marks a finished split

Shapes: S side of a picture in pixels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mmskip.datasets.common.labels import ENTAILMENT
from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.synthetic.render import draw_world
from mmskip.datasets.synthetic.world import COLOURS, SHAPES, SIDES, SIZES, Cell, SceneConfig, Thing, World
from mmskip.utils.files import write_json, write_text

PLACES = (("northwest", "north", "northeast"), ("west", "centre", "east"), ("southwest", "south", "southeast"))
"""Words for the cells, row by row."""
RELATIONS = {"left of": SIDES["left"], "right of": SIDES["right"], "above": SIDES["top"], "below": SIDES["bottom"]}
_FORMAT = 5  # raised when the same settings give other files


@dataclass(frozen=True)
class SceneCaptionsConfig:
    """Settings of the embedded set.

    Attributes:
        train, val, test: pictures per split, >= 1; each has one caption.
        pairs: entailment pairs per picture, >= 0.
        questions: questions per training picture, >= 0.
        steps: how often a claim or a question has 0, 1, 2, ... steps between the thing that is named and the one asked
            about, where the picture allows it; 1 to 4 weights.
        claims: how often a pair makes 1, 2, ... claims, where the picture has so many things; 1 to 4 weights.
        seed: of all random numbers, >= 0.
        image_size: S, >= 24.
        colours, shapes: how many of each exist, 2..6 and 2..7.
        least, most: objects on a picture, 1..8 each.
    """

    train: int = 6000
    val: int = 400
    test: int = 800
    pairs: int = 4
    questions: int = 4
    steps: tuple[float, ...] = (0.35, 0.35, 0.3)
    claims: tuple[float, ...] = (1.0,)
    seed: int = 0
    image_size: int = 48
    colours: int = 4
    shapes: int = 4
    least: int = 2
    most: int = 4

    def __post_init__(self) -> None:
        limits = dict.fromkeys(SPLITS, (1, 10**6)) | {
            "pairs": (0, 100),
            "questions": (0, 100),
            "seed": (0, 2**32),
            "image_size": (24, 960),
            "colours": (2, len(COLOURS)),
            "shapes": (2, len(SHAPES)),
            "least": (1, 8),
            "most": (self.least, 8),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"SceneCaptionsConfig.{name} must be in {low}..{high}, got {getattr(self, name)}")
        for name in ("steps", "claims"):
            weights = getattr(self, name)
            if not 1 <= len(weights) <= 4 or min(weights) < 0 or not sum(weights) > 0:
                raise ValueError(f"SceneCaptionsConfig.{name} must be 1 to 4 weights >= 0, not all 0, got {weights}")
        if self.most > self.colours * self.shapes:
            raise ValueError(f"SceneCaptionsConfig.most={self.most} is more than there are kinds of objects")

    @property
    def id(self) -> str:
        """Ten characters that name these settings, for folders."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:10]


@dataclass(frozen=True)
class Statement:
    """A sentence about a picture.

    Attributes:
        text: the hypothesis.
        label: one of `mmskip.datasets.captioning.snli_ve.ENTAILMENT`.
        steps: from the thing that is named to the one asked about, the most of its claims.
        claims: how many things it says.
    """

    text: str
    label: str
    steps: int
    claims: int


@dataclass(frozen=True)
class Picture:
    """One picture of the set: its world, caption, statements about it, and questions with answers."""

    world: World
    caption: str
    statements: tuple[Statement, ...]
    questions: tuple[tuple[str, str], ...]


def picture_of(config: SceneCaptionsConfig, split: str, index: int) -> tuple[Picture, np.random.Generator]:
    """Picture `index` of a split, and the random numbers of its looks. The same settings give the same."""
    seeds = np.random.SeedSequence([config.seed, SPLITS.index(split), index]).spawn(2)
    plan, looks = (np.random.default_rng(seed) for seed in seeds)
    world = _world(config, plan)
    statements = tuple(_statement(config, world, plan) for _ in range(config.pairs))
    questions = tuple(_question(config, world, plan) for _ in range(config.questions if split == "train" else 0))
    return Picture(world, _caption(world), statements, questions), looks


def image_id(split: str, index: int) -> int:
    """COCO's number of a picture, unique over the splits."""
    return SPLITS.index(split) * 10**6 + index


def _world(config: SceneCaptionsConfig, rng: np.random.Generator) -> World:
    """A wall and objects of different kinds in different cells."""
    cells = [(int(n) % 3, int(n) // 3) for n in rng.permutation(9)]
    count = int(rng.integers(config.least, config.most + 1))
    kinds = rng.permutation(config.colours * config.shapes)[:count]
    things = []
    for kind, cell in zip(kinds.tolist(), cells[1:], strict=False):
        colour, shape = list(COLOURS)[kind % config.colours], SHAPES[kind // config.colours]
        thing = Thing(colour, shape, list(SIZES)[rng.integers(len(SIZES))], cell)
        thing.path[0] = cell
        things.append(thing)
    scene = SceneConfig(ticks=8, colours=config.colours, shapes=config.shapes, rest=1.0, texture=0.03, specks=0)
    return World(tuple(things), cells[0], (), scene)


def _place(cell: Cell) -> str:
    column, row = cell
    return PLACES[row][column]


def walk(world: World) -> list[Thing]:
    """The things in the order a caption names them: from the first in reading order, each time the nearest that was not
    named yet; of equally near ones the first in reading order."""
    left = sorted(world.things, key=lambda thing: thing.cell[::-1])
    order = [left.pop(0)]
    while left:
        x, y = order[-1].cell
        order.append(min(left, key=lambda thing: (thing.cell[0] - x) ** 2 + (thing.cell[1] - y) ** 2))
        left.remove(order[-1])
    return order


def _caption(world: World) -> str:
    said: set[str] = set()
    parts = []
    for thing in walk(world):
        parts.append(f"{_place(thing.cell)} {'another' if thing.shape in said else 'a'} {thing.kind}")
        said.add(thing.shape)
    return " ".join(parts)


# --- statements -----------------------------------------------------------------------------------------------------


def _chains(world: World, steps: int) -> list[tuple[str, Cell]]:
    """Descriptions of places by way of `steps` things, with the cell each leads to: that of an object or of the wall.
    All on the way but the last is an object; the way never goes back."""
    at = {thing.cell: thing for thing in world.things}
    if steps == 0:
        return [(f"at {_place(cell)}", cell) for cell in (*at, world.wall)]
    found = []
    for thing in world.things:
        ways: list[tuple[str, tuple[Cell, ...]]] = [(thing.kind, (thing.cell,))]
        for _ in range(steps):
            ways = [
                (f"{name} {text}", (*path, target))
                for text, path in ways
                if path[-1] in at
                for name, (x, y) in RELATIONS.items()
                if (target := (path[-1][0] + x, path[-1][1] + y)) not in path and target in (*at, world.wall)
            ]
        found += [(text, path[-1]) for text, path in ways]
    return found


def _draw(
    config: SceneCaptionsConfig, world: World, hidden: bool, rng: np.random.Generator, taken: Sequence[Cell] = ()
) -> tuple[str, Cell, int]:
    """Draw a description, the cell it leads to (the one behind the wall if `hidden`, never a taken one), and its
    number of steps."""
    weights = np.array(config.steps)
    for steps in [*rng.choice(len(weights), len(weights), p=weights / weights.sum()).tolist(), 0]:
        chains = [
            chain for chain in _chains(world, steps) if (chain[1] == world.wall) == hidden and chain[1] not in taken
        ]
        if chains:
            break
    text, cell = chains[rng.integers(len(chains))]
    return text, cell, steps


def _asked(config: SceneCaptionsConfig, world: World, cell: Cell, by_colour: bool) -> tuple[str | None, list[str]]:
    """Colour or shape of the thing in a cell (None: the wall is there), and all that there are."""
    known = list(COLOURS)[: config.colours] if by_colour else list(SHAPES[: config.shapes])
    thing = next((thing for thing in world.things if thing.cell == cell), None)
    return (None if thing is None else thing.colour if by_colour else thing.shape), known


def _statement(config: SceneCaptionsConfig, world: World, rng: np.random.Generator) -> Statement:
    """One statement: its label is drawn before its words. One claim decides it, the others are true."""
    label = ENTAILMENT[rng.integers(len(ENTAILMENT))]
    weights = np.array(config.claims)
    count = min(int(rng.choice(len(weights), p=weights / weights.sum())) + 1, len(world.things))
    said: list[tuple[str, int]] = []
    cells: list[Cell] = []
    for place in range(count):
        decides = place == 0
        text, cell, steps = _draw(config, world, decides and label == "neutral", rng, cells)
        true, known = _asked(config, world, cell, bool(rng.random() < 0.5))
        others = [word for word in known if word != true]
        word = true if label == "entailment" or not decides else others[rng.integers(len(others))]
        said.append((f"{word} {text}", steps))
        cells.append(cell)
    texts = [said[place][0] for place in rng.permutation(count)]
    return Statement(" and ".join(texts), label, max(steps for _, steps in said), count)


def _question(config: SceneCaptionsConfig, world: World, rng: np.random.Generator) -> tuple[str, str]:
    """One question and its answer, one word; a fifth of them are about the wall."""
    text, cell, _ = _draw(config, world, rng.random() < 0.2, rng)
    by_colour = bool(rng.random() < 0.5)
    true, _ = _asked(config, world, cell, by_colour)
    return f"{'colour' if by_colour else 'shape'} {text}", true or "wall"


# --- files ----------------------------------------------------------------------------------------------------------


def generate_captions(root: str | Path, config: SceneCaptionsConfig | None = None, progress: bool = True) -> Path:
    """Write the set into a folder; finished splits are kept, so an interrupted run is taken up.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds a set of other settings.
    """
    root, config = Path(root), config or SceneCaptionsConfig()
    manifest = json.dumps({"format": _FORMAT, **asdict(config)}, indent=1)
    path = root / "manifest.json"
    if path.exists() and path.read_text() != manifest:
        raise ValueError(f"{root} holds a caption set of other settings; give another folder, or delete this one")
    write_text(manifest, path)
    for split in SPLITS:
        folder = root / split
        if (folder / "captions.json").exists():
            continue
        (folder / "images").mkdir(parents=True, exist_ok=True)
        count = getattr(config, split)
        bar = tqdm(range(count), desc=f"generating {split} pictures", unit="picture", disable=not progress)
        records = [_write_picture(folder / "images", config, split, index) for index in bar]
        _write_lines([pair for _, pairs, _ in records for pair in pairs], folder / "pairs.jsonl")
        if split == "train":
            _write_lines([asked for _, _, questions in records for asked in questions], folder / "questions.jsonl")
        entries = [entry for entry, _, _ in records]
        content = {
            "images": [{"id": entry["image_id"], "file_name": _file(entry["image_id"])} for entry in entries],
            "annotations": [{"id": entry["image_id"], **entry} for entry in entries],
        }
        write_json(content, folder / "captions.json", indent=None)
    return root


def _write_lines(records: list[dict[str, Any]], path: Path) -> None:
    write_text("".join(json.dumps(record) + "\n" for record in records), path)


def _file(number: int) -> str:
    return f"{number:07d}.png"


def _write_picture(
    folder: Path, config: SceneCaptionsConfig, split: str, index: int
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Write a picture; returns its annotation, its pairs and its questions."""
    picture, looks = picture_of(config, split, index)
    number = image_id(split, index)
    Image.fromarray(next(draw_world(picture.world, config.image_size, 1, looks))).save(folder / _file(number))
    pairs = [
        {
            "pairID": f"{number}#{place}",
            "Flickr30K_ID": _file(number),
            "sentence2": statement.text,
            "gold_label": statement.label,
            "steps": statement.steps,
            "claims": statement.claims,
        }
        for place, statement in enumerate(picture.statements)
    ]
    questions = [{"image": _file(number), "question": asked, "answer": answer} for asked, answer in picture.questions]
    return {"image_id": number, "caption": picture.caption}, pairs, questions


def scene_texts() -> Iterator[str]:
    """Texts that hold every word of the set."""
    yield from (*COLOURS, *SHAPES, *RELATIONS)
    yield from (place for row in PLACES for place in row)
    yield "a another and at colour of shape wall"
