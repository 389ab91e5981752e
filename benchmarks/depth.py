"""Layer policies of language models: perplexity against the measured speed of decoding, all of them in one picture
beside plans drawn at random; bits by importance against bits at random; self-speculation; and how much of its counted
speed-up a plan of half the blocks delivers.

Importance, thresholds and ways to draft are chosen on calibration texts; perplexities and times are of other texts.
Runs in parts, each of which resumes where its file (`benchmarks/results/depth_MODEL.json`) stops:

    python benchmarks/prepare/deep_lm.py --variant plain; python benchmarks/prepare/deep_lm.py --variant skipped
    python benchmarks/depth.py --part quality     # perplexities; minutes, no timing
    python benchmarks/depth.py --part speed       # times of decoding: a quiet machine
    python benchmarks/depth.py --part speculate   # self-speculation, chosen on one text, timed on another
    python benchmarks/depth.py --part half        # a model large enough that its weights, not Python, take the time
    python benchmarks/depth.py --part draw        # pictures

`--clock cpu` counts the seconds this process computes instead of those that pass, for a machine with other work; such
figures stand under separate names (`speed_cpu`) and are drawn where no others are there.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mmskip
from common.depth import (
    GREEDY,
    MODELS,
    bit_widths,
    greedy_of,
    importance_of,
    load,
    plans,
    speculations,
    texts,
    token_policies,
)
from common.measure import RESULTS, emit, interleaved_ratio, summary
from common.pictures import bits_picture, picture
from mmskip import ImportanceTable, LayerPlanConfig
from mmskip.methods.layer_plan import preview
from mmskip.methods.self_speculation import speculation_of
from mmskip.train.evaluation.language_model.perplexity import perplexity
from mmskip.utils.command import CommandParser
from mmskip.utils.results import ResumableResults

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PARTS = ("quality", "speed", "speculate", "half", "draw")


class Kept(ResumableResults):
    """Results that are printed as they come; parts of the benchmark may run side by side."""

    def once(self, key: str, make: Callable[[], Any], part: str | None = None) -> Any:
        """Return a figure; it is made, written and printed unless the file has it."""
        known = key in self.values.get(part, {})
        found = super().once(key, make, part)
        if not known:
            print(f"{key}: {found}", flush=True)
        return found


def timed_part(name: str, arguments: argparse.Namespace) -> str:
    """The name that figures of a part have under the clock asked for."""
    return name if arguments.clock == "wall" else f"{name}_{arguments.clock}"


def decode(model: Any, ids: torch.Tensor, new_tokens: int, **extra: Any) -> Callable[[], Any]:
    """One greedy continuation of a fixed length."""
    call = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, **call, **extra)


def applied_or_refused(model: Any, config_of: Callable[[], Any], measure: Callable[[Any], Any]) -> Any:
    """Measure the changed model; if the policy does not fit it, return the reason."""
    try:
        config = config_of()
        mmskip.apply_(model, config)
    except ValueError as error:
        return {"refused": str(error)}
    try:
        return measure(config)
    finally:
        mmskip.remove_(model)


def quality(kept: Kept, model: Any, found: dict[str, Any], table: ImportanceTable) -> None:
    """Perplexity of every policy on every report text. What acts while decoding alone sees all tokens but the first as
    decoded."""
    windows = [window for part in found["calibrate"].values() for window in part]
    known: dict[str, dict[str, float]] = {}

    def measure(config: Any) -> dict[str, float]:
        key = repr(config)  # two columns may choose alike
        if key not in known:
            known[key] = {name: round(perplexity(model, part)[0], 5) for name, part in found["report"].items()}
        return known[key]

    kept.once("dense", lambda: measure(None), "quality")
    for name, config_of in {
        **plans(table, kept.values["greedy"]),
        **token_policies(model, windows),
        **bit_widths(table),
    }.items():
        kept.once(name, lambda c=config_of: applied_or_refused(model, c, measure), "quality")


def speed(kept: Kept, model: Any, base: Any, found: dict[str, Any], table: ImportanceTable, arguments: Any) -> None:
    """Speed of decoding of every policy against the untouched copy. Random and greedy plans run as many parts as the
    plan by importance of their size and are not timed again; nor are bits, which are stored one byte each and computed
    in floats."""
    windows = [window for part in found["calibrate"].values() for window in part]
    ids = next(iter(found["report"].values()))[0][None, :16]

    def measure(config: Any) -> dict[str, Any]:
        with torch.no_grad(), mmskip.trace(model) as trace:
            decode(model, ids, arguments.new_tokens)()
        ideal = mmskip.cost(model, trace).ideal_speedup
        ratio = interleaved_ratio(
            decode(base, ids, arguments.new_tokens),
            decode(model, ids, arguments.new_tokens),
            arguments.pairs,
            1,
            CLOCKS[arguments.clock],
        )
        if isinstance(config, LayerPlanConfig) and config.rule == "unified":
            mmskip.remove_(model)
            return {**summary(ratio, ideal), "report": str(preview(model, config))}
        return summary(ratio, ideal)

    for name, config_of in {**plans(table, {}), **token_policies(model, windows)}.items():
        if not name.startswith(("random", "greedy")):
            kept.once(name, lambda c=config_of: applied_or_refused(model, c, measure), timed_part("speed", arguments))


def speculate(kept: Kept, model: Any, base: Any, found: dict[str, Any], table: Any, arguments: Any) -> None:
    """Self-speculation: of each kind of draft the setting with the best counted speed-up on a calibration text, timed
    on prompts of a report text beside prompt lookup and assisted early exit."""
    prompts = {
        part: [window[None, :32] for window in next(iter(found[part].values())) if len(window) >= 32][:3]
        for part in ("calibrate", "report")
    }
    new = arguments.new_tokens * 2

    def counted(config: Any) -> float:
        for ids in prompts["calibrate"][:2]:
            decode(model, ids, new)()
        return round(speculation_of(model).ideal_speedup, 4)

    settings = speculations(table)
    for name, config in settings.items():
        kept.once(name, lambda c=config: applied_or_refused(model, lambda: c, counted), "drafts")
    able = {name: value for name, value in kept.values["drafts"].items() if isinstance(value, float)}
    for kind in ("static", "tree", "exit", "swift"):
        ours = [name for name in able if name.startswith(kind)]
        if ours:
            best = max(ours, key=able.__getitem__)
            kept.once(
                best,
                lambda n=best: applied_or_refused(
                    model, lambda: settings[n], lambda _: _paired(base, model, prompts["report"], new, arguments)
                ),
                timed_part("speculation", arguments),
            )
    for name, extra in (("prompt lookup 4", {"prompt_lookup_num_tokens": 4}), ("assistant early exit", None)):
        extra = extra or {"assistant_early_exit": max(1, table.layers // 3)}
        kept.once(
            name,
            lambda e=extra: _paired(base, base, prompts["report"], new, arguments, e),
            timed_part("speculation", arguments),
        )


def _paired(
    base: Any, model: Any, prompts: list[torch.Tensor], new: int, arguments: Any, extra: dict[str, Any] | None = None
) -> Any:
    """Paired times over prompts in turn, and whether the tokens are those of plain decoding."""
    extra = extra or {}
    plain = [decode(base, ids, new) for ids in prompts]
    fast = [decode(model, ids, new, **extra) for ids in prompts]
    try:
        equal = all(torch.equal(one(), other()) for one, other in zip(plain, fast, strict=True))
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    ratios = [
        interleaved_ratio(one, other, max(2, -(-arguments.pairs // len(prompts))), 1, CLOCKS[arguments.clock])
        for one, other in zip(plain, fast, strict=True)
    ]
    result: dict[str, Any] = {
        "speedup": round(statistics.median(r.median for r in ratios), 4),
        "speedups": [round(r.median, 4) for r in ratios],
        "interquartile": [round(statistics.median(q), 4) for q in ((r.q1 for r in ratios), (r.q3 for r in ratios))],
        "pairs": sum(r.pairs for r in ratios),
        "same_tokens": equal,
    }
    if extra:
        return result
    state = speculation_of(model)
    return {**result, "ideal": round(state.ideal_speedup, 4), "report": str(state).splitlines()}


def guided(quality_rows: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """By size: perplexity of the guided choice beside the mean, best and worst of the random ones, and how many random
    ones are worse."""
    compared: dict[str, Any] = {}
    for name, values in quality_rows.items():
        if not name.startswith(first) or "refused" in values or " random" in name or name.startswith("random"):
            continue
        drawn = [
            v for n, v in quality_rows.items() if n.startswith(second.format(**_words(name))) and "refused" not in v
        ]
        if drawn:
            compared[name] = {
                text: {
                    "guided": value,
                    "random_mean": round(sum(d[text] for d in drawn) / len(drawn), 4),
                    "random_best": min(d[text] for d in drawn),
                    "random_worst": max(d[text] for d in drawn),
                    "random_worse": f"{sum(d[text] > value for d in drawn)} of {len(drawn)}",
                }
                for text, value in values.items()
            }
    return compared


def _words(name: str) -> dict[str, str]:
    words = name.split()
    return {"drop": " ".join(words[1:]), "bits": " ".join(words[:-1])}


def half_dropped(arguments: argparse.Namespace, kept: Kept) -> dict[str, Any]:
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

    def measure(plan: LayerPlanConfig) -> dict[str, Any]:
        promise = preview(model, plan)
        mmskip.apply_(model, plan)
        fast = decode(model, ids, arguments.new_tokens)
        with torch.no_grad(), mmskip.trace(model) as trace:
            fast()
        ideal = mmskip.cost(model, trace).ideal_speedup
        ratio = interleaved_ratio(
            decode(base, ids, arguments.new_tokens), fast, arguments.pairs, 1, CLOCKS[arguments.clock]
        )
        mmskip.remove_(model)
        share = {"promised": round(promise.speedup, 4), "share_of_promise": round(ratio.median / promise.speedup, 4)}
        return {**summary(ratio, ideal), **share, "report": str(promise)}

    chosen = {"half": LayerPlanConfig(drop=range(1, layers, 2))}
    # in both phases: the few tokens of the prompt would be run by all blocks otherwise, and be timed with the others
    chosen |= {f"balanced {asked}": LayerPlanConfig.unified(asked, "balanced", phase="both") for asked in (1.5, 2.0)}
    for name, plan in chosen.items():
        kept.once(name, lambda p=plan: measure(p), timed_part("half_dropped", arguments))
    return {"width": width, "layers": layers, "prompt": 2, "new_tokens": arguments.new_tokens}


def measured(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One model in the parts asked for."""
    kept = Kept(folder / f"depth_{name}{'_tiny' * arguments.tiny}.json")
    if not {"quality", "speed", "speculate"} & set(arguments.part):
        return kept.values
    model, tokenizer = load(name, arguments.tiny)
    found = texts(name, tokenizer)
    if "table" not in kept.values:
        kept.put({"table": importance_of(model, found["calibrate"]).to_dict()})
    table = ImportanceTable.from_dict(kept.values["table"])
    base = load(name, arguments.tiny)[0]
    if "quality" in arguments.part:
        for kind in GREEDY:
            kept.once(kind, lambda k=kind: greedy_of(model, found["calibrate"], k), "greedy")
        quality(kept, model, found, table)
        rows = kept.values["quality"]
        for name, drawn in (("random", "random {drop} seed"), ("inner_random", "random inner {drop} seed")):
            compared = {**guided(rows, "llm_drop", drawn), **guided(rows, "greedy", drawn)}
            kept.put({f"drops_guided_against_{name}": compared})
        kept.put({"bits_guided_against_random": guided(rows, "bits", "{bits} random seed")})
    if "speed" in arguments.part:
        speed(kept, model, base, found, table, arguments)
    if "speculate" in arguments.part:
        speculate(kept, model, base, found, table, arguments)
    return kept.values


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--tiny", action="store_true", help="a quick try of everything; its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.pairs, arguments.new_tokens = 2, 4
    end = "_tiny" * arguments.tiny
    models = {}
    if set(arguments.part) != {"half"}:
        models = {name: measured(name, arguments, arguments.out) for name in arguments.model}
    if "draw" in arguments.part:
        timed = {n: v for n, v in models.items() if "speed" in v or "speed_cpu" in v}
        if timed:
            picture(timed, arguments.out / f"depth{end}.png")
        bits_picture(models, arguments.out / f"depth_bits{end}.png")
    kept = Kept(arguments.out / f"depth{end}.json")
    if "half" in arguments.part:
        kept.put({"shape": half_dropped(arguments, kept)})
    rows = kept.values.get("half_dropped") or kept.values.get("half_dropped_cpu")
    if rows:
        half = rows["half"]
        own = {"name": "depth", "speedup": half["speedup"], "ideal": half["ideal"]}
        where = ("environment", "device") if "half" in arguments.part else ()  # of the run that timed it
        rest = {key: value for key, value in kept.values.items() if key not in where}
        emit({**rest, **own}, kept.path)


if __name__ == "__main__":
    main()
