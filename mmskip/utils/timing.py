"""Paired timing of two functions in one process, as every measured speed-up is made."""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


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
    base_fn: Callable[[], object],
    fn: Callable[[], object],
    pairs: int = 15,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time two functions in alternation, so that drift of the machine hits both alike.

    Each pair runs both once; the order changes from pair to pair. CUDA work is waited for. The garbage collector
    runs between the pairs, not inside them.

    Args:
        base_fn: the reference, for example one dense training step.
        fn: what is compared with it.
        pairs: number of pairs, at least 2.
        warmup: untimed runs of each function before.
        clock: `time.process_time` counts the seconds this process computes, on machines with other work.

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
            elapsed = _seconds(first, clock), _seconds(second, clock)
            base_times.append(elapsed[pair % 2])
            times.append(elapsed[1 - pair % 2])
    finally:
        if collecting:
            gc.enable()
    q1, median, q3 = statistics.quantiles(
        [base / other for base, other in zip(base_times, times, strict=True)], n=4, method="inclusive"
    )
    return Ratio(median, q1, q3, statistics.median(base_times), statistics.median(times), pairs)


def paired_models(
    owner: Any,
    name: str,
    base: Any,
    other: Any,
    run: Callable[[], object],
    pairs: int = 15,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time a function with two models in turn in one place, which is then as it was.

    Args:
        owner: the object that holds the model.
        name: its attribute.
        base: the reference model.
        other: the model that is compared with it.
        run: uses `owner`.
        pairs: number of pairs, at least 2.
        clock: see `interleaved_ratio`.

    Raises:
        ValueError: fewer than 2 pairs.
    """
    before = getattr(owner, name)

    def with_model(model: Any) -> Callable[[], None]:
        def call() -> None:
            setattr(owner, name, model)
            run()

        return call

    try:
        return interleaved_ratio(with_model(base), with_model(other), pairs, clock=clock)
    finally:
        setattr(owner, name, before)


def sharing_copy(module: nn.Module) -> Any:
    """Copy a module that shares all its parameters and buffers with the copy."""
    weights = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, weights)


def _seconds(fn: Callable[[], object], clock: Callable[[], float]) -> float:
    _wait()
    start = clock()
    fn()
    _wait()
    return clock() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
