"""Streaming video LLM (VideoLLM-MoD)."""

from mmskip.models.video_llm.module import VideoLLM

__all__ = ["VideoLLM"]
