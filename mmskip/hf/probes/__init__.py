"""Measurements of blocks while they run: attention, residual stream."""
