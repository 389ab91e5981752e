"""Images with captions or statements about them, and the data module."""

from mmskip.datasets.captioning.module import CaptionData

__all__ = ["CaptionData"]
