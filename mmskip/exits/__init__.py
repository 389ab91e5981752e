"""Exit criteria and exit heads, shared by every method that stops early."""

from mmskip.exits.criteria import (
    CRITERIA,
    HEAD_CRITERIA,
    LEARNED,
    SAMPLE_CRITERIA,
    STATE_CRITERIA,
    SampleScores,
    Saturation,
    StateNorm,
    TokenScores,
    check_threshold,
    confidence,
    decayed,
    entropy,
    is_single,
    margin,
    never_fires,
    patience,
    saturation,
)
from mmskip.exits.heads import ExitHead, TiedHead
from mmskip.exits.settings import ExitAt, FixedExit

__all__ = [
    "CRITERIA",
    "HEAD_CRITERIA",
    "LEARNED",
    "SAMPLE_CRITERIA",
    "STATE_CRITERIA",
    "ExitAt",
    "ExitHead",
    "FixedExit",
    "SampleScores",
    "Saturation",
    "StateNorm",
    "TiedHead",
    "TokenScores",
    "check_threshold",
    "confidence",
    "decayed",
    "entropy",
    "is_single",
    "margin",
    "never_fires",
    "patience",
    "saturation",
]
