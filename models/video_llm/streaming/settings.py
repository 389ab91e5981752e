"""Settings of running streams."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from mmskip.hf.streaming.cache import POSITIONS


@dataclass(frozen=True)
class StreamSettings:
    """Settings of streams.

    Attributes:
        window: tokens a token looks back on, itself included; None: all of the stream. At least one frame and its
            separator.
        sinks: first tokens of a stream that stay visible under a window, >= 0.
        positions: `absolute` or `rolling`, see `mmskip.hf.streaming.cache.StreamCache`.
        position_range: positions the model has; None: as its config says.
        chunk: most frames of one stream in one call, >= 1. The texts do not depend on it.
        threshold: a silent token below this probability is set to zero, in [0, 1]; 0: plain argmax.
        max_new_tokens: longest text, tokens, >= 1.
        temperature: of sampling, >= 0; 0: greedy.
        top_p: sample among the likeliest tokens that together have this probability, in (0, 1].
        seed: of sampling, >= 0; each stream draws for itself.
    """

    window: int | None = None
    sinks: int = 0
    positions: str = "absolute"
    position_range: int | None = None
    chunk: int = 1
    threshold: float = 0.725
    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        lowest = {"window": 1, "sinks": 0, "position_range": 1, "chunk": 1, "max_new_tokens": 1, "seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f"{name} is {value!r}; expected an integer >= {low}.")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions is {self.positions!r}; expected one of {', '.join(POSITIONS)}.")
        if self.sinks and self.window is None:
            raise ValueError(f"sinks is {self.sinks} without a window; give a window, or omit the sinks.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold!r}; expected a number from 0 to 1.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature is {self.temperature!r} and top_p {self.top_p!r}; expected a number >= 0 and one in "
                "(0, 1]."
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StreamSettings":
        """From `to_dict`."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})
