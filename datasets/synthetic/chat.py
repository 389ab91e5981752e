"""The embedded chat set: questions on pictures and short clips of the generated scenes, made on first use.

Every answer needs the pixels: colours, shapes, places, numbers and events are drawn at random, and a question names at
most one of them. Files are those users bring themselves: one JSON object per line with `messages`, beside images and
videos.

Layout of the folder:

    manifest.json               the settings, written first
    <split>/media/<n>.png|mp4
    <split>.jsonl               written last: it marks a finished split

Shapes: S side of a picture in pixels.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from mmskip.datasets.common.splits import SPLITS
from mmskip.datasets.synthetic.render import draw_world
from mmskip.datasets.synthetic.world import COLOURS, SHAPES, SceneConfig, Thing, World, plan_world
from mmskip.datasets.video.reader import write_video

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
VERBS = {"enter": "enters", "leave": "leaves", "move": "moves", "hit": "hits", "hide": "hides", "out": "appears"}
COLOUR, COUNT, PLACE = "what colour is the {}?", "how many objects are there?", "what is at the {} {}?"
WHO, WHAT = "what acts?", "what does it do?"
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CLIP_FRAMES, FRAMES_PER_TICK, CLIP_FPS = 4, 2, 4.0
PATCH = 12  # of the tiny vision tower these pictures are made for, pixels
_FORMAT = 1  # raised when the same settings give other files

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<end>{% endgeneration %}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class SceneChatConfig:
    """Settings of the embedded chat set.

    Attributes:
        train, val, test: conversations per split, >= 1.
        clips: share of conversations about a clip (the others are about a picture), in 0..1.
        seed: of all random numbers, >= 0.
        image_size: S, a multiple of 24, >= 48.
        colours, shapes: how many of each exist, 2..6 and 2..7.
        max_objects: most objects on a picture, 2..5.
    """

    train: int = 2400
    val: int = 200
    test: int = 200
    clips: float = 0.25
    seed: int = 0
    image_size: int = 72
    colours: int = 4
    shapes: int = 3
    max_objects: int = 3

    def __post_init__(self) -> None:
        limits = dict.fromkeys(SPLITS, (1, 10**7)) | {
            "clips": (0, 1),
            "seed": (0, 2**32),
            "image_size": (48, 960),
            "colours": (2, len(COLOURS)),
            "shapes": (2, len(SHAPES)),
            "max_objects": (2, len(NUMBERS) - 1),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"SceneChatConfig.{name} must be in {low}..{high}, got {getattr(self, name)}")
        if self.image_size % (2 * PATCH):
            raise ValueError(f"SceneChatConfig.image_size must be a multiple of {2 * PATCH}, got {self.image_size}")

    @property
    def id(self) -> str:
        """Ten characters that name these settings, for folders."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True)
        return sha256(text.encode()).hexdigest()[:10]

    @property
    def scene(self) -> SceneConfig:
        """The worlds that the pictures show."""
        return SceneConfig(ticks=8, colours=self.colours, shapes=self.shapes, max_objects=self.max_objects, rest=0.9)


@dataclass(frozen=True)
class Scene:
    """One conversation of the set: the world, the frames shown (first, how many), and questions with answers."""

    world: World
    first: int
    frames: int
    turns: tuple[tuple[str, str], ...] = field(default=())

    @property
    def is_clip(self) -> bool:
        """Whether a clip is shown, not a picture."""
        return self.frames > 1


def scene_of(config: SceneChatConfig, split: str, index: int) -> tuple[Scene, np.random.Generator]:
    """The conversation `index` of a split, and the random numbers of its looks. The same settings give the same."""
    seeds = np.random.SeedSequence([config.seed, SPLITS.index(split), index]).spawn(2)
    plan, looks = (np.random.default_rng(seed) for seed in seeds)
    if plan.random() < config.clips:
        return _clip(config, plan), looks
    return _picture(config, plan), looks


def _picture(config: SceneChatConfig, rng: np.random.Generator) -> Scene:
    count = int(rng.integers(1, config.max_objects + 1))
    world = plan_world(replace(config.scene, start_objects=count), rng)
    things = world.things[:count]
    turns = [(COUNT, NUMBERS[count])]
    placed = things[rng.integers(count)]
    turns.append((_place(placed), placed.kind))
    # of another object: no answer stands in another turn
    shapes = Counter(thing.shape for thing in things)
    others = [thing for thing in things if shapes[thing.shape] == 1 and thing is not placed]
    if others:
        other = others[rng.integers(len(others))]
        turns.append((COLOUR.format(other.shape), other.colour))
    order = rng.permutation(len(turns))
    return Scene(world, 0, 1, tuple(turns[i] for i in order))


def _place(thing: Thing) -> str:
    column, row = thing.path[0]
    return PLACE.format(ROWS[int(row)], COLUMNS[int(column)])


def _clip(config: SceneChatConfig, rng: np.random.Generator) -> Scene:
    while True:
        world = plan_world(replace(config.scene, start_objects=int(rng.integers(1, config.max_objects))), rng)
        if world.narrations:
            break
    narration = world.narrations[rng.integers(len(world.narrations))]
    begin = narration.tick - 1
    actor = next(thing for thing in world.things if begin in thing.acts)
    turns = ((WHO, actor.kind), (WHAT, VERBS[narration.event]))
    return Scene(world, begin * FRAMES_PER_TICK, CLIP_FRAMES, turns)


def generate_chat(root: str | Path, config: SceneChatConfig | None = None, progress: bool = True) -> Path:
    """Write the set into a folder; finished splits are kept, so an interrupted run is taken up.

    Returns:
        The folder.

    Raises:
        ValueError: the folder holds a set of other settings.
    """
    from mmskip.utils.files import write_text

    root, config = Path(root), config or SceneChatConfig()
    manifest = json.dumps({"format": _FORMAT, **asdict(config)}, indent=1)
    path = root / "manifest.json"
    if path.exists() and path.read_text() != manifest:
        raise ValueError(f"{root} holds a chat set of other settings; give another folder, or delete this one")
    write_text(manifest, path)
    for split in SPLITS:
        target = root / f"{split}.jsonl"
        if target.exists():
            continue
        count = getattr(config, split)
        bar = tqdm(range(count), desc=f"generating {split} scenes", unit="scene", disable=not progress)
        lines = [json.dumps(_write_scene(root, config, split, index)) for index in bar]
        write_text("\n".join(lines) + "\n", target)
    return root


def _write_scene(root: Path, config: SceneChatConfig, split: str, index: int) -> dict[str, Any]:
    """Write the picture or clip of a conversation; returns its record."""
    scene, looks = scene_of(config, split, index)
    frames = draw_world(scene.world, config.image_size, FRAMES_PER_TICK, looks)
    shown = list(islice(frames, scene.first, scene.first + scene.frames))
    kind = "video" if scene.is_clip else "image"
    path = root / split / "media" / f"{index:05d}.{'mp4' if scene.is_clip else 'png'}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if scene.is_clip:
        write_video(path, shown, CLIP_FPS, crf=12)
    else:
        Image.fromarray(shown[0]).save(path)
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(scene.turns):
        media = [{"type": kind, "path": str(path.relative_to(root))}] if number == 0 else []
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": f"{split}-{index:05d}", "messages": messages}


def scene_words() -> list[str]:
    """All words of the set, in alphabetical order."""
    texts = [COLOUR, COUNT, PLACE, WHO, WHAT]
    words = {*COLOURS, *SHAPES, *ROWS, *COLUMNS, *VERBS.values(), *NUMBERS}
    for text in texts:
        words.update(piece for piece, _ in _pieces().pre_tokenize_str(text.replace("{}", "")))
    return sorted(words)


def _pieces() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)


def scene_processor(config: SceneChatConfig) -> LlavaOnevisionProcessor:
    """A LLaVA-OneVision processor for these pictures, made of nothing but code: a word-level tokenizer, S x S pictures
    in patches of 12 pixels, and a chat template that marks the assistant's words."""
    special = ["<pad>", "<unk>", "<end>", "<image>", "<video>", "<user>", "<assistant>", "<system>"]
    order = special + scene_words()
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(order)}, unk_token="<unk>"))
    core.pre_tokenizer = _pieces()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", chat_template=TEMPLATE
    )
    tokenizer.add_tokens(special[3:], special_tokens=True)
    size = {"height": config.image_size, "width": config.image_size}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[config.image_size] * 2]),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(config.image_size // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
