"""Diffusion UNet and its samplers."""

from mmskip.models.diffusion.module import Diffusion, build_unet

__all__ = ["Diffusion", "build_unet"]
