"""Share the samples of a data set among ranks."""

from collections.abc import Iterator

from torch.utils.data import Dataset, DistributedSampler


class UnrepeatedSampler(DistributedSampler):
    """Give every sample once, dealt round the ranks in order. (Lightning does not replace a DistributedSampler.)"""

    def __init__(self, dataset: Dataset, world: int, rank: int) -> None:
        super().__init__(dataset, world, rank, shuffle=False)
        self.indices = range(rank, len(dataset), world)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
