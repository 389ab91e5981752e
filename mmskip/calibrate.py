"""Settings chosen by a promise instead of by hand: Learn-then-Test and conformal risk control.

Settings are ordered from the safest (full depth) to the most aggressive. Each sample has, at each setting, a loss in
[0, `bound`] against the full model. Learn-then-Test promises that with probability 1 - delta over the calibration
samples the chosen setting's true mean loss is at most epsilon; conformal risk control promises it in the mean over
calibrations, for losses that grow along the order. Sources: Angelopoulos et al. 2021 (arXiv 2110.01052) and 2022
(arXiv 2208.02814); Schuster et al. 2022 (CALM).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

METHODS = ("ltt", "bonferroni", "crc")


@dataclass(frozen=True)
class Calibration:
    """What a calibration chose.

    Attributes:
        config: the chosen setting; None: not even the safest one keeps the promise.
        index: its place in the order, or None.
        risks: mean calibration loss of each setting that was looked at, safest first.
        p_values: of each of them (empty for conformal risk control).
        samples: calibration samples.
        epsilon, delta, method: the promise; delta is None for conformal risk control.
    """

    config: Any
    index: int | None
    risks: tuple[float, ...]
    p_values: tuple[float, ...]
    samples: int
    epsilon: float
    delta: float | None
    method: str

    def __str__(self) -> str:
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
    """Hoeffding-Bentkus p-value of "the true risk exceeds epsilon".

    Args:
        risk: mean loss of the samples, losses in [0, 1].
        samples: how many.
        epsilon: in (0, 1).
    """
    if risk >= epsilon:
        return 1.0
    hoeffding = math.exp(-samples * _divergence(risk, epsilon))
    # a mean of n losses times n can lie a rounding error above the whole number that it is
    bentkus = math.e * _binomial_cdf(math.ceil(samples * risk - 1e-9), samples, epsilon)
    return min(1.0, hoeffding, bentkus)


def _divergence(a: float, b: float) -> float:
    """Kullback-Leibler divergence of two coins, nats."""
    left = a * math.log(a / b) if a > 0 else 0.0
    right = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
    return left + right


def _binomial_cdf(count: int, samples: int, p: float) -> float:
    """Probability of at most `count` heads."""
    log_n = math.lgamma(samples + 1)
    terms = (
        math.exp(
            log_n - math.lgamma(k + 1) - math.lgamma(samples - k + 1) + k * math.log(p) + (samples - k) * math.log1p(-p)
        )
        for k in range(min(count, samples) + 1)
    )
    return min(1.0, math.fsum(terms))


def samples_needed(epsilon: float, delta: float | None, settings: int = 1, method: str = "ltt") -> int:
    """The fewest samples from which any setting can pass: those of one without any loss (losses in [0, 1])."""
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
        delta: allowed probability that the promise fails; None for `crc`.
        method: "ltt": test in order, stop at the first setting that fails, take the last that passed; "bonferroni":
            test all at delta / settings, take the most aggressive that passed; "crc": conformal risk control.
        bound: largest possible loss.

    Raises:
        ValueError: a value out of range, losses of different lengths or beyond [0, bound], or too few samples for the
            promise; the message has the number that it needs.
    """
    _check(epsilon, delta, method, bound)
    samples = _count(losses, bound)
    scaled = epsilon / bound
    needed = samples_needed(scaled, delta, len(losses), method)
    if samples < needed:
        promise = f"epsilon={epsilon:g}" + ("" if method == "crc" else f", delta={delta:g}")
        raise ValueError(
            f"{samples} calibration samples cannot support the promise {promise} over {len(losses)} settings by "
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
    told = None if method == "crc" else delta
    return Calibration(None, index, tuple(r * bound for r in risks), p_values, samples, epsilon, told, method)


def _check(epsilon: float, delta: float | None, method: str, bound: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if not 0 < bound < math.inf or not 0 < epsilon < bound:
        raise ValueError(f"epsilon is {epsilon!r} and bound {bound!r}; expected 0 < epsilon < bound.")
    if method != "crc" and (delta is None or not 0 < delta < 1):
        raise ValueError(f"delta is {delta!r}; expected a number between 0 and 1 for method {method!r}.")


def _count(losses: Sequence[Sequence[float]], bound: float) -> int:
    if not losses or not losses[0]:
        raise ValueError("there are no losses; expected one row per setting with one loss per calibration sample.")
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
    epsilon: float,
    delta: float | None = 0.05,
    method: str = "ltt",
    bound: float = 1.0,
) -> Calibration:
    """Choose the most aggressive of several configs that keeps a promise about `risk`.

    Args:
        model: without a method that claims the configs' sites; it is as it was afterwards.
        configs: safest first, for instance `EarlyExitConfig`s whose thresholds fall together.
        data: batches that nothing was trained or tuned on; read once per config.
        risk: (model with the config applied, batch) -> a loss in [0, bound] per sample of the batch.
        epsilon, delta, method, bound: see `choose`.

    Returns:
        The report, with the chosen config.

    Raises:
        ValueError: as `choose` and `apply_`; the model is then as it was.
    """
    from mmskip.registry import apply_, remove_

    _check(epsilon, delta, method, bound)
    if not configs:
        raise ValueError("configs is empty; expected at least one, safest first.")
    before = _applied(model)
    if before:
        raise ValueError(f"the model carries {before!r}; calibrate a model without methods, or remove_ them first.")
    batches, losses = list(data), []
    for config in configs:
        apply_(model, config)
        try:
            with torch.no_grad():
                losses.append([float(value) for batch in batches for value in risk(model, batch)])
        finally:
            remove_(model)
    found = choose(losses, epsilon, delta, method, bound)
    chosen = None if found.index is None else configs[found.index]
    return Calibration(chosen, found.index, found.risks, found.p_values, found.samples, epsilon, found.delta, method)


def _applied(model: torch.nn.Module) -> list[Any]:
    from mmskip.registry import applied

    return applied(model)
