"""Decoding by drafts that skip parts of the model."""
