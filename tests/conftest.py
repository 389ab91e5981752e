"""Tests use no network: a name that is not on this machine fails at once instead of after retries."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
