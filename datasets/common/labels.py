"""Labels that several areas share."""

IGNORE = -100
"""Label of a token that is not learned; the default `ignore_index` of torch's cross-entropy."""
ENTAILMENT = ("entailment", "neutral", "contradiction")
"""What an image says about a sentence, in the order of the answers' logits."""
