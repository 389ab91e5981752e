"""Savings of a method on one batch: counted from a trace, and measured against the same model without it."""

import copy
from typing import TYPE_CHECKING, Any

import torch

import mmskip
from mmskip.utils.timing import paired_models

if TYPE_CHECKING:
    from mmskip.models.common.base import StepLossModule
    from mmskip.models.video_llm.module import VideoLLM


def counted_savings(model: "StepLossModule", batch: dict[str, Any]) -> dict[str, Any]:
    """Cost of one training step's forward and backward on `batch`, see `mmskip.cost`."""
    model.train()
    with mmskip.trace(model.llm) as trace, torch.enable_grad():
        model.loss_sums(batch)
    return mmskip.cost(model.llm, trace).to_dict()


def streaming_savings(model: "VideoLLM", sample: dict[str, Any]) -> dict[str, Any]:
    """Cost of narrating one sample frame by frame: FLOPs of all its forwards, KV bytes after the last."""
    with mmskip.trace(model.llm) as trace:
        model.narrate(sample)
    return mmskip.cost(model.llm, trace).to_dict()


def measured_speedup(model: "StepLossModule", batch: dict[str, Any], pairs: int = 15) -> dict[str, float]:
    """Time of forward and backward of the dense model over that of this one.

    The dense model is a copy of this one with all methods removed. Both run alternately in this process, each pair
    gives one ratio.

    Args:
        model: its gradients are dropped.
        batch: on the model's device.
        pairs: number of ratios, at least 2.

    Returns:
        `speedup` (median), `low`, `high` (quartiles), `seconds` and `dense_seconds` (medians of one step).
    """
    own = model.llm
    own.zero_grad(set_to_none=True)
    dense = mmskip.remove_(copy.deepcopy(own))
    model.train()

    def step() -> None:
        model.loss_sums(batch)[0].backward()
        model.zero_grad(set_to_none=True)

    with torch.enable_grad():
        ratio = paired_models(model, "llm", dense, own, step, pairs)
    return {
        "speedup": ratio.median,
        "low": ratio.q1,
        "high": ratio.q3,
        "seconds": ratio.fn_s,
        "dense_seconds": ratio.base_s,
    }
