"""Layer policies of a language model: perplexity against the measured speed of decoding, all of them in one picture,
beside plans drawn at random; and how much of the counted speed-up a plan of half the blocks delivers.

Importance is calibrated on the first half of a text, perplexity is measured on the second half and on a second text,
which calibration never saw.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import RESULTS, ROOT, emit, interleaved_ratio, summary

import mmskip
from mmskip import LayerPlanConfig, SelfSpeculationConfig, SkipPolicyConfig
from mmskip.files import whole
from mmskip.methods.layer_plan import report
from mmskip.methods.self_speculation import speculation
from mmskip.train.evaluation.lm import perplexity, text_windows

DATA = ROOT.parent / "shared" / "data"


def policies(model: Any, table: Any, windows: list[Any], seeds: int) -> dict[str, Callable[[], Any]]:
    """Configs by name; those that do not fit the model raise ValueError when called."""
    count = table.layers
    found: dict[str, Callable[[], Any]] = {}
    for n in range(1, count // 2 + 2):
        found[f"llm_drop block {n}"] = lambda n=n: LayerPlanConfig.llm_drop(table, n)
        for seed in range(seeds):
            found[f"random block {n} seed {seed}"] = lambda n=n, seed=seed: LayerPlanConfig.random(n, seed)
        for kind in ("attn", "mlp", "joint"):
            found[f"llm_drop {kind} {n}"] = lambda n=n, kind=kind: LayerPlanConfig.llm_drop(table, n, kind)
        for kind in ("attn", "mlp"):
            for seed in range(seeds):
                drawn = tuple(random.Random(seed).sample(range(count), n))
                found[f"random {kind} {n} seed {seed}"] = lambda f=f"drop_{kind}", d=drawn: LayerPlanConfig(**{f: d})
    for speedup in (1.25, 1.5, 2.0):
        found[f"unified balanced {speedup}"] = lambda s=speedup: LayerPlanConfig.unified(s, "balanced")
        found[f"unified released {speedup}"] = lambda s=speedup: LayerPlanConfig.unified(s)
    found["lac static"] = lambda: LayerPlanConfig.lac(table)
    for share in (0.15, 0.3):
        found[f"ffn_skip {share}"] = lambda share=share: SkipPolicyConfig.calibrated(model, windows, share)
    found["self speculation"] = lambda: SelfSpeculationConfig()
    return found


def decode(model: Any, ids: torch.Tensor, new_tokens: int) -> Callable[[], Any]:
    """One greedy continuation of a fixed length."""
    call = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **call)


def timed(model: Any, base: Any, config: Any, ids: torch.Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed of decoding against the untouched copy, beside the counted ideal."""
    mmskip.apply_(model, config)
    try:
        with torch.no_grad(), mmskip.trace(model) as trace:
            decode(model, ids, arguments.new_tokens)()
        ideal = mmskip.cost(model, trace).ideal_speedup
        fast = decode(model, ids, arguments.new_tokens)
        ratio = interleaved_ratio(decode(base, ids, arguments.new_tokens), fast, arguments.pairs)
        if isinstance(config, SelfSpeculationConfig):
            told = speculation(model)
            return {**summary(ratio, told.ideal_speedup), "report": str(told).splitlines()}
        return summary(ratio, ideal)
    finally:
        mmskip.remove_(model)


def stories(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every policy on the trained model: perplexity and speed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = arguments.model
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, base = (AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval() for _ in range(2))
    text = (DATA / "text" / "tinystories_train_excerpt.txt").read_text(encoding="utf-8")
    unseen = (DATA / "text" / "tinystories_valid_5stories.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
    half = len(text) // 2
    limit = None if not arguments.tiny else 3000
    calibration = [w[None] for w in text_windows(tokenizer, text[:half][:limit], 512)]
    held_out = {
        "second half": text_windows(tokenizer, text[half:][:limit], 512),
        "unseen stories": text_windows(tokenizer, unseen[:limit], 512),
    }
    table = mmskip.importance(model, calibration)
    print(table, flush=True)
    ids = calibration[0][:, :64]
    found: dict[str, Any] = {"dense": {"perplexity": {k: perplexity(model, w)[0] for k, w in held_out.items()}}}
    for name, config_of in policies(model, table, calibration, arguments.seeds).items():
        try:
            config = config_of()
            mmskip.apply_(model, config)
        except ValueError as error:
            found[name] = {"refused": str(error)}
            print(f"{name}: refused: {error}", flush=True)
            continue
        values = {k: perplexity(model, w)[0] for k, w in held_out.items()}
        if isinstance(config, LayerPlanConfig) and config.rule == "unified":
            mmskip.remove_(model)
            print(f"{name}: {report(model, config)}", flush=True)
        mmskip.remove_(model)
        found[name] = {"perplexity": values, **timed(model, base, config, ids, arguments)}
        print(f"{name}: {found[name]}", flush=True)
    return {"table": table.to_dict(), "guided_against_random": _guided(found), "policies": found}


def _guided(found: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of importance-guided drops beside the mean of the random ones of the same kind and size."""
    compared = {}
    for name, values in found.items():
        _, _, what = name.partition("llm_drop ")
        drawn = [v["perplexity"] for n, v in found.items() if n.startswith(f"random {what} seed") and "perplexity" in v]
        if what and drawn and "perplexity" in values:
            compared[what] = {
                text: {"guided": guided, "random_mean": sum(d[text] for d in drawn) / len(drawn)}
                for text, guided in values["perplexity"].items()
            }
    return compared


def half_dropped(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decoding by half the blocks of a model large enough that its weights, not Python, take the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = (64, 4) if arguments.tiny else (1024, 16)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=width * 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    base, model = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 2048, (1, 2))  # almost no prompt: decoding is what is timed
    half = LayerPlanConfig(drop=range(1, layers, 2))
    balanced = LayerPlanConfig.unified(1.5, "balanced")
    found = {"half": timed(model, base, half, ids, arguments), "balanced": timed(model, base, balanced, ids, arguments)}
    found["balanced"]["report"] = str(report(model, balanced))
    found["shape"] = {"width": width, "layers": layers, "prompt": 2, "new_tokens": arguments.new_tokens}
    return found


def picture(found: dict[str, Any], path: Path) -> None:
    """Perplexity of the unseen stories against measured speed, one mark per policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense = found["dense"]["perplexity"]["unseen stories"]
    axes.scatter([1.0], [dense], marker="*", s=120, color="black", label="dense")
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, values in found.items():
        if "speedup" in values:
            group = " ".join(name.split()[:2])
            groups.setdefault(group, []).append((values["speedup"], values["perplexity"]["unseen stories"]))
    for group, points in groups.items():
        style = {"marker": "x"} if group.startswith("random") else {"marker": "o"}
        axes.scatter(*zip(*points, strict=True), label=group, **style)
    axes.set(xlabel="measured speed-up of generation", ylabel="perplexity, unseen stories", yscale="log")
    axes.legend(fontsize=8)
    with whole(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DATA / "stories260K", help="folder of a language model")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3, help="random plans of each size")
    parser.add_argument("--tiny", action="store_true", help="a quick try of everything; its numbers mean nothing")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.pairs, arguments.new_tokens, arguments.seeds = 2, 4, 1
    out = arguments.out or RESULTS / f"depth{'_tiny' * arguments.tiny}.json"
    half = half_dropped(arguments)
    results = stories(arguments)
    picture(results["policies"], out.with_suffix(".png"))
    emit(
        {
            "name": "depth",
            "speedup": half["half"]["speedup"],
            "ideal": half["half"]["ideal"],
            "shape": half["shape"],
            "half_dropped": half,
            **results,
        },
        out,
    )


if __name__ == "__main__":
    main()
