"""`evaluate.py lm`: a language model with and without a method: perplexity on text files, greedy agreement, the times
of prompt and decoding apart, and scores on tasks of lm-evaluation-harness; times of transformers' own ways of decoding
sooner.

Shape suffixes: B windows, T tokens.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import mmskip
from mmskip import families
from mmskip.hf.plans.block import decode_from
from mmskip.saving import CONFIG_FILE
from mmskip.utils.files import write_json
from mmskip.utils.pretrained import pretrained

BESIDE = "The tokenizer has to lie beside the weights: tokenizer.save_pretrained(folder)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the command."""
    parser.add_argument("--model", required=True, help="folder of a transformers language model with its tokenizer")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="text files")
    parser.add_argument("--adapter", type=Path, help="folder written by mmskip.save; without it the model alone")
    parser.add_argument("--window", type=int, default=512, help="tokens per window, the begin token among them")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward")
    parser.add_argument("--limit", type=int, help="characters of each file")
    parser.add_argument(
        "--prompt", type=int, default=1, help="tokens of a window that count as prompt for methods that only decode"
    )
    parser.add_argument("--continuations", type=int, default=8, help="prompts continued greedily; 0: none")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of each continuation")
    parser.add_argument("--prompt_lookup", type=int, metavar="N", help="time prompt lookup of N tokens, a baseline")
    parser.add_argument(
        "--assistant_early_exit", type=int, metavar="N", help="time assisted decoding by the first N layers, a baseline"
    )
    parser.add_argument("--tasks", nargs="+", default=[], help="tasks of lm-evaluation-harness (extra lm-eval)")
    parser.add_argument("--task_path", type=Path, help="folder of further tasks as YAML files")
    parser.add_argument("--task_limit", type=int, help="samples of each task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file of the results")


def text_windows(tokenizer: Any, text: str, window: int) -> list[Tensor]:
    """Token ids of a text in windows of the begin token and `window - 1` tokens; the last may be shorter.

    Raises:
        ValueError: the tokenizer has no begin token, or the text is empty.
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("the tokenizer has no begin token, which every window starts with.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        raise ValueError("the text is empty.")
    step = window - 1
    return [torch.tensor([tokenizer.bos_token_id, *ids[i : i + step]]) for i in range(0, len(ids), step)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def perplexity(model: Any, windows: Sequence[Tensor], batch: int = 8, prompt: int = 1) -> tuple[float, int]:
    """Perplexity per token over windows, and how many tokens were predicted.

    Args:
        prompt: tokens of each window that are prompt to a plan of the decoding phase; the others count as decoded.
    """
    root = families.find(model).root
    total, count = 0.0, 0
    with _evaluating(model), decode_from(root, prompt):
        for ids_BT in _batches(windows, batch):
            ids_BT = ids_BT.to(model.device)
            logits = model(ids_BT, use_cache=False).logits[:, :-1].float()
            total += float(cross_entropy(logits.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum"))
            count += ids_BT[:, 1:].numel()
    return math.exp(total / count), count


def _batches(windows: Sequence[Tensor], batch: int) -> Iterator[Tensor]:
    """Windows of one length stacked, in order of their lengths."""
    for length in sorted({len(window) for window in windows}):
        same = [window for window in windows if len(window) == length]
        for start in range(0, len(same), batch):
            yield torch.stack(same[start : start + batch])


def continuations(model: Any, prompts_BT: Tensor, new_tokens: int, **extra: Any) -> Tensor:
    """Greedy continuations [B, new_tokens]; `extra` goes to `generate`."""
    with _evaluating(model):
        found: Tensor = model.generate(
            prompts_BT.to(model.device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
    return found[:, prompts_BT.shape[1] :].cpu()


def agreement(one_BT: Tensor, other_BT: Tensor) -> dict[str, float]:
    """Share of the rows that are equal, and the mean share of tokens before the first difference."""
    same_BT = one_BT == other_BT
    before_B = same_BT.long().cumprod(1).sum(1).float() / same_BT.shape[1]
    return {"rows_equal": float(same_BT.all(1).float().mean()), "tokens_before_difference": float(before_B.mean())}


def timings(model: Any, prompt_1T: Tensor, new_tokens: int, repeats: int = 5, **extra: Any) -> dict[str, float]:
    """Median seconds of the prompt alone (one new token) and of each further token of `generate`, to which `extra`
    goes."""
    prompt_s, token_s = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        continuations(model, prompt_1T, 1, **extra)
        middle = time.perf_counter()
        continuations(model, prompt_1T, new_tokens, **extra)
        end = time.perf_counter()
        prompt_s.append(middle - start)
        token_s.append((end - middle - (middle - start)) / (new_tokens - 1))
    return {"prompt_s": statistics.median(prompt_s), "token_s": statistics.median(token_s)}


def baselines(model: Any, prompt_1T: Tensor, new_tokens: int, settings: Mapping[str, int]) -> dict[str, Any]:
    """Times of transformers' own ways of decoding sooner, and whether their tokens are those of plain decoding.

    Args:
        settings: of `generate`, one a baseline, such as `{"prompt_lookup_num_tokens": 4}`.

    Returns:
        By setting: `seconds` as of `timings`, `equal`; or `refused`, the reason of transformers.
    """
    found: dict[str, Any] = {}
    plain = continuations(model, prompt_1T, new_tokens)
    for name, value in settings.items():
        try:
            equal = torch.equal(continuations(model, prompt_1T, new_tokens, **{name: value}), plain)
            seconds = timings(model, prompt_1T, new_tokens, **{name: value})
        except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
            found[name] = {"refused": f"{type(error).__name__}: {error}"}
            continue
        found[name] = {"value": value, "equal": equal, "seconds": seconds}
    return found


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; 0: done."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check(arguments)
    tokenizer = pretrained("--model", str(arguments.model), AutoTokenizer.from_pretrained, BESIDE)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, local_files_only=True).to(arguments.device)
    windows = {
        str(path): text_windows(tokenizer, path.read_text(encoding="utf-8")[: arguments.limit], arguments.window)
        for path in arguments.text
    }
    tasks = _tasks(tokenizer, arguments)
    results: dict[str, Any] = {"model": arguments.model, "dense": _measure(model, windows, arguments)}
    results["dense"] |= tasks(model)
    given = {
        "prompt_lookup_num_tokens": arguments.prompt_lookup,
        "assistant_early_exit": arguments.assistant_early_exit,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given:
        prompt_1T = next(iter(windows.values()))[0][None, : arguments.window // 2]
        results["baselines"] = baselines(model, prompt_1T, arguments.new_tokens, given)
    if arguments.adapter is not None:
        mmskip.load_(model, arguments.adapter)
        results["methods"] = [repr(config) for config in mmskip.applied(model)]
        results["changed"] = {**_measure(model, windows, arguments), **tasks(model)}
        ids = (
            [torch.tensor(results[name].pop("ids")) for name in ("dense", "changed")] if arguments.continuations else []
        )
        if ids:
            results["agreement"] = agreement(*ids)
    results["dense"].pop("ids", None)
    _print(results)
    if arguments.out is not None:
        write_json(results, arguments.out)
    return 0


def _tasks(tokenizer: Any, arguments: argparse.Namespace) -> Callable[[Any], dict[str, Any]]:
    """Make a function that scores a model on the tasks asked for; tasks are looked up at once."""
    if not arguments.tasks:
        return lambda model: {}
    from mmskip.train.evaluation.language_model.tasks import harness, task_manager, task_scores

    harness()
    manager = task_manager(arguments.tasks, arguments.task_path)

    def scored(model: Any) -> dict[str, Any]:
        with _evaluating(model):
            scores = task_scores(model, tokenizer, arguments.tasks, manager, arguments.task_limit, arguments.batch)
        return {"tasks": scores}

    return scored


def _check(arguments: argparse.Namespace) -> None:
    further = [path for path in (arguments.adapter, arguments.task_path) if path is not None]
    for path in (Path(arguments.model), *arguments.text, *further):
        if not path.exists():
            raise ValueError(f"{path} does not exist.")
    if arguments.adapter is not None and not (arguments.adapter / CONFIG_FILE).is_file():
        raise ValueError(f"--adapter {arguments.adapter} holds no {CONFIG_FILE}; expected a folder of mmskip.save.")
    for name, least in (
        ("window", 2),
        ("batch", 1),
        ("prompt", 1),
        ("continuations", 0),
        ("new_tokens", 2),
        ("prompt_lookup", 1),
        ("assistant_early_exit", 1),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}.")


def _measure(model: Any, windows: dict[str, list[Tensor]], arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"perplexity": {}}
    for name, parts in windows.items():
        value, tokens = perplexity(model, parts, arguments.batch, arguments.prompt)
        found["perplexity"][name] = {"perplexity": value, "tokens": tokens}
    if arguments.continuations:
        length = min(arguments.window // 2, *(len(w) for parts in windows.values() for w in parts[:1]))
        prompts = [window[:length] for parts in windows.values() for window in parts if len(window) >= length]
        prompts_BT = torch.stack(prompts[: arguments.continuations])
        found["ids"] = continuations(model, prompts_BT, arguments.new_tokens).tolist()
        found["seconds"] = timings(model, prompts_BT[:1], arguments.new_tokens)
    return found


def _print(results: dict[str, Any]) -> None:
    for name in ("dense", "changed"):
        for path, found in results.get(name, {}).get("perplexity", {}).items():
            print(f"{name:8} {path}: perplexity {found['perplexity']:.4f} over {found['tokens']} tokens")
        for task, scores in results.get(name, {}).get("tasks", {}).items():
            print(f"{name:8} {task}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items()))
        if "seconds" in results.get(name, {}):
            times = results[name]["seconds"]
            print(
                f"{name:8} prompt {times['prompt_s'] * 1e3:.2f} ms, each decoded token {times['token_s'] * 1e3:.3f} ms"
            )
    for name, entry in results.get("baselines", {}).items():
        if "refused" in entry:
            print(f"{name}: does not run here: {entry['refused']}")
        else:
            same = "the same tokens" if entry["equal"] else "OTHER tokens"
            print(f"{name} {entry['value']}: each decoded token {entry['seconds']['token_s'] * 1e3:.3f} ms, {same}")
    if "agreement" in results:
        agreed = results["agreement"]
        print(
            f"greedy continuations: {agreed['rows_equal']:.1%} equal, "
            f"{agreed['tokens_before_difference']:.1%} of the tokens before the first difference"
        )
