"""Labels that several areas share."""

from mmskip.utils.labels import IGNORE

__all__ = ["ENTAILMENT", "IGNORE"]

ENTAILMENT = ("entailment", "neutral", "contradiction")
"""Relations of an image to a sentence, in the order of the answers' logits."""
