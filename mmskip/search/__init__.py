"""Searching for the best setting of a dial; `python -m mmskip.search` is the command line."""

from mmskip.search.line import Found, search

__all__ = ["Found", "search"]
