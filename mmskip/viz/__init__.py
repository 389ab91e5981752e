"""Pictures drawn from a trace or a report."""

from mmskip.viz.curves import exit_depths, quality_against_compute
from mmskip.viz.figure import save_png
from mmskip.viz.keep_maps import dropped_patches, keep_map, kept_tokens

__all__ = ["dropped_patches", "exit_depths", "keep_map", "kept_tokens", "quality_against_compute", "save_png"]
