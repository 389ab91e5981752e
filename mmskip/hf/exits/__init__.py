"""Blocks that states leave early."""
