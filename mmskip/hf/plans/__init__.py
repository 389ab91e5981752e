"""Blocks that run by a plan."""
