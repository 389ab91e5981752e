"""The report of a diffusion run: its loss beside two baselines, and samples at fixed seeds."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from mmskip.models.diffusion.module import Diffusion
from mmskip.train.reports.base import RunReport
from mmskip.utils.files import atomic_path, write_json, write_text


class SampleReport(RunReport):
    """Prints and writes, at the end of fit: the loss of the averaged weights beside that of the untrained network and
    of a denoiser that knows only the spread of the pixels, and a grid of samples at fixed seeds.

    Files in the folder of the run: `samples.png` (one row per class, real images first), `results.json`, `report.txt`.

    Args:
        columns: samples per class, and per row without classes, >= 1.
        steps: numbers of steps of Heun's sampler, one group of columns each; >= 1.
        seed: of the noise.
    """

    model_class = Diffusion
    stages = ("fit",)

    def __init__(self, columns: int = 6, steps: tuple[int, ...] = (5, 18), seed: int = 0) -> None:
        if columns < 1 or not steps or min(steps) < 1:
            raise ValueError(f"columns is {columns} and steps is {steps}; expected integers >= 1, at least one.")
        super().__init__()
        self.columns, self.steps, self.seed = columns, tuple(steps), seed
        self.untrained: float | None = None

    def scores_before(self, trainer: Trainer, model: Any) -> Any:
        """Return the loss of the untrained network."""
        return float(trainer.callback_metrics["val/loss"])

    def report(self, trainer: Trainer, model: Diffusion, stage: str) -> None:
        """Print and write the losses, and draw samples."""
        if not trainer.is_global_zero or "val/loss" not in trainer.callback_metrics:
            return
        folder = Path(trainer.default_root_dir)
        loss = float(trainer.callback_metrics["val/loss"])
        pixels = spread_only_loss(model, trainer.val_dataloaders)
        lines = [] if self.untrained is None else [f"untrained network          {self.untrained:.4f}"]
        lines += [f"baseline: pixels' spread   {pixels:.4f}", f"this model                 {loss:.4f}"]
        evaluations = draw_samples(model, trainer.val_dataloaders, folder / "samples.png", self)
        text = "\n".join(
            [
                "Weighted denoising loss on the validation images (lower is better)",
                *lines,
                "",
                *self.training_time(),
                f"{folder / 'samples.png'}: per class {self.columns} real images, then {self.columns} samples each at "
                f"{' and '.join(map(str, evaluations))} function evaluations",
            ]
        )
        metrics = {"model": loss, "untrained": self.untrained, "pixel_spread": pixels}
        write_json(
            {"name": folder.parent.name, "val_loss": metrics, "nfe_of_samples": evaluations}, folder / "results.json"
        )
        write_text(text + "\n", folder / "report.txt")
        print(f"\n{text}")


def spread_only_loss(model: Diffusion, loader: Any) -> float:
    """The validation loss if the network F always answered 0, in expectation over the noise: the linear denoiser of
    independent pixels of known variance, whose error is (c_skip - 1) clean + c_skip sigma noise."""
    sd, total, count = model.hparams["sigma_data"], 0.0, 0
    for batch in loader:
        squares_B = batch["image"].double().square().mean((1, 2, 3))
        sigma2_B = (2 * model.validation_log_sigma(len(squares_B)).double()).exp()
        keep_B = sd**2 / (sigma2_B + sd**2)
        error_B = (keep_B - 1) ** 2 * squares_B.cpu() + keep_B**2 * sigma2_B
        total += float(((sigma2_B + sd**2) / (sigma2_B * sd**2) * error_B).sum())
        count += len(squares_B)
    return total / count


def draw_samples(model: Diffusion, loader: Any, path: Path, report: SampleReport) -> list[int]:
    """Draw the grid; returns the function evaluations of each group of columns."""
    classes = model.classes or 1
    real = _real(loader, classes, report.columns, model.classes is not None)
    groups, evaluations = [real], []
    for steps in report.steps:
        images, nfe = model.generate(classes * report.columns, report.seed, steps=steps)
        groups.append(images.unflatten(0, (report.columns, classes)).transpose(0, 1))
        evaluations.append(nfe)
    save_grid(torch.cat(groups, 1).flatten(0, 1), classes, path)
    return evaluations


def _real(loader: Any, classes: int, columns: int, by_class: bool) -> Tensor:
    """Images [classes, columns, C, H, W]; grey where a class has too few."""
    found: list[list[Tensor]] = [[] for _ in range(classes)]
    for batch in loader:
        labels = batch["label"].tolist() if by_class else [0] * len(batch["image"])
        for image, label in zip(batch["image"], labels, strict=True):
            if len(found[label]) < columns:
                found[label].append(image)
        if all(len(row) == columns for row in found):
            break
    blank = torch.zeros_like(batch["image"][0])
    return torch.stack([torch.stack([*row, *[blank] * (columns - len(row))]) for row in found])


def save_grid(images_NCHW: Tensor, rows: int, path: Path) -> None:
    """Write images in [-1, 1] as a PNG of `rows` rows, enlarged to at least 48 pixels each."""
    from torchvision.utils import make_grid, save_image

    factor = max(1, -(-48 // images_NCHW.shape[-1]))
    large = ((images_NCHW + 1) / 2).clamp(0, 1).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    with atomic_path(path) as partial:
        save_image(make_grid(large, nrow=len(images_NCHW) // rows, padding=2), partial, format="png")
