"""Diffusion UNet and its samplers."""

from mmskip.models.diffusion.module import Diffusion

__all__ = ["Diffusion"]
