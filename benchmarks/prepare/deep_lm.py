"""Trains the 12-layer language model that the depth benchmark measures, from the texts of the data folder, and keeps
it as a transformers folder under `runs/deep_lm`. One thread, at most half an hour; a folder that is there is kept.

`--variant plain` trains all layers in every step. `--variant skipped` skips, in every step, another random share
of the blocks between the first and the last, so that the middle of the stack does little: what self-speculation by
skipping wants. Weights that write into the residual stream start at zero in both.

The last tenth of each text is never trained on: half of it picks the checkpoint, the other half is for reports. The
tokenizer is that of the stories model.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import cross_entropy

import mmskip
from common.measure import ROOT, environment
from mmskip import LayerPlanConfig
from mmskip.models.common.pretrained import build_llm, llm_config
from mmskip.train.evaluation.language_model.perplexity import perplexity, text_windows
from mmskip.utils.command import CommandParser
from mmskip.utils.files import write_json

DATA = ROOT.parent / "shared" / "data"
TEXTS = ("tinystories_train_excerpt", "sherlock")
VARIANTS = {"plain": 1800, "skipped": 2600}
"""Steps by variant: about the same time, since the second runs fewer blocks in each."""
SHAPE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
MOST_SKIPPED = 0.8
"""Largest share of the inner blocks that the variant `skipped` skips in a step."""


def parts(name: str) -> dict[str, str]:
    """A text of the data folder in the part that is trained on, the one that picks the checkpoint, and the one that
    reports may use; cut at ends of paragraphs."""
    text = (DATA / "text" / f"{name}.txt").read_text(encoding="utf-8")
    cuts = [text.index("\n\n", int(len(text) * share)) for share in (0.9, 0.95)]
    return {"train": text[: cuts[0]], "choose": text[cuts[0] : cuts[1]], "report": text[cuts[1] :]}


def batches(ids: torch.Tensor, rows: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Random windows [rows, length] without end."""
    source = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - length, (rows,), generator=source)
        yield ids[starts[:, None] + torch.arange(length)]


def left_out(layers: int, source: random.Random) -> tuple[int, ...]:
    """Blocks that one step of the variant `skipped` skips: every inner one with a chance drawn for the step."""
    chance = source.uniform(0, MOST_SKIPPED)
    return tuple(i for i in range(1, layers - 1) if source.random() < chance)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def train(model: Any, ids: torch.Tensor, chosen: dict[str, list[torch.Tensor]], arguments: argparse.Namespace) -> Any:
    """Train in place; the weights end as those of the lowest mean log-perplexity on the choosing parts.

    Returns:
        The history: step, seconds, and perplexities by text.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1)
    source, feed = random.Random(arguments.seed), batches(ids, arguments.rows, arguments.length, arguments.seed)
    history: list[dict[str, Any]] = []
    best, kept, start = math.inf, None, time.perf_counter()
    model.train()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        drop = left_out(SHAPE["num_hidden_layers"], source) if arguments.variant == "skipped" else ()  # type: ignore[arg-type]
        if drop:
            mmskip.apply_(model, LayerPlanConfig(drop=drop))
        window = next(feed)
        logits = model(window[:, :-1], use_cache=False).logits
        cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        if drop:
            mmskip.remove_(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % arguments.every and step + 1 < arguments.steps:
            continue
        found = {name: perplexity(model, windows)[0] for name, windows in chosen.items()}
        score = sum(math.log(value) for value in found.values()) / len(found)
        history.append({"step": step + 1, "seconds": round(time.perf_counter() - start, 1), "perplexity": found})
        print(history[-1], flush=True)
        if score < best:
            best, kept = score, {name: value.clone() for name, value in model.state_dict().items()}
    assert kept is not None
    model.load_state_dict(kept)
    model.eval()
    return history


def folder_of(variant: str) -> Path:
    """Folder of a variant."""
    return ROOT / "runs" / "deep_lm" / variant


def make(arguments: argparse.Namespace) -> Path:
    """Train one variant unless it is there, and return its folder."""
    from transformers import AutoTokenizer

    arguments.steps = arguments.steps or VARIANTS[arguments.variant]
    folder = arguments.out or folder_of(arguments.variant)
    if (folder / "training.json").is_file():
        print(f"{folder} is there")
        return folder
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260K", local_files_only=True)
    split = {name: parts(name) for name in TEXTS}
    windows = {name: text_windows(tokenizer, text["choose"], 256)[: arguments.choose] for name, text in split.items()}
    ids = torch.cat([torch.cat(text_windows(tokenizer, text["train"], 256)) for text in split.values()])
    torch.manual_seed(arguments.seed)
    model: Any = build_llm(SHAPE, llm_config(SHAPE), len(tokenizer), "float32", "sdpa", residual_init=0.0)
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    start, computing = time.perf_counter(), time.process_time()
    history = train(model, ids, windows, arguments)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {name: getattr(arguments, name) for name in ("variant", "steps", "rows", "length", "lr", "seed")}
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - computing}
    summary = {**settings, **seconds, "tokens": len(ids), "history": history}
    write_json({**summary, "environment": environment()}, folder / "training.json")
    print(json.dumps({**summary, "history": history[-1:]}))
    return folder


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = CommandParser(description=__doc__)
    made.add_argument("--variant", choices=tuple(VARIANTS), default="plain")
    made.add_argument("--steps", type=int, help="default: 1800 (plain) or 2600 (skipped)")
    made.add_argument("--rows", type=int, default=4)
    made.add_argument("--length", type=int, default=257, help="tokens of a row, one more than are predicted")
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--every", type=int, default=200, help="steps between looks at the choosing parts")
    made.add_argument("--choose", type=int, default=24, help="windows of each text that choose")
    made.add_argument("--out", type=Path)
    return made


if __name__ == "__main__":
    make(parser().parse_args())
