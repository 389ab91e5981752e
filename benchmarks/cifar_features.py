"""Old name of `benchmarks/prepare/cifar_features.py`."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from prepare.cifar_features import resnet20

warnings.warn("benchmarks/cifar_features.py is now benchmarks/prepare/cifar_features.py.", FutureWarning, stacklevel=1)

__all__ = ["resnet20"]
