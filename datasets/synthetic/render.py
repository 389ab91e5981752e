"""Draw little worlds: textured ground, a wall of bricks, shapes that glow while they act.

Shapes: S side of the frame in pixels; images are float32 [S, S, 3] in 0..1 until they are written.
"""

from collections.abc import Iterator

import numpy as np

from mmskip.datasets.synthetic.world import COLOURS, Cell, Point, SceneConfig, Thing, World


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
                acting = _narrated_half(thing.acts, now) is not None
                if acting:
                    _paint_cue(image, thing, now, (x, y), cell, config.cue)
                opacity = 1.0 if acting or _narrated_half(thing.hits, now) is not None else config.rest
                _paint(image, thing.shape, x, y, thing.radius * cell, COLOURS[thing.colour], opacity)
        image = np.where(wall_mask, background, image)
        image += rng.normal(0, config.noise, (size, size, 1)).astype(np.float32)
        yield (image.clip(0, 1) * 255).astype(np.uint8)


def _position(thing: Thing, tick: float) -> Point | None:
    """Position of a thing, in cells, by straight lines between the points of its path; None before it came or after."""
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
    """A glow around an object in the narrated half of an event, and a fading streak to where it came from."""
    begin, now = _narrated_half(thing.acts, tick), _position(thing, tick)
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


def _narrated_half(begins: list[int], tick: float) -> int | None:
    """The tick at which the event began whose narrated half holds `tick`."""
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
