"""`evaluate.py depth`: the work of each layer of a language model: contributions, effects of skipping, logit lens,
erasure, integrated gradients, and linear maps to another model; one JSON file and a picture of each.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmskip.train.evaluation.language_model import depth_figures as pictures
from mmskip.train.evaluation.language_model.perplexity import BESIDE, text_windows
from mmskip.train.metrics import depth as measure
from mmskip.utils.files import write_json
from mmskip.utils.pretrained import pretrained

PARTS = ("contributions", "effects", "lens", "erasure", "gradients", "maps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings of the command."""
    parser.add_argument("--model", required=True, help="folder of a transformers language model with its tokenizer")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="text files")
    parser.add_argument("--other", help="folder of a model with the same tokenizer, for linear maps to it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default all)")
    parser.add_argument("--window", type=int, default=128, help="tokens per window, the begin token among them")
    parser.add_argument("--windows", type=int, default=16, help="windows measured, the first ones of each text in turn")
    parser.add_argument("--map_windows", type=int, default=64, help="windows of the linear maps, a quarter held out")
    parser.add_argument("--batch", type=int, default=8, help="windows per forward")
    parser.add_argument("--prompt", help="text of erasure and gradients (default: start of the first text)")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="of it are used at most")
    parser.add_argument("--steps", type=int, default=256, help="of the integrated gradients")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("depth"), help="folder of the results")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; 0: done."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check(arguments)
    tokenizer = pretrained("--model", arguments.model, AutoTokenizer.from_pretrained, BESIDE)
    if arguments.other is not None and "maps" in arguments.parts:
        theirs = pretrained("--other", arguments.other, AutoTokenizer.from_pretrained, BESIDE)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{arguments.other} has another tokenizer than {arguments.model}; states cannot be paired."
            )
    model = _load(AutoModelForCausalLM, arguments.model, arguments.device)
    texts = [path.read_text(encoding="utf-8") for path in arguments.text]
    batches = batches_of(tokenizer, texts, arguments.windows, arguments)
    prompt_T = _prompt(tokenizer, texts[0], arguments).to(arguments.device)
    found: dict[str, Any] = {
        "model": arguments.model,
        "tokens": sum(ids.numel() for ids in batches),
        "prompt": [tokenizer.decode([token]) for token in prompt_T.tolist()],
    }
    for part in arguments.parts:
        if part == "maps":
            if arguments.other is None:
                continue
            other = _load(AutoModelForCausalLM, arguments.other, arguments.device)
            many = batches_of(tokenizer, texts, arguments.map_windows, arguments)
            found |= {"other": arguments.other, "maps": _maps(model, other, many)}
        else:
            found[part] = _measured(part, model, batches, prompt_T, arguments.steps)
        getattr(pictures, part)(found, arguments.out / f"{part}.png")
        print(f"{part}: {_summary(part, found[part])}", flush=True)
    write_json(found, arguments.out / "depth.json")
    print(f"written to {arguments.out}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for path in (arguments.model, *arguments.text, *([arguments.other] if arguments.other else [])):
        if not Path(path).exists():
            raise ValueError(f"{path} does not exist.")
    for name, least in (
        ("window", 2),
        ("windows", 1),
        ("map_windows", 1),
        ("batch", 1),
        ("prompt_tokens", 2),
        ("steps", 1),
    ):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; expected at least {least}.")
    if arguments.prompt is not None and not arguments.prompt.strip():
        raise ValueError(f"--prompt is {arguments.prompt!r}; expected text, or omit it: the first text begins it.")
    if arguments.parts == ["maps"] and arguments.other is None:
        raise ValueError("linear maps lead to another model; give its folder as --other.")


def _load(auto: Any, folder: str, device: str) -> Any:
    return auto.from_pretrained(folder, local_files_only=True).to(device).eval()


def batches_of(tokenizer: Any, texts: list[str], count: int, arguments: argparse.Namespace) -> list[Tensor]:
    """Full windows of the texts in turn, `count` at most, in batches on the device.

    Raises:
        ValueError: no text has a full window.
    """
    each = [[w for w in text_windows(tokenizer, t, arguments.window) if len(w) == arguments.window] for t in texts]
    turns = [windows[i] for i in range(max(map(len, each))) for windows in each if i < len(windows)][:count]
    if not turns:
        raise ValueError(f"no text fills a window of {arguments.window} tokens; choose a smaller --window.")
    return [part.to(arguments.device) for part in torch.stack(turns).split(arguments.batch)]


def _prompt(tokenizer: Any, text: str, arguments: argparse.Namespace) -> Tensor:
    given = text if arguments.prompt is None else arguments.prompt
    return text_windows(tokenizer, given, arguments.prompt_tokens)[0]


def _measured(part: str, model: Any, batches: list[Tensor], prompt_T: Tensor, steps: int) -> Any:
    if part == "contributions":
        return measure.contributions(model, batches)
    if part == "effects":
        return {name: measure.skip_effects(model, batches, name == "future") for name in ("present", "future")}
    if part == "lens":
        return measure.logit_lens(model, batches)
    if part == "erasure":
        return measure.erasure(model, prompt_T, measure.mean_states(model, batches)).tolist()
    return measure.integrated_gradients(model, prompt_T, steps).tolist()


def _maps(model: Any, other: Any, batches: list[Tensor]) -> Any:
    return measure.linear_maps(measure.states(model, batches), measure.states(other, batches)).tolist()


def _summary(part: str, found: Any) -> str:
    """Summarize the result of a part in one line."""
    if part == "contributions":
        return "||a + m|| / ||x|| by block " + " ".join(f"{v:.2f}" for v in found["norm"]["block"])
    if part == "effects":
        return "largest change of the output by block skipped " + " ".join(
            f"{v:.2f}" for v in found["present"]["output"]
        )
    if part == "lens":
        return "KL to the final output after each block " + " ".join(f"{v:.2f}" for v in found["kl"])
    if part == "erasure":
        return "largest change of the last prediction by block " + " ".join(f"{max(row):.2f}" for row in found)
    if part == "gradients":
        return "nats given to the last prediction by block " + " ".join(f"{sum(row):+.2f}" for row in found)
    best = [min(range(len(row)), key=row.__getitem__) for row in found]
    return f"each depth of the model is nearest to depths {best} of the other"
