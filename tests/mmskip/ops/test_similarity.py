"""Bipartite soft matching against its reference."""

import numpy as np
import pytest
import torch

from mmskip.ops.similarity import match_similar, match_similar_naive


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_groups_of_different_sizes_equal_the_loop(seed, keep_last):
    sizes, keep = np.array([9, 1, 4, 7, 2, 9]), np.array([2, 1, 4, 3, 1, 8])
    x = torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(9)[None] >= torch.from_numpy(sizes)[:, None]] = torch.nan
    owners = match_similar(x.nan_to_num(1e3), sizes, keep, keep_last)
    for group, (size, left) in enumerate(zip(sizes, keep, strict=True)):
        assert owners[group, :size].tolist() == match_similar_naive(x[group, :size], int(left), keep_last)
        assert not keep_last or owners[group, size - 1] == size - 1
        assert len(set(owners[group, :size].tolist())) == left


def test_equal_tokens_find_each_other_and_the_odd_one_stays():
    x = torch.tensor([[[1.0, 0], [1, 0.01], [-1, 0], [0, 1], [0.01, 1]]])
    assert match_similar(x, np.array([5]), np.array([3])).tolist() == [[1, 1, 2, 3, 3]]
