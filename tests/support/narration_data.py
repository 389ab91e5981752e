"""Small hand-made narration samples for the tests of models and training: random features, real template."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from mmskip.datasets.common.resumable import ResumableLoader
from mmskip.datasets.narration.tokenizer import StreamTokens, train_tokenizer
from mmskip.datasets.narration.turns import Turn, build_sample, collate_narration
from mmskip.models.video_llm.speaking import TokenIds

WORDS = ["red circle enters", "blue square leaves", "green star hides now", "red star"]
FEATURES, TOKENS, FPS = 6, 5, 2.0
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tokenizer():
    return train_tokenizer(WORDS)


def stream_tokens() -> StreamTokens:
    return StreamTokens.of(tokenizer())


def token_ids() -> TokenIds:
    return TokenIds.of(tokenizer())


def sample(lengths: list[int], seed: int = 0) -> dict[str, Any]:
    """A sample whose turns have `lengths` frames; frames and words differ by seed."""
    generator = torch.Generator().manual_seed(seed)
    turns, start = [], 1
    for index, length in enumerate(lengths):
        turns.append(Turn((start, start + length), WORDS[(seed + index) % len(WORDS)], (start + length - 1) / FPS))
        start += length
    features = torch.randn(start, TOKENS, FEATURES, generator=generator)
    return build_sample(turns, features, stream_tokens(), f"video-{seed}")


def text_only(seed: int = 0) -> dict[str, Any]:
    """A sample that has labels but no frame."""
    ids = torch.tensor([1, *token_ids().open, *stream_tokens().narration(WORDS[seed % len(WORDS)])])
    labels = ids.clone()
    labels[:2] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "layout": torch.full_like(ids, -1),
        "features": torch.zeros(0, TOKENS, FEATURES),
        "turns": [],
        "uid": f"text-{seed}",
    }


def batch(*lengths: list[int], padding_side: str = "right") -> dict[str, Any]:
    return collate_narration([sample(part, seed) for seed, part in enumerate(lengths)], 0, padding_side)


class TinyData(LightningDataModule):
    """Samples of uneven lengths, in an order that depends on the epoch."""

    def __init__(self, batch_size: int = 2, samples: int = 8, shuffle: bool = True, text: bool = False):
        super().__init__()
        self.batch_size, self.shuffle = batch_size, shuffle
        self.feature_dim, self.fps, self.tokenizer = FEATURES, FPS, tokenizer()
        lengths = [[2, 3], [1, 1, 4], [5], [2, 2, 2], [3, 1], [1, 6], [4, 4], [2]]
        self.samples = [sample(lengths[index % 8], index) for index in range(samples)]
        if text:
            self.samples[1::2] = [text_only(index) for index in range(1, samples, 2)]

    def _loader(self, samples: list[dict[str, Any]], shuffle: bool) -> DataLoader:
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        return ResumableLoader(
            samples,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=DistributedSampler(samples, world, rank, shuffle=shuffle),  # type: ignore[arg-type]
            collate_fn=lambda items: collate_narration(items, 0),
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.samples, self.shuffle)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.samples[:3], False)

    test_dataloader = predict_dataloader = val_dataloader


class RecordGradients(Callback):
    """Writes the loss and the final gradients of every optimizer step, on rank 0, at the end of the run."""

    def __init__(self, path: str):
        self.path, self.steps = path, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.steps):
            gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
            loss = float(trainer.callback_metrics["train/loss"])
            self.steps.append({"loss": loss, "gradients": gradients})

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(self.steps, self.path)
