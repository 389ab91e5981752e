"""Several processes that evaluate together: started by torchrun, or one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmskip.env import pick_device

# one rank encodes or times while the others wait: the usual ten minutes are nothing
_PATIENCE = timedelta(days=7)


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
        device: see `mmskip.env.pick_device`; among several ranks "auto" and "cuda" mean a device each.

    Raises:
        ValueError: no such device.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if device in ("auto", "cuda") and world > 1 and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    target = pick_device(device)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank, world, target)
    finally:
        if joined:
            dist.destroy_process_group()
