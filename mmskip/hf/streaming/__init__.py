"""Caches of streams with a window."""
