"""Base of the data modules: loaders that share samples among ranks and resume in the middle of an epoch."""

from collections.abc import Callable
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from mmskip.datasets.common.resumable import ResumableLoader
from mmskip.datasets.common.samplers import UnrepeatedSampler


class BaseData(LightningDataModule):
    """Shuffled training batches, whose order depends on seed and epoch only; all other batches in order, shared among
    the ranks without repeats.

    A subclass gives `has`, `dataset` and `collate_of`.

    Args:
        batch_size: samples per batch and rank, in training, >= 1.
        eval_batch_size: the same elsewhere; None: `batch_size`.
        num_workers: loader processes.
        seed: of the order of training samples.

    Raises:
        ValueError: no sample in a batch.
    """

    def __init__(self, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed = num_workers, seed

    def has(self, split: str) -> bool:
        """Whether there is such a split."""
        raise NotImplementedError

    def dataset(self, split: str) -> Any:
        """The samples of a split, after `prepare_data`."""
        raise NotImplementedError

    def collate_of(self, split: str) -> Callable[[Any], Any]:
        """The function that makes batches of a split's samples."""
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        dataset = self.dataset("train")
        sampler: DistributedSampler = DistributedSampler(dataset, *self._ranks(), shuffle=True, seed=self.seed)
        return self._loader(dataset, sampler, self.batch_size, self.collate_of("train"))

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Validation batches, in order; none without such a split."""
        return self.in_order(self.dataset("val"), self.collate_of("val")) if self.has("val") else []

    def test_dataloader(self) -> DataLoader:
        """Test batches, in order."""
        return self.in_order(self.dataset("test"), self.collate_of("test"))

    def predict_dataloader(self) -> DataLoader:
        """The test batches (those of val, where there is no test)."""
        split = self.predicted_split()
        return self.in_order(self.dataset(split), self.collate_of(split))

    def predicted_split(self) -> str:
        """The split that is predicted."""
        return "test" if self.has("test") else "val"

    def in_order(self, dataset: Dataset, collate: Callable[[Any], Any]) -> DataLoader:
        """Batches of a data set for evaluation."""
        return self._loader(dataset, UnrepeatedSampler(dataset, *self._ranks()), self.eval_batch_size, collate)

    def _loader(self, dataset: Dataset, sampler: Any, batch_size: int, collate: Callable[[Any], Any]) -> DataLoader:
        return ResumableLoader(
            dataset, batch_size=batch_size, sampler=sampler, num_workers=self.num_workers, collate_fn=collate
        )

    def _ranks(self) -> tuple[int, int]:
        """Number of ranks, and this one's."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
