"""Tuning of a stock vision-language model of transformers."""

from mmskip.models.vlm.module import VLM

__all__ = ["VLM"]
