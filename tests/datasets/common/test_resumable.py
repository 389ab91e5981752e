"""A loader that goes on in the middle of an epoch."""

import pytest
from torch.utils.data import DistributedSampler

from mmskip.datasets.common.resumable import ResumableLoader


class Items:
    """Ten numbers that remember who was read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.read.append(index)
        return index


def loader(items, epoch=0, workers=0):
    sampler = DistributedSampler(items, 1, 0, shuffle=True, seed=5)
    sampler.set_epoch(epoch)
    return ResumableLoader(items, batch_size=3, sampler=sampler, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_new_loader_gives_the_rest_of_the_epoch_and_then_whole_ones(workers):
    full = [batch.tolist() for batch in loader(Items())]
    first = loader(Items())
    batches = iter(first)
    taken = [next(batches).tolist() for _ in range(2)]
    state = first.state_dict()

    second = loader(Items(), workers=workers)
    second.load_state_dict(state)
    assert len(second) == 4  # a full epoch: Lightning counts on from the batches taken
    assert taken + [batch.tolist() for batch in second] == full
    assert second.state_dict() == {"taken": 0}
    assert [batch.tolist() for batch in second] == full


def test_skipped_batches_are_not_read():
    items = Items()
    resumed = loader(items)
    resumed.load_state_dict({"taken": 3})
    (rest,) = resumed
    assert items.read == rest.tolist()


def test_a_checkpoint_within_the_resumed_epoch_counts_from_its_beginning():
    resumed = loader(Items())
    resumed.load_state_dict({"taken": 1})
    next(iter(resumed))
    assert resumed.state_dict() == {"taken": 2}


def test_at_the_end_of_an_epoch_nothing_is_skipped():
    done = loader(Items())
    batches = iter(done)
    for _ in range(len(done)):  # Lightning stops here and does not exhaust the iterator
        next(batches)
    assert done.state_dict() == {"taken": 0}
