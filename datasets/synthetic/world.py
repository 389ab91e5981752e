"""Little worlds of coloured objects: what happens, what is said about it, and how it looks.

A world is planned in ticks (one tick = one sampled frame), told by narrations, and drawn at the video's own rate.
Objects rest in the cells of a square stage. One event happens at a time, takes two ticks, and is narrated at the tick
in the middle, when it can just be told from the frames: an object enters, leaves, moves to a neighbouring cell, hits
a neighbour, hides behind the wall or comes out again. The acting object glows and leaves a streak in that half.

Shapes: S side of the frame in pixels; images are float32 [S, S, 3] in 0..1 until they are written.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

COLOURS = {
    "red": (0.92, 0.12, 0.12),
    "green": (0.1, 0.75, 0.2),
    "blue": (0.15, 0.3, 0.95),
    "yellow": (0.97, 0.87, 0.1),
    "purple": (0.65, 0.15, 0.85),
    "black": (0.03, 0.03, 0.03),
}
SHAPES = ("circle", "ring", "bar", "post", "triangle", "cross", "star")
SIZES = {"small": 0.22, "large": 0.36}  # half width, as a share of a cell
SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_KINDS = ("enter", "leave", "move", "hit", "hide", "out")

Cell = tuple[int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class SceneConfig:
    """Difficulty of the worlds.

    Attributes:
        ticks: length, sampled frames, >= 8.
        cells: cells per side of the stage, >= 3. Objects are smaller than a cell.
        colours, shapes: how many of each exist, 2..6 and 2..7; later shapes are harder to tell apart.
        start_objects: objects on the stage at the start (their entering is never told), 0..max_objects.
        max_objects: most objects at a time, hidden ones included, 1..cells * cells - 2.
        gaps: probability of 2, 3, 4, ... ticks from one event to the next.
        weights: how often each event is chosen where it is possible: enter, leave, move, hit, hide, out.
        return_rate: share of entering objects that are of a kind which was there and left ("another ...").
        cue: strength of the glow and streak of an object in the narrated half of its motion, 0 (events show only in
            the difference of frames) to 1 (they show in one frame).
        rest: opacity of objects that neither act nor are hit, 0..1; below 1 those of an event stand out.
        jiggle: largest random displacement of resting objects, pixels of a 96-pixel frame.
        noise: strength of the pixel noise, 0..1.
        texture: strength of the background texture, 0..1.
        tint: how much redder the floor gets to the right and bluer to the bottom, 0..0.5: a place shows in its colour.
        specks: drifting small dots that mean nothing.
    """

    ticks: int = 48
    cells: int = 3
    colours: int = 6
    shapes: int = 4
    start_objects: int = 2
    max_objects: int = 4
    gaps: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)
    weights: tuple[float, ...] = (2.0, 1.5, 1.0, 1.5, 1.5, 2.0)
    return_rate: float = 0.3
    cue: float = 0.8
    rest: float = 0.6
    jiggle: float = 1.0
    noise: float = 0.02
    texture: float = 0.05
    tint: float = 0.2
    specks: int = 6

    def __post_init__(self) -> None:
        limits = {
            "ticks": (8, 100_000),
            "cells": (3, 12),
            "colours": (2, len(COLOURS)),
            "shapes": (2, len(SHAPES)),
            "max_objects": (1, self.cells**2 - 2),
            "start_objects": (0, self.max_objects),
            "return_rate": (0, 1),
            "cue": (0, 1),
            "rest": (0, 1),
            "jiggle": (0, 8),
            "noise": (0, 1),
            "texture": (0, 1),
            "tint": (0, 0.5),
            "specks": (0, 1000),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"SceneConfig.{name} must be in {low}..{high}, got {getattr(self, name)}")
        if not self.gaps or min(self.gaps) < 0 or abs(sum(self.gaps) - 1) > 1e-6:
            raise ValueError(f"SceneConfig.gaps must be probabilities that sum to 1, got {self.gaps}")
        if len(self.weights) != len(_KINDS) or min(self.weights) < 0 or self.weights[0] == 0:
            raise ValueError(f"SceneConfig.weights needs 6 numbers >= 0, the first > 0 ({_KINDS}), got {self.weights}")


@dataclass(eq=False)
class Thing:
    """One object of a world.

    `path` holds its place at the ticks where its motion changes, in cells; `acts` the ticks at which it
    starts to act, `hits` those at which another starts to hit it.
    """

    colour: str
    shape: str
    size: str
    cell: Cell
    hidden: bool = False
    left: bool = False
    acts: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    path: dict[float, Point] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def kind(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def radius(self) -> float:
        """Half width in cells."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Told:
    """One narration of a world.

    Attributes:
        tick: the sampled frame at which it is first visible.
        text: the sentence.
        event: enter, leave, move, hit, hide or out.
        cells: the cells involved, (column, row).
    """

    tick: int
    text: str
    event: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class World:
    """A planned world: its objects with their paths, the wall's cell, and what is told."""

    things: tuple[Thing, ...]
    wall: Cell
    told: tuple[Told, ...]
    config: SceneConfig


@dataclass(frozen=True)
class _Event:
    kind: str
    thing: Thing
    way: Cell = (0, 0)
    other: Thing | None = None


class _Director:
    """Plans one world, event by event."""

    def __init__(self, config: SceneConfig, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.wall: Cell = (int(rng.integers(config.cells)), int(rng.integers(config.cells)))
        self.present: list[Thing] = []
        self.gone: list[Thing] = []
        self.things: list[Thing] = []
        self.told: list[Told] = []

    def plan(self) -> World:
        config = self.config
        for _ in range(config.start_objects):
            free = [cell for cell in self._cells() if self._free(cell)]
            thing = self._new(free[self.rng.integers(len(free))])
            self._add(thing)
            thing.path[0] = thing.cell
        tick = int(self.rng.integers(0, 2))
        while tick + 2 < config.ticks:
            event = self._choose()
            if event is not None:
                self._play(event, tick)
            tick += 2 + int(self.rng.choice(len(config.gaps), p=config.gaps))
        return World(tuple(self.things), self.wall, tuple(self.told), config)

    def _cells(self) -> list[Cell]:
        return [(x, y) for x in range(self.config.cells) for y in range(self.config.cells)]

    def _inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.config.cells and 0 <= cell[1] < self.config.cells

    def _doors(self, cell: Cell) -> list[Cell]:
        """The ways off the stage from a cell; a corner has only the one to its side."""
        ways = [way for way in SIDES.values() if not self._inside(_step(cell, way))]
        return ways[:1]

    def _at(self, cell: Cell) -> Thing | None:
        return next((thing for thing in self.present if thing.cell == cell and not thing.hidden), None)

    def _free(self, cell: Cell) -> bool:
        return self._inside(cell) and cell != self.wall and self._at(cell) is None

    def _new(self, cell: Cell) -> Thing:
        """An object of a kind that is not on the stage."""
        here = {thing.kind for thing in self.present}
        away = sorted({thing.kind for thing in self.gone} - here)
        if away and self.rng.random() < self.config.return_rate:
            colour, shape = away[self.rng.integers(len(away))].split()
        else:
            kinds = [
                (colour, shape)
                for colour in list(COLOURS)[: self.config.colours]
                for shape in SHAPES[: self.config.shapes]
                if f"{colour} {shape}" not in here
            ]
            colour, shape = kinds[self.rng.integers(len(kinds))]
        return Thing(colour, shape, list(SIZES)[self.rng.integers(len(SIZES))], cell)

    def _add(self, thing: Thing) -> None:
        self.present.append(thing)
        self.things.append(thing)

    def _options(self) -> dict[str, list[_Event]]:
        options: dict[str, list[_Event]] = {kind: [] for kind in _KINDS}
        if len(self.present) < self.config.max_objects:
            for cell in self._cells():
                for way in self._doors(cell):
                    if self._free(cell):
                        options["enter"].append(_Event("enter", Thing("", "", "", cell), way))
        for thing in self.present:
            for way in SIDES.values():
                target = _step(thing.cell, way)
                if thing.hidden:
                    if self._free(target):
                        options["out"].append(_Event("out", thing, way))
                elif not self._inside(target):
                    if way in self._doors(thing.cell):
                        options["leave"].append(_Event("leave", thing, way))
                elif target == self.wall:
                    options["hide"].append(_Event("hide", thing, way))
                elif (other := self._at(target)) is not None:
                    options["hit"].append(_Event("hit", thing, way, other))
                else:
                    options["move"].append(_Event("move", thing, way))
        return options

    def _choose(self) -> _Event | None:
        options = self._options()
        weights = np.array(
            [weight if options[kind] else 0 for kind, weight in zip(_KINDS, self.config.weights, strict=True)]
        )
        if not weights.sum():
            return None
        chosen = options[_KINDS[self.rng.choice(len(_KINDS), p=weights / weights.sum())]]
        event = chosen[self.rng.integers(len(chosen))]
        return replace(event, thing=self._new(event.thing.cell)) if event.kind == "enter" else event

    def _play(self, event: _Event, tick: int) -> None:
        """Move the objects from `tick` to `tick + 2` and tell it at `tick + 1`."""
        thing, cell = event.thing, event.thing.cell
        thing.acts.append(tick)
        target = _step(cell, event.way)
        cells: tuple[Cell, ...] = (cell,)
        if event.kind == "enter":
            self._add(thing)
            thing.path |= {
                tick: _along(cell, event.way, 1.0),
                tick + 1: _along(cell, event.way, 0.15),
                tick + 2: cell,
            }
        elif event.kind == "leave":
            thing.path |= {
                tick: cell,
                tick + 1: _along(cell, event.way, 0.45),
                tick + 2: _along(cell, event.way, 1.5),
            }
            thing.left = True
            self.present.remove(thing)
            self.gone.append(thing)
        elif event.kind == "hit":
            assert event.other is not None
            reach = 1 - thing.radius - event.other.radius
            thing.path |= {tick: cell, tick + 1: _along(cell, event.way, reach + 0.05), tick + 2: cell}
            pushed = _along(target, event.way, 0.15)
            event.other.hits.append(tick)
            event.other.path |= {tick + 0.5: target, tick + 1: pushed, tick + 2: target}
            cells = (cell, target)
        else:
            # Coming out is told while about half of the object is still behind the wall.
            half = {"move": 0.3, "hide": 0.45, "out": 0.45}[event.kind]
            thing.path |= {tick: cell, tick + 1: _along(cell, event.way, half), tick + 2: target}
            thing.cell, thing.hidden = target, event.kind == "hide"
            cells = (cell, target)
        self.told.append(Told(tick + 1, self._sentence(event), event.kind, cells))

    def _sentence(self, event: _Event) -> str:
        thing = event.thing
        if event.kind == "enter":
            article = "another" if thing.kind in {other.kind for other in self.gone} else "a"
            return f"{article} {thing.size} {thing.kind} enters from the {_name(SIDES, event.way)}"
        if event.kind == "leave":
            return f"the {thing.kind} leaves at the {_name(SIDES, event.way)}"
        text = {
            "move": f"moves {_name(DIRECTIONS, event.way)}",
            "hit": f"hits the {event.other.kind}" if event.other else "",
            "hide": "hides",
            "out": "comes out",
        }[event.kind]
        again = " again" if event.kind in thing.done else ""
        thing.done.add(event.kind)
        return f"the {thing.kind} {text}{again}"


def _step(cell: Cell, way: Cell) -> Cell:
    return (cell[0] + way[0], cell[1] + way[1])


def _along(cell: Cell, way: Cell, share: float) -> Point:
    return (cell[0] + way[0] * share, cell[1] + way[1] * share)


def _name(names: dict[str, Cell], way: Cell) -> str:
    return next(name for name, value in names.items() if value == way)


def plan_world(config: SceneConfig, rng: np.random.Generator) -> World:
    """Plan one world; the same generator state gives the same world."""
    return _Director(config, rng).plan()


def draw_world(world: World, size: int, per_tick: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Draw a world.

    Args:
        world: from `plan_world`.
        size: S, side of the frame, pixels.
        per_tick: frames per tick, >= 1.
        rng: for background, noise, specks and jiggle.

    Yields:
        uint8 [S, S, 3] frames, `config.ticks * per_tick` of them.
    """
    config = world.config
    cell = size / config.cells
    background = _texture(size, config, world.wall, rng)
    wall_mask = _wall_mask(size, cell, world.wall)
    offsets = rng.uniform(-0.05, 0.05, (len(world.things), 2)) * cell
    specks = rng.uniform(0, size, (config.specks, 2))
    drift = rng.normal(0, 0.01 * size, (config.specks, 2))
    greys = rng.uniform(0.2, 0.9, config.specks)
    jiggle = config.jiggle * size / 96
    for index in range(config.ticks * per_tick):
        image = background.copy()
        for place, grey in zip((specks + drift * index) % size, greys, strict=True):
            _paint(image, "circle", place[0], place[1], 0.012 * size, (grey, grey, grey))
        for thing, offset in zip(world.things, offsets, strict=True):
            place_now = _position(thing, index / per_tick)
            if place_now is not None:
                shift = offset + rng.uniform(-jiggle, jiggle, 2)
                x, y = (place_now[0] + 0.5) * cell + shift[0], (place_now[1] + 0.5) * cell + shift[1]
                now = index / per_tick
                acting = _told_half(thing.acts, now) is not None
                if acting:
                    _paint_cue(image, thing, now, (x, y), cell, config.cue)
                opacity = 1.0 if acting or _told_half(thing.hits, now) is not None else config.rest
                _paint(image, thing.shape, x, y, thing.radius * cell, COLOURS[thing.colour], opacity)
        image = np.where(wall_mask, background, image)
        image += rng.normal(0, config.noise, (size, size, 1)).astype(np.float32)
        yield (image.clip(0, 1) * 255).astype(np.uint8)


def _position(thing: Thing, tick: float) -> Point | None:
    """Where a thing is, in cells, by straight lines between the points of its path; None before it came or after."""
    times = list(thing.path)
    first, last = times[0], times[-1]
    if tick < first or (tick > last and thing.left):
        return None
    xs, ys = zip(*thing.path.values(), strict=True)
    return (float(np.interp(tick, times, xs)), float(np.interp(tick, times, ys)))


def _texture(size: int, config: SceneConfig, wall: Cell, rng: np.random.Generator) -> np.ndarray:
    """Smooth grey patches, and the wall's bricks."""
    coarse = rng.uniform(-1, 1, (7, 7, 1)).astype(np.float32)
    at = np.linspace(0, 5.999, size)
    low, share = at.astype(int), (at % 1)[:, None, None].astype(np.float32)
    rows = coarse[low] * (1 - share) + coarse[low + 1] * share
    share = share.reshape(1, size, 1)
    image = 0.4 + config.texture * (rows[:, low] * (1 - share) + rows[:, low + 1] * share)
    cell = size / config.cells
    y, x = np.mgrid[:size, :size]
    place = np.stack([x / size - 0.5, np.zeros((size, size)), y / size - 0.5], axis=2)
    image = image + config.tint * place.astype(np.float32)
    bricks = ((y % 6 < 1) | ((x + (y // 6 % 2) * 5) % 10 < 1)).astype(np.float32)[..., None]
    colour = np.array([0.3, 0.2, 0.12], dtype=np.float32) + 0.15 * bricks
    return np.where(_wall_mask(size, cell, wall), colour, image).astype(np.float32)


def _wall_mask(size: int, cell: float, wall: Cell) -> np.ndarray:
    y, x = np.mgrid[:size, :size] + 0.5
    inside = (abs(x - (wall[0] + 0.5) * cell) < 0.42 * cell) & (abs(y - (wall[1] + 0.5) * cell) < 0.42 * cell)
    return inside[..., None]


def _paint_cue(image: np.ndarray, thing: Thing, tick: float, at: Point, cell: float, strength: float) -> None:
    """A glow around an object in the told half of an event, and a fading streak to where it came from."""
    begin, now = _told_half(thing.acts, tick), _position(thing, tick)
    before = None if begin is None else _position(thing, begin)
    if now is None or before is None or strength == 0:
        return
    back = ((before[0] - now[0]) * cell, (before[1] - now[1]) * cell)
    red, green, blue = COLOURS[thing.colour]
    glow = (0.5 + 0.5 * red, 0.5 + 0.5 * green, 0.5 + 0.5 * blue)
    for share in (0.9, 0.7, 0.5, 0.3):
        x, y = at[0] + back[0] * share, at[1] + back[1] * share
        _paint(image, "circle", x, y, 0.6 * thing.radius * cell, glow, strength * (1 - 0.6 * share))
    _paint(image, "circle", at[0], at[1], 1.4 * thing.radius * cell, glow, strength)


def _told_half(begins: list[int], tick: float) -> int | None:
    """The tick at which the event began whose told half `tick` lies in."""
    return next((begin for begin in begins if begin < tick <= begin + 1), None)


def _paint(
    image: np.ndarray,
    shape: str,
    x: float,
    y: float,
    radius: float,
    colour: tuple[float, float, float],
    opacity: float = 1.0,
) -> None:
    """Blend one filled shape into the image, antialiased, clipped at the border."""
    size = image.shape[0]
    reach = int(radius * 1.3) + 2
    top, bottom = max(int(y) - reach, 0), min(int(y) + reach + 1, size)
    left, right = max(int(x) - reach, 0), min(int(x) + reach + 1, size)
    if top >= bottom or left >= right:
        return
    v = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y
    u = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - x
    cover = opacity * np.clip(0.5 - _distance(shape, u, v, radius), 0, 1)[..., None]
    patch = image[top:bottom, left:right]
    patch += cover * (np.asarray(colour, dtype=np.float32) - patch)
    if shape == "ring":
        _paint(image, "circle", x, y, 0.75 * radius, (0.95, 0.95, 0.95), opacity)


def _distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """About the signed distance to the outline in pixels, negative inside."""
    if shape in ("circle", "ring"):
        return np.hypot(u, v) - radius
    if shape == "bar":
        return np.maximum(abs(u) - 1.15 * radius, abs(v) - 0.5 * radius)
    if shape == "post":
        return np.maximum(abs(u) - 0.5 * radius, abs(v) - 1.15 * radius)
    if shape == "triangle":
        return np.maximum(0.89 * abs(u) + 0.45 * v - 0.55 * radius, v - 0.95 * radius)
    if shape == "cross":
        arms = np.minimum(
            np.maximum(abs(u) - 0.38 * radius, abs(v) - radius),
            np.maximum(abs(u) - radius, abs(v) - 0.38 * radius),
        )
        return arms
    angle = np.arctan2(u, -v)
    return np.hypot(u, v) - radius * (0.72 + 0.42 * np.cos(5 * angle))
