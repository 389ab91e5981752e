"""Measurements of the benchmarks: paired timing, activation bytes, the machine, and the result line."""

import json
import os
import platform
import subprocess
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.env import device_name, package_versions
from mmskip.utils.command import quiet_imports
from mmskip.utils.files import write_text
from mmskip.utils.timing import Ratio, interleaved_ratio

__all__ = [
    "LLAMA_8B",
    "RESULTS",
    "ROOT",
    "Decoder",
    "Ratio",
    "emit",
    "environment",
    "interleaved_ratio",
    "saved_activation_bytes",
    "summary",
]

quiet_imports()

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
REQUIRED = ("name", "speedup", "ideal", "device", "shape")


@dataclass(frozen=True)
class Decoder:
    """The shape of a Llama from scratch."""

    layers: int = 8
    width: int = 512
    ffn: int = 1376
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 1000
    dtype: str = "float32"

    def settings(self, positions: int) -> dict[str, int]:
        """Arguments of a `LlamaConfig` for `positions` positions."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": positions,
        }


LLAMA_8B = Decoder(32, 4096, 14336, 32, 8, 128256, "bfloat16")


def summary(ratio: Ratio, ideal: float) -> dict[str, Any]:
    """A measured ratio beside the counted ideal, as it stands in the result files; seconds are medians of one run."""
    return {
        "speedup": round(ratio.median, 4),
        "interquartile": [round(ratio.q1, 4), round(ratio.q3, 4)],
        "ideal": round(ideal, 4),
        "share_of_ideal": round(ratio.median / ideal, 4),
        "dense_s": round(ratio.base_s, 5),
        "seconds": round(ratio.fn_s, 5),
        "pairs": ratio.pairs,
    }


def saved_activation_bytes(fn: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Largest number of bytes that autograd holds for backward at one time while `fn` runs.

    Counts each storage once, however many operations saved it or a view of it, and counts it out when the last
    of them lets go. Parameters are left out. What an operation holds without saving a tensor (inputs of a
    checkpointed function) is not seen.

    Args:
        fn: a forward pass, or a forward and backward pass.
        exclude: further tensors to ignore, such as the inputs of the model.

    Returns:
        Bytes.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    holders: Counter[int] = Counter()
    held = peak = 0

    def release(pointer: int, size: int) -> None:
        nonlocal held
        holders[pointer] -= 1
        if not holders[pointer]:
            held -= size

    def pack(tensor: Tensor) -> "_Saved":
        nonlocal held, peak
        saved = _Saved(tensor.detach())
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in excluded or isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return saved
        holders[pointer] += 1
        if holders[pointer] == 1:
            held += size
            peak = max(peak, held)
        weakref.finalize(saved, release, pointer, size)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        fn()
    return peak


class _Saved:
    """Owner of a saved tensor whose end shows that autograd no longer needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def environment() -> dict[str, Any]:
    """The machine and the code a number was measured on.

    Returns:
        `device`, `cpu_count`, `threads`, `python`, versions of torch, transformers and xformers, the git `commit`
        (None outside a repository) and `dirty` (tracked files differ from it, results aside).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "device": device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **package_versions(("torch", "transformers", "xformers")),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def _git(*args: str) -> str | None:
    try:
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def emit(result: dict[str, Any], out: Path | str | None = None) -> Path:
    """Write a result as JSON and print it as one line, which must be the last a benchmark prints.

    `device` and `environment` are filled in where missing.

    Args:
        result: at least `name`, `speedup` (measured), `ideal` (counted) and `shape`; no NaN.
        out: the file; None: `benchmarks/results/<name>.json`.

    Returns:
        The file written.

    Raises:
        ValueError: a key is missing or a number is not finite; nothing is written then.
    """
    where = environment()
    result = {"device": where["device"], "environment": where, **result}
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise ValueError(f"the result lacks {missing}; expected at least {list(REQUIRED)}")
    pretty, line = (json.dumps(result, indent=indent, allow_nan=False) for indent in (2, None))
    path = RESULTS / f"{result['name']}.json" if out is None else Path(out)
    write_text(pretty + "\n", path)
    print(line, flush=True)
    return path
