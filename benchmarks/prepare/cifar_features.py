"""The 64 features of a really trained CIFAR-10 ResNet-20, as a feature network for small pictures.

python evaluate.py fid --features benchmarks/prepare/cifar_features.py:resnet20 ...
"""

import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import masking_checkpoints

from mmskip.train.metrics.feature_nets import Pooled


def resnet20() -> nn.Module:
    """[N, 3, H, W] in [0, 1], of any size -> [N, 64]."""
    loaded = masking_checkpoints.cifar10_resnet20()
    loaded.model.linear = nn.Identity()

    def features(x_N3HW: Tensor) -> Tensor:
        return loaded.model(F.interpolate(x_N3HW, (32, 32), mode="bilinear", align_corners=False, antialias=True))

    return Pooled(loaded.model, features, loaded.mean, loaded.std)
