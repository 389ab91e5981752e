"""AdamW with a warm-up and a decay of the learning rate, and the checks of its settings."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}

RANGES = {"lr": "(0, inf)", "weight_decay": "[0, inf)", "warmup": "[0, 1)"}
"""Ranges of the settings all models share, for `check_ranges`."""


def check_ranges(given: Mapping[str, Any], table: Mapping[str, str]) -> None:
    """Check that numbers lie in their intervals. None is no number and passes: a setting that is left open.

    Args:
        given: settings by name.
        table: interval by name in the notation of mathematics, e.g. "[0, 1)".

    Raises:
        ValueError: a number outside its interval.
    """
    for name, interval in table.items():
        value = given[name]
        if value is None:
            continue
        low, high = map(float, interval[1:-1].split(","))
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name} is {value!r}; expected a number in {interval}.")


def check_schedule(name: str) -> None:
    """Check the name of a schedule.

    Raises:
        ValueError: it is none of `SCHEDULES`.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}; expected one of {', '.join(SCHEDULES)}.")


def warmup_schedule(name: str, warmup: float, total_steps: float) -> Callable[[int], float]:
    """Make the function from an optimizer step to the factor on the peak learning rate.

    As transformers' `get_scheduler`, but for the first step of a warm-up: theirs has a rate of 0, which trains nothing.

    Args:
        name: a key of `SCHEDULES`: what follows the warm-up.
        warmup: share of all steps in which the rate rises linearly, in [0, 1).
        total_steps: all optimizer steps of the run.

    Raises:
        ValueError: the run has no known end (max_epochs=-1), and the schedule needs one.
    """
    if math.isinf(total_steps):
        if name == "constant" and warmup == 0:
            return lambda step: 1.0
        raise ValueError(
            f"schedule={name!r} with warmup={warmup} needs a known number of steps: set trainer.max_epochs or "
            "trainer.max_steps, or use schedule=constant with warmup=0"
        )
    decay = SCHEDULES[name]
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return decay(min((step - rising) / max(total_steps - rising, 1), 1.0))

    return factor


def is_decayed(parameter: nn.Parameter, tables: Sequence[Tensor] = ()) -> bool:
    """Whether weight decay acts on a weight: on matrices, but not on the embedding `tables`, norms and biases."""
    return parameter.ndim >= 2 and not any(parameter is table for table in tables)


def decay_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, tables: Sequence[Tensor] = ()
) -> list[dict[str, Any]]:
    """Split the trained weights into two groups for AdamW, with and without weight decay (see `is_decayed`)."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [
        {"params": [p for p in trained if is_decayed(p, tables)], "weight_decay": weight_decay},
        {"params": [p for p in trained if not is_decayed(p, tables)], "weight_decay": 0.0},
    ]


def adamw(
    groups: Sequence[dict[str, Any]],
    lr: float,
    schedule: str,
    warmup: float,
    total_steps: float,
    betas: Sequence[float] = (0.9, 0.999),
    fused: bool | None = True,
) -> dict[str, Any]:
    """Make AdamW and its schedule, as `LightningModule.configure_optimizers` returns them.

    Args:
        groups: of weights, with their `weight_decay`; a `lr` of a group replaces `lr`.
        lr: peak learning rate, > 0.
        schedule, warmup, total_steps: see `warmup_schedule`; a step is an optimizer step.
        betas: of AdamW.
        fused: see `torch.optim.AdamW`.

    Raises:
        ValueError: as `warmup_schedule`.
    """
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused)
    scheduler = LambdaLR(optimizer, warmup_schedule(schedule, warmup, total_steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
