"""The processes that evaluate together: those that torchrun started, or one alone.

On torch.distributed itself: accelerate's `PartialState` is one object per process, which neither takes a device by name
nor forgets a group that has ended (two evaluations in one process), and it changes the number of threads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mmskip.env import pick_device

# the others wait while one rank encodes or times, for longer than the usual ten minutes
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class ProcessGroup:
    """This process among all of an evaluation.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: where this process runs its model.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes are here (a collective call)."""
        if self.world > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """Return the first process's value on all (a collective call)."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes on all, by rank (a collective call)."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def process_group(device: str = "auto") -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started (nccl on CUDA devices, gloo elsewhere).

    Args:
        device: see `mmskip.env.pick_device`; with several ranks, "auto" and "cuda" give each its own.

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
        yield ProcessGroup(rank, world, target)
    finally:
        if joined:
            dist.destroy_process_group()
