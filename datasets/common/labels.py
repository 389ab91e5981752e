"""Labels that several areas share."""

from mmskip.utils.labels import IGNORE

__all__ = ["ENTAILMENT", "IGNORE"]

ENTAILMENT = ("entailment", "neutral", "contradiction")
"""What an image says about a sentence, in the order of the answers' logits."""
