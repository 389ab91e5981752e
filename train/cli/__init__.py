"""The command lines."""

from mmskip.train.cli.train import main

__all__ = ["main"]
