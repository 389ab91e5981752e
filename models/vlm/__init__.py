"""Tuning of a stock vision-language model of transformers."""

from mmskip.models.vlm.module import VLM, answering_tokens, inputs_of

__all__ = ["VLM", "answering_tokens", "inputs_of"]
