"""Models, texts and named policies of the depth benchmark."""

import random
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

import mmskip
from mmskip import LACConfig, LayerBitsConfig, LayerPlanConfig, SelfSpeculationConfig
from mmskip.calibration import Drop, drop_order, ffn_threshold, plan_of
from mmskip.methods.layer_plan import KINDS
from mmskip.train.evaluation.language_model.perplexity import text_windows
from prepare.deep_lm import DATA, TEXTS, folder_of, parts

MODELS = {
    "stories260K": DATA / "stories260K",
    "deep_plain": folder_of("plain"),
    "deep_skipped": folder_of("skipped"),
}
RANDOM_SEEDS = 20
"""Random plans of every size."""
RANDOM_BITS = 10
"""Number of random assignments for every average."""
GREEDY = ("block", "attn", "mlp")
MOST_WINDOWS = 12
"""Most windows taken from each text."""
BITS = ((8, 3), (4, 2))
"""High and low bits of the assignments."""
Configs = dict[str, Callable[[], Any]]


def load(name: str, tiny: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer; with `tiny` a random model of the same form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if tiny:
        torch.manual_seed(0)
        shape = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**shape, **heads)).eval(), None
    folder = MODELS[name]
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there; python benchmarks/prepare/deep_lm.py makes the deeper models.")
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def texts(name: str, tokenizer: Any) -> dict[str, dict[str, list[torch.Tensor]]]:
    """Windows of 256 tokens to `calibrate` on, and by text to `report` on: none of a report text calibrated anything,
    and the deeper models were not trained on it."""
    if tokenizer is None:
        source = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, 512, (40,), generator=source) for _ in range(4)]
        return {"calibrate": {"random": rows[:2]}, "report": {"random": rows[2:]}}
    unseen = (DATA / "text" / "tinystories_valid_5stories.txt").read_text(encoding="utf-8").replace("<|endoftext|>", "")
    known = TEXTS if name.startswith("deep") else TEXTS[:1]
    report = {"unseen stories": unseen, **{text: parts(text)["report"] for text in known}}
    windows = {key: text_windows(tokenizer, text, 256)[:MOST_WINDOWS] for key, text in report.items()}
    calibrate = {text: text_windows(tokenizer, parts(text)["choose"], 256)[:MOST_WINDOWS] for text in known}
    return {"calibrate": calibrate, "report": windows}


def sizes(layers: int) -> list[int]:
    """Count the blocks, attentions or MLPs that are dropped."""
    return list(range(1, layers // 2 + 2)) if layers < 8 else [2, 4, 6, 8]


def plans(table: Any, chosen: dict[str, list[list[Any]]]) -> Configs:
    """Static plans: by importance, by greedy choices (of `greedy_of`), at random, evenly spaced, LAC's.

    Random plans are drawn twice: among all parts (the first block is never dropped entirely), and among those of the
    inner blocks, which is what anyone would do who knows no more than that the first and the last block matter.
    """
    count = table.layers
    found: Configs = {}
    for n in sizes(count):
        for kind in KINDS:
            found[f"llm_drop {kind} {n}"] = lambda n=n, kind=kind: LayerPlanConfig.llm_drop(table, n, kind)
        for kind, order in chosen.items():
            drops = [Drop(*one) for one in order[:n]]
            found[f"greedy {kind} {n}"] = lambda d=drops: plan_of(d)
        for seed in range(RANDOM_SEEDS):
            found[f"random block {n} seed {seed}"] = lambda n=n, seed=seed: LayerPlanConfig.random(n, seed)
            for kind in GREEDY:
                place = "drop" if kind == "block" else f"drop_{kind}"
                for label, among in (("random", range(count)), ("random inner", range(1, count - 1))):
                    drawn = tuple(random.Random(seed).sample(among, min(n, len(among))))
                    if (label, kind) != ("random", "block") and len(drawn) == n:
                        found[f"{label} {kind} {n} seed {seed}"] = lambda p=place, d=drawn: LayerPlanConfig(**{p: d})
    for speedup in (1.25, 1.5, 2.0):
        found[f"unified balanced {speedup}"] = lambda s=speedup: LayerPlanConfig.unified(s, "balanced")
        found[f"unified released {speedup}"] = lambda s=speedup: LayerPlanConfig.unified(s)
    found["lac static"] = lambda: LayerPlanConfig.lac(table)
    return found


def greedy_of(model: Any, calibrate: dict[str, list[torch.Tensor]], kind: str) -> list[list[Any]]:
    """Greedy choices on the calibration texts, as many as the largest plan needs: part, block, loss."""
    windows = [window for part in calibrate.values() for window in part if len(window) == len(part[0])]
    batches = torch.stack(windows[:: len(calibrate)]).split(8)
    most = max(sizes(len(model.get_decoder().layers)))
    return [list(astuple(drop)) for drop in drop_order(model, batches, most, kind)]


def token_policies(model: Any, windows: list[torch.Tensor]) -> Configs:
    """Policies that decide token by token."""
    batches = [window[None] for window in windows]
    found: Configs = {"lac per token": LACConfig}
    for share in (0.15, 0.3):
        found[f"ffn_skip {share}"] = lambda share=share: ffn_threshold(model, batches, share)
    return found


def bit_widths(table: Any) -> Configs:
    """Bits by every column, and at random, at equal averages."""
    found: Configs = {}
    for high, low in BITS:
        for share in (0.25, 0.5, 0.75):
            average = low + round(share * table.layers) / table.layers * (high - low)
            name = f"bits {high}/{low} average {average:.2f}"
            for column in table.columns:
                found[f"{name} {column}"] = lambda c=column, a=average, h=high, b=low: LayerBitsConfig.by_importance(
                    table, c, a, h, b
                )
            for seed in range(RANDOM_BITS):
                found[f"{name} random seed {seed}"] = lambda s=seed, a=average, h=high, b=low: LayerBitsConfig.random(
                    table.layers, a, h, b, s
                )
    return found


def speculations(table: Any) -> dict[str, SelfSpeculationConfig]:
    """Ways to draft, from which the calibration texts choose one of each kind."""
    count = table.layers
    found = {}
    for keep in sorted({0, count // 4, count // 2}):
        inner = [i for i in table.ranking("drop_block") if i not in (0, count - 1)]
        out = tuple(sorted(inner[: max(1, len(inner) - keep)]))
        for stop in (0.2, 0.5, 0.8):
            for branches in (0, 2):
                own = {"stop_below": stop, "branches": branches, "draft_tokens": 8}
                kind = "tree" if branches else "static"
                found[f"{kind} without {len(out)} stop {stop}"] = SelfSpeculationConfig(out, out, **own)
    for after in sorted({max(1, count // 6), max(2, count // 3), max(3, count // 2)}):
        for stop in (0.2, 0.5, 0.8):
            found[f"exit after {after} stop {stop}"] = SelfSpeculationConfig(
                exit_after=after, stop_below=stop, draft_tokens=8
            )
    for share in (0.45, 0.9):
        found[f"swift {share}"] = SelfSpeculationConfig(
            skip_share=share, search="random", stop_below=0.2, draft_tokens=8, window=16, max_trials=30, enough=0.9
        )
    return found


def importance_of(model: Any, calibrate: dict[str, list[torch.Tensor]]) -> Any:
    """The table of the calibration texts."""
    return mmskip.importance(model, [window[None] for windows in calibrate.values() for window in windows])
