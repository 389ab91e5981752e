"""Plan little worlds of coloured objects: events and their narrations.

A world is planned in ticks (one tick = one sampled frame) and drawn by `mmskip.datasets.synthetic.render`. Objects rest
in the cells of a square stage. One event happens at a time, takes two ticks, and is narrated at the tick in the middle,
when the frames just show it: an object enters, leaves, moves to a neighbouring cell, hits a neighbour, hides behind the
wall or comes out again. The acting object glows and leaves a streak in that half.
"""

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
        colours, shapes: how many of each exist, 2..6 and 2..7; later shapes are harder to distinguish.
        start_objects: objects on the stage at the start (their entering is never narrated), 0..max_objects.
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
class EventNarration:
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
    """A planned world: its objects with their paths, the wall's cell, and the narrations of its events."""

    things: tuple[Thing, ...]
    wall: Cell
    narrations: tuple[EventNarration, ...]
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
        self.narrations: list[EventNarration] = []

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
        return World(tuple(self.things), self.wall, tuple(self.narrations), config)

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
        """Move the objects from `tick` to `tick + 2` and narrate it at `tick + 1`."""
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
            # Coming out is narrated while about half of the object is still behind the wall.
            half = {"move": 0.3, "hide": 0.45, "out": 0.45}[event.kind]
            thing.path |= {tick: cell, tick + 1: _along(cell, event.way, half), tick + 2: target}
            thing.cell, thing.hidden = target, event.kind == "hide"
            cells = (cell, target)
        self.narrations.append(EventNarration(tick + 1, self._sentence(event), event.kind, cells))

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
