"""FSDP2 on two gloo ranks: the same losses as one process, checkpoints that fit any number of ranks, clear refusals."""

import pytest
import torch

import mmskip
from tests.support.fsdp_ranks import RANKS, SAVED_AT, STEPS, optimizer_of, resume, routed_decoder, train, work


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one process gives, and what two ranks found."""
    folder = tmp_path_factory.mktemp("fsdp")
    model = routed_decoder()
    losses = train(model, optimizer_of(model), range(STEPS), folder / "one")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=RANKS)
    found, trained = torch.load(folder / "found.pt", weights_only=True)
    return folder, losses, model, found, trained


@pytest.mark.parametrize("how", ["plain", "recomputed"])
def test_two_ranks_give_the_losses_of_one_process(runs, how):
    _, losses, model, found, trained = runs
    torch.testing.assert_close(torch.tensor(found[how]), torch.tensor(losses), atol=1e-5, rtol=0)
    assert losses[-1] < losses[0] - 0.1
    weights = dict(model.named_parameters())
    for name, weight in trained.items():
        torch.testing.assert_close(weight, weights[name].detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("written_by", ["one", "two"])
def test_a_checkpoint_goes_on_with_any_number_of_ranks(runs, written_by):
    folder, losses, _, found, _ = runs
    expected = torch.tensor(losses[SAVED_AT:])
    torch.testing.assert_close(torch.tensor(found[written_by]), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(resume(folder / written_by, sharded=False)), expected, atol=1e-5, rtol=0)


def test_the_adapter_of_a_sharded_model_is_whole(runs):
    folder, _, _, found, trained = runs
    assert found["loaded"]
    loaded = mmskip.load_(routed_decoder(seed=2), folder / "adapter")
    weights = dict(loaded.named_parameters())
    assert trained and all(torch.equal(weights[name], weight) for name, weight in trained.items())


def test_changes_of_a_sharded_model_are_refused(runs):
    found = runs[3]
    assert found["apply"].startswith("ValueError") and "before fully_shard" in found["apply"]
    assert found["remove"].startswith("RuntimeError") and "undo that first" in found["remove"]
