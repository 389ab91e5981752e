"""The pages of the documentation, their blocks of code, and tiny things for what the blocks do not make themselves."""

import ast
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from locations import ROOT

PARSED_ONLY = "<!-- parsed only"
_FENCE = re.compile(r"^(?P<mark><!-- parsed only[^\n]*-->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```", re.M | re.S)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block. `run` is False where the page says, in a comment before it, that it is parsed only."""

    page: Path
    line: int
    language: str
    code: str
    run: bool

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def load(path: str) -> ModuleType:
    """A module by its file, below the root."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def name_of(page: Path) -> str:
    """`docs/depth.md`."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        if match["language"] in languages:
            line = text[: match.start("code")].count("\n")
            found.append(Block(page, line, match["language"], match["code"], match["mark"] is None))
    return found


def decoder_names() -> dict[str, Any]:
    """A decoder of six blocks; two rows of text; two frames in a layout."""
    from tiny_decoders import VOCAB, stream_layout, tiny_decoder

    layout = stream_layout(2)[None].expand(2, -1)
    ids = torch.randint(3, VOCAB, layout.shape, generator=torch.Generator().manual_seed(0))
    model = tiny_decoder("llama", num_hidden_layers=6)
    return {
        "model": model,
        "ids": ids,
        "mask": torch.ones_like(ids),
        "batches": [ids],
        "layout": layout,
        "inputs": {"input_ids": ids, "layout": layout},
    }


def saturating_names() -> dict[str, Any]:
    """The same, of a decoder whose states settle."""
    from tiny_decoders import saturating

    return {**decoder_names(), "model": saturating()}


def seq2seq_names() -> dict[str, Any]:
    """An encoder-decoder, and batches with what it says."""
    import tiny_seq2seq

    small, inputs = tiny_seq2seq.build("bart"), tiny_seq2seq.inputs("bart")
    small.config.decoder_layers = 8
    torch.manual_seed(0)
    model = type(small)(small.config).eval()
    said = model.generate(**inputs, max_new_tokens=20)
    return {"model": model, "inputs": inputs, "batches": [{"inputs": inputs, "said": said}] * 40}


def vlm_names() -> dict[str, Any]:
    """A VLM, its processor, and a batch of two pictures and a video."""
    from tiny_processors import tiny_processor
    from tiny_vlms import tiny_vlm

    processor = tiny_processor("llava_onevision")
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8) for _ in range(2)]
    video = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return {
        "vlm": tiny_vlm("llava_onevision"),
        "model": tiny_vlm("llava_onevision"),
        "processor": processor,
        "prompts": ["<image> w1 w2", "<image> <video> w3"],
        "images": [[pictures[0]], [pictures[1]]],
        "videos": [video],
        "prompt": "<video> w1 w2",
        "video": [video],
    }


def unet_names() -> dict[str, Any]:
    """A UNet of diffusers, a noisy sample and a step."""
    from tiny_unets import inputs, tiny_unet

    name = "unet2d"
    given = inputs(name, timestep=700)
    return {"unet": tiny_unet(name), "sample": given["sample"], "timestep": given["timestep"]}


def custom_unet_names() -> dict[str, Any]:
    """A class that stands for a user's network."""
    return {"MyUNet": type("MyUNet", (torch.nn.Module,), {})}


def cnn_names() -> dict[str, Any]:
    """A CNN of timm and two pictures."""
    import timm

    torch.manual_seed(0)
    return {"model": timm.create_model("resnet10t", num_classes=5).eval(), "images": torch.randn(2, 3, 64, 64)}


NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": vlm_names,
    "docs/models.md": vlm_names,
    "docs/early_exit.md": seq2seq_names,
    "docs/methods/early_exit.md": seq2seq_names,
    "docs/methods/ffn_skip.md": saturating_names,
    "docs/methods/skip_scale.md": unet_names,
    "docs/methods/freeu.md": unet_names,
    "docs/methods/step_cache.md": unet_names,
    "docs/methods/layer_mask.md": cnn_names,
    "docs/layer_masking.md": cnn_names,
    "docs/skip_tuning.md": custom_unet_names,
}
"""Page -> the names that its blocks may use; others: `decoder_names`."""

FRESH = ("docs/depth.md", "docs/index.md", "docs/early_exit.md")
"""Pages whose blocks begin with the given names each time; elsewhere a block sees what those before it left."""


def uses(code: str) -> set[str]:
    """Dotted names of mmskip that a block uses, its imports included."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmskip"):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"mmskip(\.\w+)+", name):
                found.add(name)
    return found
