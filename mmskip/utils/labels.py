"""The label that every loss ignores."""

IGNORE = -100
"""Label of a token that is not predicted; the default `ignore_index` of torch's cross-entropy."""
