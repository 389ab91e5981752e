"""Image captioner with early exits (MuE)."""

from mmskip.models.captioner.module import Captioner

__all__ = ["Captioner"]
