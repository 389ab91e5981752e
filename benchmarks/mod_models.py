"""Prefill, decoding and training step over model families: token routing and its baselines against the dense model.

    python benchmarks/mod_models.py                        every family, reduced on a CPU, of real size on CUDA
    python benchmarks/mod_models.py --only llama qwen3     some of them
    python benchmarks/mod_models.py --phases prefill --contenders mod fastv --pairs 31

Random weights, one row of frames (vision tokens and one text token each) between text. On a CPU every family keeps
its proportions: width and feed-forward / 8, heads / 4 of half the width, layers / 4, window / 8, vocabulary / 32 (so
that the output head keeps its share of the FLOPs), many experts / 4, grouped heads as they are. Vision-language models
run with their tower, which no contender saves. The baselines that reduce tokens once get the keep ratio at which they
skip as many token-layers as MoD does; the counted ideal stands beside every time. Dense and changed model share their
weights and alternate in one process.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import mmskip
from common.decoders import FAMILIES, STREAMS, Decoder, Stream, Vlm
from common.measure import RESULTS, emit, interleaved_ratio, summary
from mmskip import families
from mmskip.costs import torch_flops
from mmskip.env import device_name
from mmskip.hf.calls import CACHE_NAME
from mmskip.methods.mixture_of_depths import choose_layers
from mmskip.utils.command import CommandParser

CONTENDERS = ("mod", "random", "keep1", "fastv", "similarity")
PHASES = ("prefill", "decode", "train")


def config_of(contender: str, model: PreTrainedModel, phase: str, keep: float) -> Any:
    """The method of a contender, at MoD's budget of skipped token-layers."""
    types = families.find(model).attention_types()
    blocks = len(types)
    skipped = (1 - keep) * len(choose_layers("alternate", types)) / blocks
    after = min(2, blocks // 2)
    query = "next" if phase == "train" else "last"  # the last token of a training row is one of the answer
    return {
        "mod": lambda: mmskip.MoDConfig(keep=keep),
        "random": lambda: mmskip.MoDConfig(keep=keep, router="random"),
        "keep1": lambda: mmskip.MoDConfig(keep=1.0),
        "fastv": lambda: mmskip.TokenReductionConfig(1 - skipped * blocks / (blocks - after), after, query=query),
        "similarity": lambda: mmskip.TokenReductionConfig(1 - skipped, 0, "similarity"),
    }[contender]()


def changed(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A copy of `model` with the same weights, changed by `config`."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return mmskip.apply_(copy.deepcopy(model, shared), config)


class Runner:
    """One model on one stream."""

    def __init__(self, model: PreTrainedModel, spec: Decoder | Vlm, stream: Stream, device: str, dense: bool) -> None:
        self.model, self.stream = model, stream
        shared, routed = spec.call(stream, device)
        self.call = shared if dense else {**shared, **routed}
        self.cache: Any = None

    def prefill(self) -> None:
        """The prompt in one call, into a fresh cache."""
        with torch.inference_mode():
            output = self.model.eval()(**self.call, logits_to_keep=1, use_cache=True)
            self.cache = getattr(output, CACHE_NAME)

    def decode(self) -> None:
        """Some tokens one by one after the prompt; the cache grows from run to run, in all models alike."""
        if self.cache is None:
            self.prefill()
        with torch.inference_mode():
            for _ in range(self.stream.decode):
                self.model.eval()(self.call["input_ids"][:, -1:], **{CACHE_NAME: self.cache})

    def loss(self) -> Tensor:
        """The loss over all tokens."""
        return self.model.train()(**self.call, labels=self.call["input_ids"], use_cache=False).loss


def trainer(runner: Runner, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step: forward, backward, update of the shared weights and of those the method added."""
    added = [p for n, p in runner.model.named_parameters() if "mmskip_" in n]
    own = torch.optim.AdamW(added, lr=1e-5) if added else None

    def step() -> None:
        runner.loss().backward()
        for each in (optimizer, own):
            if each is not None:
                each.step()
                each.zero_grad(set_to_none=True)

    return step


def ideal_of(runner: Runner, phase: str) -> float:
    """The counted speed-up of one run of a phase; a vision tower counts in both models alike."""
    tower = 0 if phase == "decode" else tower_flops(runner)
    if phase == "decode":
        runner.prefill()
    with mmskip.trace(runner.model) as trace:
        runner.loss() if phase == "train" else getattr(runner, phase)()
    cost = mmskip.cost(runner.model, trace)
    tower *= 3 if phase == "train" else 1
    return (cost.dense_flops + tower) / (cost.flops + tower)


def tower_flops(runner: Runner) -> int:
    """Counted FLOPs of what is neither the language model nor its head; 0 for a model without pictures."""
    if "pixel_values_videos" not in runner.call:
        return 0
    with torch.no_grad(), torch_flops() as counter:
        runner.model.eval()(**runner.call, logits_to_keep=1, use_cache=False)
    counts = {name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()}
    inside = [counts[name] for name in counts if name.endswith((".language_model", ".lm_head"))]
    return counts["Global"] - sum(inside)


def measure(
    model: PreTrainedModel, spec: Decoder | Vlm, stream: Stream, device: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Results of one model by phase and contender; a method that does not serve the family says why."""
    results: dict[str, Any] = {}
    for phase in arguments.phases:
        results[phase] = {}
        dense = Runner(model, spec, stream, device, dense=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if phase == "train" else None
        base = getattr(dense, phase) if optimizer is None else trainer(dense, optimizer)
        for contender in arguments.contenders:
            config = config_of(contender, model, phase, arguments.keep)
            try:
                ours = Runner(changed(model, config), spec, stream, device, dense=False)
                ideal = ideal_of(ours, phase)
            except ValueError as reason:
                results[phase][contender] = {"config": config.to_dict(), "refused": str(reason)}
                print(f"  {phase:8s}{contender:11s}refused: {reason}")
                continue
            run = getattr(ours, phase) if optimizer is None else trainer(ours, optimizer)
            dense.cache = ours.cache = None
            row = summary(interleaved_ratio(base, run, arguments.pairs), ideal)
            results[phase][contender] = {"config": config.to_dict(), **row}
            low, high = row["interquartile"]
            print(
                f"  {phase:8s}{contender:11s}{row['speedup']:.2f}x [{low:.2f}, {high:.2f}] of {ideal:.2f}x", flush=True
            )
    return results


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="families")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), choices=PHASES)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--keep", type=float, default=0.2, help="MoD's keep ratio, which sets everyone's budget")
    parser.add_argument("--pairs", type=int, default=15, help="paired, interleaved runs per contender")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--tiny", action="store_true", help="a shape that only shows that the script runs")
    parser.add_argument("--out", help="result file (default: benchmarks/results/mod_models_DEVICE[_FAMILIES].json)")
    arguments = parser.parse_args()
    stream = STREAMS["tiny" if arguments.tiny else arguments.device]
    measured = {}
    for name in arguments.only:
        spec: Decoder | Vlm = FAMILIES[name]
        if arguments.tiny or arguments.device == "cpu":
            spec = spec.tiny() if arguments.tiny else spec.reduced()
        print(f"{name}: {spec}", flush=True)
        model = spec.build(arguments.device)
        results = measure(model, spec, stream, arguments.device, arguments)
        measured[name] = {"shape": dataclasses.asdict(spec), **results}
        del model
    first = measured[arguments.only[0]][arguments.phases[0]][arguments.contenders[0]]
    suffix = "" if arguments.only == list(FAMILIES) else "_" + "_".join(arguments.only)
    emit(
        {
            "name": "mod_models",
            "speedup": first.get("speedup"),
            "ideal": first.get("ideal"),
            "device": device_name(torch.device(arguments.device)),
            "shape": {"family": arguments.only[0], "phase": arguments.phases[0], **dataclasses.asdict(stream)},
            "families": measured,
        },
        arguments.out or RESULTS / f"mod_models_{arguments.device}{'_tiny' * arguments.tiny}{suffix}.json",
    )


if __name__ == "__main__":
    main()
