"""Training step of a routed decoder against its dense twin: time, peak activation bytes, counted ideal.

    python benchmarks/mod_training.py                     the shape of the claim
    python benchmarks/mod_training.py --shape all         every shape below
    python benchmarks/mod_training.py --shape vocab32k --pairs 5

A step is forward, loss over all tokens, backward, and a fused AdamW update; random weights, no data loading.
Contenders: MoD with the linear router, random routing at the same budget, and keep 1.0 (the overhead of routing).
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mmskip
from common.measure import LLAMA_8B, RESULTS, Decoder, emit, interleaved_ratio, saved_activation_bytes, summary
from mmskip.utils.command import CommandParser


@dataclass(frozen=True)
class Shape(Decoder):
    """A Llama and its batch: `frames` times (`vision` vision + `text` text tokens) per row."""

    frames: int = 100
    vision: int = 10
    text: int = 1
    batch: int = 2


SHAPES = {
    "claim": Shape(),
    "vocab32k": Shape(vocab=32000),
    "short": Shape(frames=20, batch=4),
    "patches64": Shape(frames=16, vision=64, text=1),
    "narrow": Shape(width=192, ffn=512, heads=6, kv_heads=6, vocab=120, frames=50),
    "llama8b_2layers": Shape(**asdict(replace(LLAMA_8B, layers=2)), frames=200, batch=1),
}
CONTENDERS = {
    "mod": mmskip.MoDConfig(keep=0.2, layers="alternate", gate="tanh"),
    "random": mmskip.MoDConfig(keep=0.2, layers="alternate", router="random"),
    "keep1": mmskip.MoDConfig(keep=1.0, layers="alternate", gate="tanh"),
}


class Trainer:
    """A model with its optimizer and one fixed batch."""

    def __init__(self, shape: Shape, config: mmskip.MoDConfig | None, device: str) -> None:
        torch.manual_seed(0)
        settings = LlamaConfig(**shape.settings(shape.frames * (shape.vision + shape.text)))
        self.model = LlamaForCausalLM(settings).to(device, getattr(torch, shape.dtype)).train()
        frame = torch.cat([torch.zeros(shape.vision), -torch.ones(shape.text)]).long()
        rows = torch.where(frame < 0, -1, torch.arange(shape.frames)[:, None]).reshape(1, -1).expand(shape.batch, -1)
        ids = torch.randint(0, shape.vocab, rows.shape)
        self.batch = {"input_ids": ids.to(device), "labels": ids.to(device), "use_cache": False}
        if config is not None:
            mmskip.apply_(self.model, config)
            self.batch["layout"] = rows.to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def forward(self) -> torch.Tensor:
        """The loss of the batch."""
        return self.model(**self.batch).loss

    def step(self) -> None:
        """One optimizer step."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def counted(trainer: Trainer) -> mmskip.Cost:
    """Counted cost of the training step."""
    with mmskip.trace(trainer.model) as trace:
        trainer.forward()
    return mmskip.cost(trainer.model, trace)


def measure(shape: Shape, pairs: int, device: str, only: list[str], say: Callable[[str], None] = print) -> dict:
    """Median ratios, activation bytes and the counted ideal of the contenders in `only`."""
    dense = Trainer(shape, None, device)
    dense_bytes = saved_activation_bytes(lambda: dense.forward().backward())
    results = {}
    for name in only:
        routed = Trainer(shape, CONTENDERS[name], device)
        cost = counted(routed)
        kept_bytes = saved_activation_bytes(lambda routed=routed: routed.forward().backward())
        ratio = interleaved_ratio(dense.step, routed.step, pairs)
        results[name] = {
            **summary(ratio, cost.ideal_speedup),
            "activation_bytes": kept_bytes,
            "activation_saving": round(1 - kept_bytes / dense_bytes, 4),
        }
        say(f"  {name:7s} {results[name]}")
    return {"dense_activation_bytes": dense_bytes, "contenders": results}


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="claim", choices=[*SHAPES, "all"], help="all: every shape that fits a CPU")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="contenders")
    parser.add_argument("--pairs", type=int, default=15, help="paired, interleaved runs per contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="result file (default: benchmarks/results/mod_training_DEVICE_SHAPE.json)")
    arguments = parser.parse_args()
    names = [n for n in SHAPES if n != "llama8b_2layers"] if arguments.shape == "all" else [arguments.shape]
    shapes = {}
    for name in names:
        print(f"{name}: {SHAPES[name]}")
        shapes[name] = {
            "shape": asdict(SHAPES[name]),
            **measure(SHAPES[name], arguments.pairs, arguments.device, arguments.only),
        }
    first = shapes[names[0]]
    mod = first["contenders"][arguments.only[0]]
    emit(
        {
            "name": "mod_training",
            "speedup": mod["speedup"],
            "ideal": mod["ideal"],
            "shape": names[0],
            "shapes": shapes,
        },
        arguments.out or RESULTS / f"mod_training_{arguments.device}_{arguments.shape}.json",
    )


if __name__ == "__main__":
    main()
