"""One vocabulary of cache policies; names of version 0.1 are read with a warning."""

import warnings

import pytest

from mmskip.cache_policy import ALIASES, CACHE_POLICIES, check_cache_policy


@pytest.mark.parametrize("name", CACHE_POLICIES)
def test_a_policy_is_returned_as_it_is(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_cache_policy("cache_policy", name) == name


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_a_name_of_version_0_1_is_read_with_a_warning(old, new):
    with pytest.warns(FutureWarning, match=f"cache_policy='{new}'"):
        assert check_cache_policy("cache_policy", old) == new


@pytest.mark.parametrize("value", ["drop", 3, None, ["copy"]])
def test_anything_else_is_refused(value):
    with pytest.raises(ValueError, match=r"cache_policy is .*expected one of recompute, copy, mask, skip"):
        check_cache_policy("cache_policy", value)
    with pytest.raises(ValueError, match="cache_policy is 'hole'; expected one of recompute, copy"):
        check_cache_policy("cache_policy", "hole", ("recompute", "copy"))
