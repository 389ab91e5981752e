"""Prefill, decoding and training step over model families: token routing and its baselines against the dense model.

    python benchmarks/mod_models.py                        every family, reduced on a CPU, of real size on CUDA
    python benchmarks/mod_models.py --only llama qwen3     some of them
    python benchmarks/mod_models.py --phases prefill --contenders mod fastv --pairs 31

Random weights, one row of frames (vision tokens and one text token each) between text. On a CPU every family keeps
its proportions: width and feed-forward / 8, heads / 4 of half the width, layers / 4, window / 8, vocabulary / 32 (so
that the output head keeps its share of the FLOPs), grouped heads as they are. The baselines that reduce tokens once
get the keep ratio at which they skip as many token-layers as MoD does; the counted ideal stands beside every time.
Dense and changed model share their weights and alternate in one process.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _measure import RESULTS, emit, interleaved_ratio, summary
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import mmskip
from mmskip import families
from mmskip.env import device_name
from mmskip.methods.mod import routed_layers


@dataclass(frozen=True)
class Decoder:
    """A model of real size; `others` are further settings of its config, by transformers' names.

    `cuda_layers`: blocks that fit one 139 GiB GPU in training (None: all).
    """

    model_type: str
    like: str
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int | None = None
    attention: str = "sdpa"
    cuda_layers: int | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def reduced(self) -> "Decoder":
        """The same proportions for a CPU."""
        others = {k: v // 8 if k == "moe_intermediate_size" else v for k, v in self.others.items()}
        return dataclasses.replace(
            self,
            width=self.width // 8,
            ffn=self.ffn // 8,
            layers=self.layers // 4,
            heads=self.heads // 4,
            kv_heads=self.kv_heads // 4,
            head_dim=self.head_dim // 2,
            vocab=self.vocab // 32,
            window=None if self.window is None else self.window // 8,
            cuda_layers=None,
            others=others,
        )

    def tiny(self) -> "Decoder":
        """Just enough to run the script."""
        others = {
            k: 4 if k == "num_experts" else 2 if k == "num_experts_per_tok" else v for k, v in self.others.items()
        }
        return dataclasses.replace(
            self,
            width=32,
            ffn=48,
            layers=4,
            heads=2,
            kv_heads=1,
            head_dim=16,
            vocab=64,
            cuda_layers=None,
            others=others,
        )

    def build(self, device: str) -> PreTrainedModel:
        """The model with random weights, fp32 on a CPU and bf16 on CUDA."""
        settings = {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.cuda_layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 32768,
            **self.others,
        }
        if self.model_type in ("llama", "qwen3", "mistral", "mixtral", "qwen3_moe"):
            settings["tie_word_embeddings"] = False
        if self.window is not None or self.model_type == "mistral":
            settings["sliding_window"] = self.window
        config = CONFIG_MAPPING[self.model_type](**settings, pad_token_id=None, bos_token_id=None, eos_token_id=None)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, attn_implementation=self.attention, dtype=dtype)


DECODERS = {
    "llama": Decoder("llama", "Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3": Decoder("qwen3", "Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936),
    "mistral": Decoder("mistral", "Mistral-7B-v0.1", 4096, 14336, 32, 32, 8, 128, 32000, window=4096),
    "gemma2": Decoder("gemma2", "Gemma-2-9B", 3584, 14336, 42, 16, 8, 256, 256000, window=4096, attention="eager"),
    "gemma3": Decoder("gemma3_text", "Gemma-3-4B", 2560, 10240, 34, 8, 4, 256, 262208, window=1024),
    "mixtral": Decoder("mixtral", "Mixtral-8x7B", 4096, 14336, 32, 32, 8, 128, 32000, cuda_layers=8),
    "qwen3_moe": Decoder(
        "qwen3_moe",
        "Qwen3-30B-A3B",
        2048,
        6144,
        48,
        32,
        4,
        128,
        151936,
        cuda_layers=12,
        others={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
}
CONTENDERS = ("mod", "random", "keep1", "fastv", "similarity")
PHASES = ("prefill", "decode", "train")


@dataclass(frozen=True)
class Stream:
    """One row: `lead` text tokens, `frames` times (`vision` vision and one text token), `lead` text tokens."""

    frames: int
    vision: int
    lead: int = 16
    decode: int = 8

    def layout(self) -> Tensor:
        """LongTensor [1, T]."""
        frame = torch.cat([torch.arange(self.frames)[:, None].expand(-1, self.vision), -torch.ones(self.frames, 1)], 1)
        text = -torch.ones(self.lead)
        return torch.cat([text, frame.flatten(), text]).long()[None]


STREAMS = {"tiny": Stream(3, 8, 4, 2), "cpu": Stream(32, 32), "cuda": Stream(64, 64, 32, 16)}


def config_of(contender: str, model: PreTrainedModel, phase: str, keep: float) -> Any:
    """The method of a contender, at MoD's budget of skipped token-layers."""
    types = families.find(model).attention_types()
    blocks = len(types)
    skipped = (1 - keep) * len(routed_layers("alternate", types)) / blocks
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

    def __init__(self, model: PreTrainedModel, stream: Stream, device: str, dense: bool) -> None:
        self.model, self.stream = model, stream
        layout = stream.layout().to(device)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, layout.shape, generator=generator).to(device)
        self.call = {"input_ids": ids} if dense else {"input_ids": ids, "layout": layout}
        self.cache: Any = None

    def prefill(self) -> None:
        """The prompt in one call, into a fresh cache."""
        with torch.inference_mode():
            self.cache = self.model.eval()(**self.call, logits_to_keep=1, use_cache=True).past_key_values

    def decode(self) -> None:
        """Some tokens one by one behind the prompt; the cache grows from run to run, in all models alike."""
        if self.cache is None:
            self.prefill()
        with torch.inference_mode():
            for _ in range(self.stream.decode):
                self.model.eval()(self.call["input_ids"][:, -1:], past_key_values=self.cache)

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
    """The counted speed-up of one run of a phase."""
    if phase == "decode":
        runner.prefill()
    with mmskip.trace(runner.model) as trace:
        runner.loss() if phase == "train" else getattr(runner, phase)()
    return mmskip.cost(runner.model, trace).ideal_speedup


def measure(model: PreTrainedModel, stream: Stream, device: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Results of one model by phase and contender; a method that does not serve the family says why."""
    results: dict[str, Any] = {}
    for phase in arguments.phases:
        results[phase] = {}
        dense = Runner(model, stream, device, dense=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if phase == "train" else None
        base = getattr(dense, phase) if optimizer is None else trainer(dense, optimizer)
        for contender in arguments.contenders:
            config = config_of(contender, model, phase, arguments.keep)
            try:
                ours = Runner(changed(model, config), stream, device, dense=False)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(DECODERS), choices=DECODERS, help="families")
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
        spec = DECODERS[name]
        if arguments.tiny or arguments.device == "cpu":
            spec = spec.tiny() if arguments.tiny else spec.reduced()
        print(f"{name}: {spec}", flush=True)
        model = spec.build(arguments.device)
        results = measure(model, stream, arguments.device, arguments)
        measured[name] = {"shape": dataclasses.asdict(spec), **results}
        del model
    first = measured[arguments.only[0]][arguments.phases[0]][arguments.contenders[0]]
    suffix = "" if arguments.only == list(DECODERS) else "_" + "_".join(arguments.only)
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
