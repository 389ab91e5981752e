"""Narrated videos: annotations, windows of them as token streams, and the data module."""

from mmskip.datasets.narration.formats.coin import CoinData
from mmskip.datasets.narration.module import NarrationData

__all__ = ["CoinData", "NarrationData"]
