"""A DataLoader that goes on where a checkpoint in the middle of an epoch was written."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler


class ResumableLoader(DataLoader):
    """Remembers how many batches of its epoch were taken. Lightning stores that in checkpoints (`state_dict`) and gives
    it back on resuming; the batches taken before are then skipped without being read.

    The sampler must give the same order again: seeded, and told the epoch by `set_epoch`, as a `DistributedSampler`.

    Args:
        dataset: map-style.
        batch_size: samples per batch, >= 1.
        sampler: the order of the samples of this rank.
        kwargs: further arguments of `DataLoader`.
    """

    def __init__(self, dataset: Dataset, batch_size: int, sampler: Sampler[int], **kwargs: Any) -> None:
        super().__init__(dataset, batch_sampler=_Skipping(sampler, batch_size, drop_last=False), **kwargs)
        self._taken = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._taken = self._batches.skip
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    @property
    def _batches(self) -> "_Skipping":
        assert isinstance(self.batch_sampler, _Skipping)
        return self.batch_sampler

    def state_dict(self) -> dict[str, int]:
        """Batches taken in this epoch; 0 at its end."""
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were taken, once."""
        self._batches.skip = state["taken"]


class _Skipping(BatchSampler):
    """Leaves out the first `skip` batches of the next epoch. Its length stays that of a whole epoch."""

    skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        return islice(super().__iter__(), skip, None)
