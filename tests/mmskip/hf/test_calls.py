"""Values scoped to the calls of one module, and the checks that all roots of decoders share."""

import contextlib

import pytest
import torch
from torch import nn

from mmskip.hf.calls import Scoped, check_ran, inputs_of


def test_a_scoped_value_is_seen_by_its_module_only_and_while_the_block_is_open():
    scoped: Scoped[int] = Scoped("test_scoped")
    first, second = nn.Identity(), nn.Identity()
    with scoped.given(first, 1):
        assert (scoped.of(first), scoped.of(second)) == (1, None)
        with contextlib.suppress(KeyError), scoped.given(second, 2):
            assert (scoped.of(first), scoped.of(second)) == (None, 2)
            raise KeyError
        assert scoped.of(first) == 1
    assert scoped.of(first) is None


def test_embeddings_are_the_inputs_before_ids():
    ids, embeds = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 3)
    assert inputs_of({"input_ids": ids, "inputs_embeds": None}) is ids
    assert inputs_of({"input_ids": ids, "inputs_embeds": embeds}) is embeds
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        inputs_of({})


def test_claimed_blocks_that_did_not_run_are_named():
    check_ran(nn.Identity(), {1, 3}, {0, 1, 3})
    with pytest.raises(RuntimeError, match=r"blocks \[1, 3\] of Identity were claimed by mmskip but did not run"):
        check_ran(nn.Identity(), (3, 2, 1), {2})
