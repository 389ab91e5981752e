"""Tests use no network: a name that is not on this machine fails at once instead of after retries. And what one test
compiled does not count against the next."""

import os
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """The compiler gives up on a function after eight versions of it, whichever tests made them."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
