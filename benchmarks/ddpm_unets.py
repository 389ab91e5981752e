"""Old name of `benchmarks/prepare/ddpm_unets.py`."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from prepare.ddpm_unets import fashion, mnist

warnings.warn("benchmarks/ddpm_unets.py is now benchmarks/prepare/ddpm_unets.py.", FutureWarning, stacklevel=1)

__all__ = ["fashion", "mnist"]
