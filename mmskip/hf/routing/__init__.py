"""Blocks that process a subset of the tokens."""
