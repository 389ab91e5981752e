"""Training of a tiny routed decoder, alone or on two ranks under FSDP2, for processes that a test spawns."""

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import mmskip
from tests.support.tiny_decoders import VOCAB, randomize_routers, stream_layout, tiny_decoder

STEPS, SAVED_AT, RANKS = 20, 10, 2


def routed_decoder(seed: int = 0) -> torch.nn.Module:
    """A routed decoder in training mode with random routers."""
    model = mmskip.apply_(tiny_decoder("llama", seed=seed), mmskip.MoDConfig(keep=0.3, gate="sigmoid"))
    randomize_routers(model)
    return model.train()


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """`fully_shard` of each block, then of the whole model."""
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def batch(step: int) -> dict[str, torch.Tensor]:
    """Two rows: one has frames in every step, the other text alone in every fourth."""
    layout = torch.stack([stream_layout(3), stream_layout(3)])
    if step == 3:
        layout[1] = -1
    ids = torch.randint(3, VOCAB, layout.shape, generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "layout": layout, "labels": ids}


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, folder: Path | None = None):
    """Losses of the steps; each rank takes its row. The state before step `SAVED_AT` goes to `folder`."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    losses = []
    for step in steps:
        if folder is not None and step == SAVED_AT:
            save(model, optimizer, folder)
        rows = {name: value if ranks == 1 else value[rank : rank + 1] for name, value in batch(step % 4).items()}
        loss = model(**rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if ranks > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            loss = loss / ranks
        losses.append(loss.item())
    return losses


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with an epsilon that keeps the rounding of tiny gradients small."""
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """A sharded checkpoint of model and optimizer."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(folder))


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read a sharded checkpoint, whatever number of ranks wrote it."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def resume(folder: Path, sharded: bool) -> list[float]:
    """Losses from `SAVED_AT` on, of a model with other weights that loads a checkpoint."""
    model = routed_decoder(seed=5)
    if sharded:
        shard(model)
    optimizer = optimizer_of(model)
    load(model, optimizer, folder)
    return train(model, optimizer, range(SAVED_AT, STEPS))


def message_of(call) -> str:
    """The message of the error that `call` raises."""
    with contextlib.suppress(AssertionError):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def work(rank: int, folder: str) -> None:
    """What each rank does; rank 0 writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    found, root = {}, Path(folder)
    for name, checkpointing in (("plain", False), ("recomputed", True)):
        model = routed_decoder()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(model)
        optimizer = optimizer_of(model)
        found[name] = train(model, optimizer, range(STEPS), root / "two" if name == "plain" else None)
    found["remove"] = message_of(lambda: mmskip.remove_(model))
    mmskip.save(model, root / "adapter")
    trained = {n: p.full_tensor() for n, p in model.named_parameters() if "mmskip" in n}
    other = mmskip.load_(shard(routed_decoder(seed=3)), root / "adapter")
    found["loaded"] = all(torch.equal(p.full_tensor(), trained[n]) for n, p in other.named_parameters() if n in trained)
    found["apply"] = message_of(lambda: mmskip.apply_(shard(tiny_decoder("llama")), mmskip.MoDConfig()))
    found["two"] = resume(root / "two", sharded=True)
    found["one"] = resume(root / "one", sharded=True)
    if rank == 0:
        torch.save((found, trained), root / "found.pt")
    dist.destroy_process_group()
