"""A DataLoader that resumes where a checkpoint in the middle of an epoch was written."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A `DataLoader` (same arguments) that remembers how many batches of its epoch were taken. Lightning stores that in
    checkpoints (`state_dict`) and gives it back on resuming; the batches taken before are then skipped unread.

    torchdata's `StatefulDataLoader` resumes too, but its state does not fit another number of workers, and it cannot
    read the state below, which checkpoints hold.

    The sampler must give the same order again: seeded, with the epoch set by `set_epoch`, as a `DistributedSampler`.
    """

    _taken = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        self._taken, self._skip = self._skip, 0
        for batch in batches:
            self._taken += 1
            yield batch

    # DataLoader draws the indices of its batches from here, in the loading process
    @property
    def _index_sampler(self) -> Any:
        return _Rest(super()._index_sampler, self._skip)

    def state_dict(self) -> dict[str, int]:
        """Batches taken in this epoch; 0 at its end."""
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Skip the batches that were taken, in the next epoch only."""
        self._skip = state["taken"]


class _Rest:
    """The index batches of an epoch without those to be skipped; its length stays that of a full epoch."""

    def __init__(self, batches: Any, skip: int) -> None:
        self.batches, self.skip = batches, skip

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.skip, None)

    def __len__(self) -> int:
        return len(self.batches)
