"""What every benchmark measures with: paired timing, activation bytes, the machine, and the result line."""

import gc
import json
import os
import platform
import statistics
import subprocess
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.env import device_name, package_versions
from mmskip.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REQUIRED = ("name", "speedup", "ideal", "device", "shape")


@dataclass(frozen=True)
class Ratio:
    """How many times faster `fn` is than `base_fn`.

    Attributes:
        median: median of the paired ratios base time / fn time; above 1 means `fn` is faster.
        q1: lower quartile of the ratios.
        q3: upper quartile of the ratios.
        base_s: median time of `base_fn` in seconds.
        fn_s: median time of `fn` in seconds.
        pairs: number of pairs.
    """

    median: float
    q1: float
    q3: float
    base_s: float
    fn_s: float
    pairs: int


def interleaved_ratio(
    base_fn: Callable[[], object], fn: Callable[[], object], pairs: int = 15, warmup: int = 2
) -> Ratio:
    """Time two functions in alternation, so that drift of the machine hits both alike.

    Each pair runs both once; the order changes from pair to pair. CUDA work is waited for. The garbage collector
    runs between the pairs, not inside them.

    Args:
        base_fn: the reference, for example one dense training step.
        fn: what is compared with it.
        pairs: number of pairs, at least 2.
        warmup: untimed runs of each function before.

    Raises:
        ValueError: fewer than 2 pairs.
    """
    if pairs < 2:
        raise ValueError(f"pairs is {pairs}; expected at least 2 (claims need 15)")
    for _ in range(warmup):
        base_fn()
        fn()
    base_times, times = [], []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for pair in range(pairs):
            gc.collect()
            first, second = (base_fn, fn) if pair % 2 == 0 else (fn, base_fn)
            elapsed = _seconds(first), _seconds(second)
            base_times.append(elapsed[pair % 2])
            times.append(elapsed[1 - pair % 2])
    finally:
        if collecting:
            gc.enable()
    q1, median, q3 = statistics.quantiles(
        [base / other for base, other in zip(base_times, times, strict=True)], n=4, method="inclusive"
    )
    return Ratio(median, q1, q3, statistics.median(base_times), statistics.median(times), pairs)


def _seconds(fn: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    fn()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def saved_activation_bytes(fn: Callable[[], object], exclude: Iterable[Tensor] = ()) -> int:
    """Largest number of bytes that autograd holds for backward at one time while `fn` runs.

    Counts each storage once, however many operations saved it or a view of it, and counts it out when the last
    of them lets go. Parameters are left out. What an operation holds without saving a tensor (inputs of a
    checkpointed function) is not seen.

    Args:
        fn: a forward pass, or a forward and backward pass.
        exclude: further tensors to leave out, such as the inputs of the model.

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
    """Owner of a saved tensor whose end tells that autograd no longer needs it."""

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
