"""Learning-rate schedules."""

import math
from collections.abc import Callable

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def warmup_schedule(name: str, warmup: float, total_steps: float) -> Callable[[int], float]:
    """The factor on the peak learning rate at each optimizer step.

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
