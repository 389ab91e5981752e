"""Choose thresholds with a statistical risk guarantee (Learn-then-Test, conformal risk control).

Settings are ordered from the safest (full depth) to the most aggressive. Each sample has, at each setting, a loss in
[0, `bound`] against the full model. Learn-then-Test guarantees that with probability 1 - delta over the calibration
samples the chosen setting's true mean loss is at most epsilon; conformal risk control guarantees it in the mean over
calibrations, for losses that grow along the order. Sources: Angelopoulos et al. 2021 (arXiv 2110.01052) and 2022
(arXiv 2208.02814); Schuster et al. 2022 (CALM). Several thresholds at once have no such order: it is found on separate
samples, along the settings that no other beats in both loss and cost, and tested on the rest (Pareto testing,
Laufer-Goldshtein et al. 2022, arXiv 2210.07913).
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmskip.config import check_number
from mmskip.registry import applied, apply_, remove_

METHODS = ("ltt", "bonferroni", "crc")


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        config: the chosen setting; None: not even the safest one keeps the guarantee.
        index: its place in the order, or None.
        risks: mean calibration loss of each setting that was tested, safest first.
        p_values: of each of them (empty for conformal risk control).
        samples: number of calibration samples.
        epsilon, delta, method: the guarantee; delta is None for conformal risk control. For a latency budget, `method`
            is "latency", `epsilon` the budget in seconds, and nothing is guaranteed about the loss.
        order: indices, in the configs given, of the settings that were tested, where calibration chose an order.
        costs: of each of these, on the samples of the order: seconds per batch, or the result of `cost`.
    """

    config: Any
    index: int | None
    risks: tuple[float, ...]
    p_values: tuple[float, ...]
    samples: int
    epsilon: float
    delta: float | None
    method: str
    order: tuple[int, ...] = ()
    costs: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.method == "latency":
            found = "no setting keeps it" if self.index is None else f"{self.config}, {self.costs[self.index]:.4g} s"
            return f"latency: at most {self.epsilon:g} s per batch from {self.samples} samples: {found}"
        promise = f"risk at most {self.epsilon:g}" + (
            "" if self.delta is None else f" with probability {1 - self.delta:g}"
        )
        chosen = (
            "no setting keeps it"
            if self.index is None
            else f"setting {self.index + 1}, risk {self.risks[self.index]:.4g}"
        )
        return f"{self.method}: {promise} from {self.samples} samples: {chosen}"


def p_value(risk: float, samples: int, epsilon: float) -> float:
    """Compute the Hoeffding-Bentkus p-value of "the true risk exceeds epsilon".

    Args:
        risk: mean loss of the samples, losses in [0, 1].
        samples: number of samples.
        epsilon: in (0, 1).
    """
    if risk >= epsilon:
        return 1.0
    hoeffding = math.exp(-samples * _divergence(risk, epsilon))
    # n times a mean of n losses can lie a rounding error above the integer that it is
    bentkus = math.e * _binomial_cdf(math.ceil(samples * risk - 1e-9), samples, epsilon)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Return the Kullback-Leibler divergence of two coins, in nats."""
    left = a * math.log(a / b) if a > 0 else 0.0
    right = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return left + right


def _binomial_cdf(count: int, samples: int, p: float) -> float:
    """Return the probability of at most `count` heads."""
    log_n = math.lgamma(samples + 1)
    terms = (
        math.exp(
            log_n - math.lgamma(k + 1) - math.lgamma(samples - k + 1) + k * math.log(p) + (samples - k) * math.log1p(-p)
        )
        for k in range(min(count, samples) + 1)
    )
    return min(1.0, math.fsum(terms))


def samples_needed(epsilon: float, delta: float | None, settings: int = 1, method: str = "ltt") -> int:
    """Return the fewest samples with which a setting without any loss passes (losses in [0, 1])."""
    if method == "crc":
        return math.ceil(1 / epsilon - 1 - 1e-9)
    assert delta is not None
    level = delta / settings if method == "bonferroni" else delta
    return math.ceil(math.log(level) / math.log1p(-epsilon) - 1e-9)


def choose(
    losses: Sequence[Sequence[float]],
    epsilon: float,
    delta: float | None = 0.05,
    method: str = "ltt",
    bound: float = 1.0,
) -> Calibration:
    """Choose among settings from their losses.

    Args:
        losses: per setting, safest first, one loss per calibration sample; the same samples for all.
        epsilon: largest mean loss allowed, in the losses' units.
        delta: allowed probability that the guarantee fails; None for `crc`.
        method: "ltt": test in order, stop at the first setting that fails, take the last that passed; "bonferroni":
            test all at delta / settings, take the most aggressive that passed; "crc": conformal risk control.
        bound: largest possible loss.

    Raises:
        ValueError: a value out of range, losses of different lengths or beyond [0, bound], or too few samples for the
            guarantee; the message has the number that it needs.
    """
    _check(epsilon, delta, method, bound)
    samples = _count(losses, bound)
    scaled = epsilon / bound
    needed = samples_needed(scaled, delta, len(losses), method)
    if samples < needed:
        promise = f"epsilon={epsilon:g}" + ("" if method == "crc" else f", delta={delta:g}")
        raise ValueError(
            f"{samples} calibration samples cannot support the guarantee {promise} over {len(losses)} settings by "
            f"{method!r}, even without any loss; it needs at least {needed} samples."
        )
    risks = tuple(math.fsum(row) / samples / bound for row in losses)
    p_values: tuple[float, ...] = ()
    if method == "crc":
        limit = (samples + 1) * scaled / samples - 1 / samples
        passed = [risk <= limit for risk in risks]
    else:
        assert delta is not None
        level = delta / len(losses) if method == "bonferroni" else delta
        p_values = tuple(p_value(risk, samples, scaled) for risk in risks)
        passed = [p <= level for p in p_values]
    good = [index for index, ok in enumerate(passed) if ok and (method == "bonferroni" or all(passed[:index]))]
    index = good[-1] if good else None
    given = None if method == "crc" else delta
    return Calibration(None, index, tuple(r * bound for r in risks), p_values, samples, epsilon, given, method)


def _check(epsilon: float, delta: float | None, method: str, bound: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if not 0 < bound < math.inf or not 0 < epsilon < bound:
        raise ValueError(f"epsilon is {epsilon!r} and bound {bound!r}; expected 0 < epsilon < bound.")
    if method != "crc" and (delta is None or not 0 < delta < 1):
        raise ValueError(f"delta is {delta!r}; expected a number between 0 and 1 for method {method!r}.")


def _count(losses: Sequence[Sequence[float]], bound: float) -> int:
    if not losses or not losses[0]:
        raise ValueError(
            "there are no losses (was data empty?); expected one row per setting with one loss per calibration sample."
        )
    if len({len(row) for row in losses}) > 1:
        raise ValueError("the settings have different numbers of losses; expected the same samples for all.")
    wrong = [value for row in losses for value in row if not 0 <= value <= bound]
    if wrong:
        raise ValueError(f"a loss is {wrong[0]!r}; expected all in [0, {bound:g}].")
    return len(losses[0])


def calibrate(
    model: torch.nn.Module,
    configs: Sequence[Any],
    data: Iterable[Any],
    risk: Callable[[torch.nn.Module, Any], Sequence[float]],
    epsilon: float | None = None,
    delta: float | None = 0.05,
    method: str = "ltt",
    bound: float = 1.0,
    scout: Iterable[Any] | None = None,
    cost: Callable[[torch.nn.Module, Any], float] | None = None,
    latency: float | None = None,
) -> Calibration:
    """Choose the most aggressive of several configs that keeps a guarantee about `risk`, or the one with the lowest
    loss within a latency budget.

    Args:
        model: in evaluation mode and without methods; it is restored afterwards.
        configs: safest first, for instance `EarlyExitConfig`s whose thresholds fall together; in any order with `scout`
            or `latency`, for instance `EarlyExitConfig.grid(...)` of coupled thresholds.
        data: batches that nothing was trained or tuned on; read once and held in memory, as those of `scout` are.
        risk: (model with the config applied, batch) -> a loss in [0, bound] per sample of the batch.
        epsilon, delta, method, bound: see `choose`; epsilon is None for a latency budget.
        scout: batches that are not in `data`, on which the order is found: by growing mean loss, along the configs that
            no other beats in both loss and cost.
        cost: (model that has just run the batch, batch) -> its cost; None: the seconds that `risk` took.
        latency: budget in seconds per batch, by the median time of `risk` over `data`.

    Returns:
        The report, with the chosen config.

    Raises:
        ValueError: as `choose` and `apply_`, both or neither of epsilon and latency, a model in training mode, or an
            empty scout; the model is restored then.
    """
    _check_call(model, configs, epsilon, latency)
    if latency is not None:
        return _within(model, configs, list(data), risk, latency)
    assert epsilon is not None
    _check(epsilon, delta, method, bound)
    order: tuple[int, ...] = tuple(range(len(configs)))
    costs: tuple[float, ...] = ()
    if scout is not None:
        order, costs = _pareto_order(model, configs, list(scout), risk, cost)
    batches = list(data)
    losses = [_run(model, configs[i], batches, risk, cost)[0] for i in order]
    found = choose(losses, epsilon, delta, method, bound)
    chosen = None if found.index is None else configs[order[found.index]]
    return replace(found, config=chosen, order=order if scout is not None else (), costs=costs)


def _check_call(model: torch.nn.Module, configs: Sequence[Any], epsilon: float | None, latency: float | None) -> None:
    """Raise ValueError for a call of `calibrate` that cannot be served."""
    if (epsilon is None) == (latency is None):
        raise ValueError(f"epsilon is {epsilon!r} and latency {latency!r}; expected one of them.")
    if not configs:
        raise ValueError("configs is empty; expected at least one, safest first.")
    present = applied(model)
    if present:
        raise ValueError(f"the model carries {present!r}; calibrate a model without methods, or remove_ them first.")
    if any(module.training for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is in training mode, in which methods run all layers or drop some at random, so "
            "that no loss says anything; call eval() on it first."
        )


def _pareto_order(
    model: torch.nn.Module, configs: Sequence[Any], batches: Sequence[Any], risk: Any, cost: Any
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Order the configs that no other beats in both loss and cost, by growing loss; return their indices and costs."""
    tried = [_run(model, config, batches, risk, cost) for config in configs] if batches else []
    if not tried or not all(losses for losses, _ in tried):
        raise ValueError("scout has no samples to find an order on; give batches that are not in data, or None.")
    order = _front([(math.fsum(losses) / len(losses), price) for losses, price in tried])
    return order, tuple(tried[i][1] for i in order)


def _within(
    model: torch.nn.Module, configs: Sequence[Any], batches: list[Any], risk: Any, latency: float
) -> Calibration:
    """Choose the config with the lowest loss among those within the budget."""
    check_number("latency", latency, 0, open_low=True)
    tried = [_run(model, config, batches, risk, None) for config in configs]
    samples = len(tried[0][0])
    if not samples:
        raise ValueError("data has no samples to measure on.")
    risks, times = [math.fsum(losses) / samples for losses, _ in tried], tuple(seconds for _, seconds in tried)
    able = [i for i, seconds in enumerate(times) if seconds <= latency]
    index = min(able, key=lambda i: (risks[i], times[i])) if able else None
    chosen, order = None if index is None else configs[index], tuple(range(len(configs)))
    return Calibration(chosen, index, tuple(risks), (), samples, latency, None, "latency", order, times)


def _run(
    model: torch.nn.Module, config: Any, batches: Sequence[Any], risk: Any, cost: Any
) -> tuple[list[float], float]:
    """Return the losses of all samples under a config, and the median cost of a batch."""
    losses: list[float] = []
    costs: list[float] = []
    apply_(model, config)
    try:
        with torch.no_grad():
            for batch in batches:
                start = time.perf_counter()
                found = risk(model, batch)
                if isinstance(found, int | float) or (isinstance(found, torch.Tensor) and found.dim() != 1):
                    raise ValueError(f"risk returned {found!r}; expected one loss per sample of the batch.")
                losses += [float(value) for value in found]  # which waits for the device
                costs.append(time.perf_counter() - start if cost is None else float(cost(model, batch)))
    finally:
        remove_(model)
    return losses, statistics.median(costs) if costs else math.inf


def _front(found: Sequence[tuple[float, float]]) -> tuple[int, ...]:
    """Return the indices of (loss, cost) pairs that no other beats in both, by growing loss."""
    order = sorted(range(len(found)), key=lambda i: found[i])
    kept: list[int] = []
    for i in order:
        if not kept or found[i][1] < found[kept[-1]][1]:
            kept.append(i)
    return tuple(kept)
