"""Activations that carry a keep mask through a network: the tensor subclass and its rules per kind of operation."""

from mmskip.ops.masked import convs, fills, norms, pointwise, pools, shapes
from mmskip.ops.masked.state import Mask, MaskRules
from mmskip.ops.masked.tensor import MaskedTensor, UnmaskableOperation, unwrap, wrap

__all__ = [
    "Mask",
    "MaskRules",
    "MaskedTensor",
    "UnmaskableOperation",
    "convs",
    "fills",
    "norms",
    "pointwise",
    "pools",
    "shapes",
    "unwrap",
    "wrap",
]
