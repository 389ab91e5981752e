"""Several processes that evaluate together: started by torchrun, or one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank, world: number of this process, and of all.
        device: where its model runs.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """The first process's value, on all (a collective call)."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on all (a collective call)."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def ranks(device: str = "auto") -> Iterator[Ranks]:
    """Join the processes that torchrun started (nccl on CUDA devices, gloo elsewhere).

    Args:
        device: "auto" (cuda if there is one), "cpu", "cuda", "cuda:1", ...
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and world > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    target = torch.device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, target)
    finally:
        if joined:
            dist.destroy_process_group()
