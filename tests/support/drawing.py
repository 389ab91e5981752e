"""A tiny trained run of the diffusion module, a tiny feature classifier, and a user's own feature network."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from mmskip.datasets.images import ImageData
from mmskip.models.classifier import Classifier
from mmskip.train.cli.train import main

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

UNET_OPTIONS = [
    "--model.unet.block_out_channels=[8,8]",
    "--model.unet.layers_per_block=1",
    "--model.unet.norm_num_groups=4",
    "--model.unet.down_block_types=[DownBlock2D,DownBlock2D]",
    "--model.unet.up_block_types=[UpBlock2D,UpBlock2D]",
    "--data.train_count=24",
    "--data.val_count=12",
    "--data.batch_size=12",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]

OWN_NET = """
import torch
from torch import nn

class Corners(nn.Module):
    # means of four quarters: four features
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)  # has a counter without dimensions

    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).flatten(1)

class Wide(nn.Module):
    def forward(self, x):
        return x.flatten(1)

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 31)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

class Blind(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 3)

class Map(nn.Module):
    def forward(self, x):
        return x

corners, wide, picky, blind, feature_map = Corners, Wide, Picky, Blind, Map
"""


def diffusion_run(folder: Path) -> Path:
    """Train `skip_tuning.yaml`, made tiny, by the command line; the folder of all runs of that name."""
    main(["--config", "skip_tuning.yaml", *UNET_OPTIONS, f"--runs_dir={folder / 'runs'}"])
    return folder / "runs" / "skip_tuning"


def own_nets(folder: Path) -> Path:
    """A Python file with feature networks."""
    path = folder / "own_nets.py"
    path.write_text(OWN_NET)
    return path


def classifier_checkpoint(folder: Path) -> Path:
    """A tiny classifier, trained for two steps."""
    torch.manual_seed(0)
    model = Classifier("resnet18", model_kwargs={"channels": [8, 8, 8, 6], "layers": [1, 1, 1, 1]}, augment="none")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        enable_checkpointing=False,
    )
    trainer.fit(model, ImageData(train_count=12, val_count=6, batch_size=6, generated_size=16))
    trainer.save_checkpoint(folder / "features.ckpt")
    assert isinstance(model.net, nn.Module)
    return folder / "features.ckpt"
