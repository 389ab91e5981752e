"""Old name of `benchmarks/prepare/deep_lm.py`."""

import runpy
import warnings

if __name__ == "__main__":
    warnings.warn("benchmarks/deep_lm.py is now benchmarks/prepare/deep_lm.py.", FutureWarning, stacklevel=1)
    runpy.run_module("prepare.deep_lm", run_name="__main__")
