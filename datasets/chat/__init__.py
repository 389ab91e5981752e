"""Conversations about images and videos, and the data module."""

from mmskip.datasets.chat.module import ChatData

__all__ = ["ChatData"]
