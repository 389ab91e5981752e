"""`mmskip search cola`: for each sample, the paths of layers that answer it, by tree search.

The search knows the right answer of each sample: its result is an ORACLE, a bound on what skipping and repeating layers
could give, not a method that could be deployed.

Shape suffixes: T tokens, V vocabulary.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmskip
from mmskip.calibration import layer_paths as paths
from mmskip.methods.layer_plan import LayerPlanConfig
from mmskip.utils.results import ResumableResults
from mmskip.viz.figure import save_png, subplots

ORACLE = "oracle: each path was chosen with the answer known; a bound, not a method"


@dataclass(frozen=True)
class Sample:
    """A prompt and its right answer, as token ids; with `choices`, the answer is `choices[right]`."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    right: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the search."""
    defaults = paths.PathSettings()
    parser.add_argument("--model", required=True, help="folder of a transformers language model with its tokenizer")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--samples",
        type=Path,
        metavar="JSONL",
        help='lines {"prompt": ..., "answer": ...}, or {"prompt": ..., "choices": [...], "answer": index}',
    )
    given.add_argument("--text", type=Path, help="a text file: its windows, the last tokens of each being the answer")
    parser.add_argument("--window", type=int, default=64, help="tokens per window of --text (default 64)")
    parser.add_argument("--answer_tokens", type=int, default=8, help="of each window of --text (default 8)")
    parser.add_argument("--limit", type=int, default=50, help="samples (default 50)")
    parser.add_argument("--actions", choices=paths.ACTIONS, default=defaults.actions)
    parser.add_argument("--simulations", type=int, default=defaults.simulations, help="paths per sample (default 200)")
    parser.add_argument("--length_weight", type=float, default=defaults.length_weight, help="lambda (default 5)")
    parser.add_argument("--curiosity", type=float, default=defaults.curiosity, help="c (default 1.41)")
    parser.add_argument("--explore", type=float, default=defaults.explore, help="chance of untried (default 0.1)")
    parser.add_argument(
        "--longest", type=float, default=defaults.longest, help="of a path, in multiples of the model (default 2)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("cola"), help="folder of the results (default cola)")


def run(arguments: argparse.Namespace) -> int:
    """Search, print, write; resumes where its file stops."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = paths.PathSettings(
        **{name: getattr(arguments, name) for name in paths.PathSettings.__dataclass_fields__}
    )
    for path in (Path(arguments.model), arguments.samples or arguments.text):
        if not path.exists():
            raise ValueError(f"{path} does not exist.")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, local_files_only=True)
    model = model.to(arguments.device).eval()
    samples = _samples(arguments, tokenizer)
    depends_on = {
        "model": arguments.model,
        "data": str(arguments.samples or arguments.text),
        "samples": hashlib.sha256(json.dumps([asdict(sample) for sample in samples]).encode()).hexdigest(),
        "seed": arguments.seed,
        **asdict(settings),
    }
    if arguments.samples is None:
        depends_on |= {"window": arguments.window, "answer_tokens": arguments.answer_tokens}
    results = ResumableResults(arguments.out / "cola.json", depends_on, "give another --out, or remove it")
    rows = search_samples(model, samples[: arguments.limit], settings, arguments.seed, results)[: arguments.limit]
    means = summary(rows, layers_of(model))
    results.put({"summary": means})
    picture(rows, layers_of(model), arguments.out / "cola.png")
    print(f"{ORACLE}\n{report(means)}\nwritten to {arguments.out}")
    return 0


def layers_of(model: Any) -> int:
    """Blocks of the model."""
    return len(mmskip.families.find(model, ("decoder",)).blocks)


def _samples(arguments: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    from mmskip.train.evaluation.language_model.perplexity import text_windows

    if arguments.samples is not None:
        return read_samples(arguments.samples, tokenizer)
    if not 1 <= arguments.answer_tokens < arguments.window:
        raise ValueError(
            f"--answer_tokens is {arguments.answer_tokens}; expected 1 to {arguments.window - 1}, below --window."
        )
    windows = text_windows(tokenizer, arguments.text.read_text(encoding="utf-8"), arguments.window)
    cut = arguments.window - arguments.answer_tokens
    ids = [tuple(window.tolist()) for window in windows if len(window) == arguments.window]
    if not ids:
        raise ValueError(f"{arguments.text} does not fill a window of {arguments.window} tokens.")
    return [Sample(row[:cut], (row[cut:],)) for row in ids]


def read_samples(file: Path, tokenizer: Any) -> list[Sample]:
    """Samples of a JSONL file.

    Raises:
        ValueError: a line that is no sample.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            choices = values.get("choices", [values["answer"]])
            right = int(values["answer"]) if "choices" in values else 0
            prompt = tokenizer(values["prompt"]).input_ids
            ids = [tokenizer(choice, add_special_tokens=False).input_ids for choice in choices]
        except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}, line {number} is no sample ({error!r}).") from error
        if not prompt or not all(ids) or not 0 <= right < len(ids):
            raise ValueError(
                f"{file}, line {number}: prompt, answer and choices must hold tokens, answer name a choice."
            )
        found.append(Sample(tuple(prompt), tuple(map(tuple, ids)), right))
    if not found:
        raise ValueError(f"{file} holds no samples.")
    return found


@torch.no_grad()
def reward_of(model: Any, sample: Sample) -> float:
    """Reward of a model's answer: with choices, 1 if the right one is the likeliest per token, else 0; without, the
    geometric mean of the probabilities of the answer's tokens."""
    means = [_mean_log_prob(model, sample.prompt, choice) for choice in sample.choices]
    if len(means) == 1:
        return math.exp(means[0])
    return float(max(range(len(means)), key=means.__getitem__) == sample.right)


def _mean_log_prob(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    ids_T = torch.tensor([*prompt, *answer], device=model.device)
    logits_TV: Tensor = model(input_ids=ids_T[None, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float()
    return float(logits_TV.log_softmax(-1).gather(1, ids_T[len(prompt) :, None]).mean())


def path_reward(model: Any, sample: Sample, path: paths.LayerPath) -> float | None:
    """The reward of a model that runs a path; None where it cannot. The model is then as it was."""
    try:
        mmskip.apply_(model, LayerPlanConfig.cola(path))
    except ValueError:
        return None
    try:
        return reward_of(model, sample)
    finally:
        mmskip.remove_(model)


def search_samples(
    model: Any, samples: Sequence[Sample], settings: paths.PathSettings, seed: int, results: ResumableResults
) -> list[dict[str, Any]]:
    """Search each sample that `results` does not hold yet; they are written after each.

    Returns:
        All rows of the results, which may be more than the samples.
    """
    rows, layers = list(results.values.get("samples", [])), layers_of(model)
    for number, sample in enumerate(samples[len(rows) :], len(rows)):
        found = paths.search_paths(
            lambda path, sample=sample: path_reward(model, sample, path),  # type: ignore[misc]
            layers,
            settings,
            seed * 1_000_003 + number,
        )
        dense = reward_of(model, sample)
        rows.append({"dense": dense, "pareto": [scored.to_dict() for scored in found]})
        results.put({"label": ORACLE, "samples": rows, "summary": None})
        best = found[-1]
        print(
            f"sample {number}: {dense:.3f} with all {layers} layers, {best.reward:.3f} with {best.length}", flush=True
        )
    return rows


def summary(rows: Sequence[dict[str, Any]], layers: int) -> dict[str, Any]:
    """Means over the samples.

    Returns:
        `samples`; `dense`: reward of the full model; `oracle`: of the best path of each sample; `oracle_length`: its
        length as a share of the model; `as_good_length`: that of the shortest path as good as the full model;
        `shorter`: share of the samples for which that one is shorter than the model.
    """
    found = [[paths.Scored(tuple(item["path"]), item["reward"]) for item in row["pareto"]] for row in rows]
    as_good = [paths.shortest_as_good(p, row["dense"] - 1e-6) for p, row in zip(found, rows, strict=True)]
    lengths = [layers if path is None else path.length for path in as_good]
    count = len(rows)
    return {
        "samples": count,
        "dense": sum(row["dense"] for row in rows) / count,
        "oracle": sum(p[-1].reward for p in found) / count,
        "oracle_length": sum(p[-1].length for p in found) / count / layers,
        "as_good_length": sum(lengths) / count / layers,
        "shorter": sum(length < layers for length in lengths) / count,
    }


def report(means: dict[str, Any]) -> str:
    """Describe the summary."""
    return (
        f"{means['samples']} samples: reward {means['dense']:.3f} with all layers, {means['oracle']:.3f} with the best "
        f"path of each ({means['oracle_length']:.0%} of the layers); {means['shorter']:.0%} have a shorter path as "
        f"good as the model, {means['as_good_length']:.0%} of the layers on average"
    )


def picture(rows: Sequence[dict[str, Any]], layers: int, path: Path) -> None:
    """The mean of the best reward within a length, against that length, beside the full model."""
    lengths = sorted({item["length"] for row in rows for item in row["pareto"]} | {layers})
    means = []
    for length in lengths:
        best = [max((i["reward"] for i in row["pareto"] if i["length"] <= length), default=0.0) for row in rows]
        means.append(sum(best) / len(rows))
    figure, axes = subplots(1, 1, 6.5, 4.2)
    axis = axes[0, 0]
    axis.plot(lengths, means, "o-", ms=3.5, label="best path per sample (oracle)")
    axis.plot([layers], [sum(row["dense"] for row in rows) / len(rows)], "k*", ms=12, label="the full model")
    axis.set(xlabel="layers run, at most", ylabel="mean reward", title="the answer was known: a bound, not a method")
    axis.grid(alpha=0.3)
    axis.legend()
    save_png(figure, path, dpi=None)
