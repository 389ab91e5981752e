"""An image classifier of timm, trained with parts of its images missing so that missing parts do not mislead it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

import mmskip
from mmskip import LayerMaskConfig
from mmskip.config import MethodConfig
from mmskip.models.common.base import BaseModule
from mmskip.models.common.methods import apply_methods, check_methods, thaw
from mmskip.models.common.optim import RANGES, check_ranges, check_schedule

AUGMENTS = ("none", "patches", "layer_masking")


@dataclass(frozen=True)
class Loaded:
    """A classifier and the images it takes.

    Attributes:
        model: takes normalised images.
        size: side of its input, pixels.
        resize: short side before the middle is cut out; None: the uncropped image is resized.
        mean, std: of images in [0, 1], per channel.
    """

    model: nn.Module
    size: int
    resize: int | None = None
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


class Classifier(BaseModule):
    """A network of timm, a CNN or a ViT. Batches hold `image` [B, 3, H, W] in [0, 1] and `label` [B].

    Args:
        model: name in timm.
        num_classes: None: taken from the data module.
        model_kwargs: further settings of the model, e.g. `{"widths": [16, 32]}`.
        pretrained: start from timm's weights (downloads them).
        augment: change of a part of each training image: `none`; `patches`: random patches are painted with the
            mean colour of the data; `layer_masking`: they are hidden by layer masking (CNNs only).
        augment_share: share of the images of a batch that lose patches, in [0, 1].
        hidden: range of the share of patches hidden, within [0, 1].
        patch: side of a patch, pixels, >= 1.
        mask: deprecated; a `LayerMaskConfig` among the methods.
        mean, std: of images in [0, 1], per channel.
        lr: peak learning rate of AdamW, > 0.
        weight_decay: on matrices only, >= 0.
        schedule, warmup: see `mmskip.models.common.optim`.
        label_smoothing: in [0, 1).
        methods: configs applied to the network in order. `augment="layer_masking"` masks by the `LayerMaskConfig` among
            them, and adds the paper's where there is none.

    Raises:
        ValueError: a value out of range, a name that timm does not know, or layer masking for a network that is no CNN.
    """

    fused = None

    def __init__(
        self,
        model: str = "resnet18",
        num_classes: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        pretrained: bool = False,
        augment: str = "layer_masking",
        augment_share: float = 0.5,
        hidden: tuple[float, float] = (0.1, 0.7),
        patch: int = 4,
        mask: LayerMaskConfig | None = None,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        lr: float = 2e-3,
        weight_decay: float = 0.02,
        schedule: str = "cosine",
        warmup: float = 0.05,
        label_smoothing: float = 0.0,
        methods: list[MethodConfig] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        del given["mask"]
        _check(given)
        if not timm.is_model(model):
            raise ValueError(f"timm has no model {model!r}.")
        given["model_kwargs"] = model_kwargs or {}
        given["methods"] = _with_mask(thaw(methods), augment, mask)
        super().__init__(given)
        self._mask = next((m for m in self.methods if isinstance(m, LayerMaskConfig)), LayerMaskConfig())
        check_methods(lambda: self._build(pretrained=False), self.methods)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)).reshape(1, -1, 1, 1), persistent=False)
        self.net: Any = None
        self.size = 0
        if num_classes is not None:
            self.configure_model()

    def configure_model(self) -> None:
        """Build the network, once; the number of classes may come from the trainer's data module.

        Raises:
            ValueError: the number of classes is unknown, or layer masking does not fit the network.
        """
        if self.net is not None:
            return
        if (data := self.data) is not None:
            self.hparams["num_classes"] = self.hparams["num_classes"] or len(data.class_names)
        if self.hparams["num_classes"] is None:
            raise ValueError("Classifier needs num_classes, or a data module with class_names.")
        self.seed_weights()
        net = self._build(self.hparams["pretrained"], num_classes=self.hparams["num_classes"])
        apply_methods(net, self.methods)
        self.net = net

    def _build(self, pretrained: bool, **settings: Any) -> nn.Module:
        return timm.create_model(
            self.hparams["model"], pretrained=pretrained, **settings, **self.hparams["model_kwargs"]
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W] in [0, 1], of which `mask` [B, 1, H, W] keeps pixels by layer
        masking."""
        x = (x - self.mean) / self.std
        if mask is None:
            return self.net(x)
        with mmskip.masked(self.net, mask, self._mask):
            return self.net(x)

    # --- training -----------------------------------------------------------------------------------------------

    def random_masks(self, x: Tensor) -> Tensor:
        """Masks [B, 1, H, W]: patches hidden in a share of the images."""
        patch, (low, high) = self.hparams["patch"], self.hparams["hidden"]
        b, _, h, w = x.shape
        rows, columns = -(-h // patch), -(-w // patch)
        share = torch.rand(b, 1, 1, 1, device=x.device) * (high - low) + low
        share = share * (torch.rand(b, 1, 1, 1, device=x.device) < self.hparams["augment_share"])
        grid = (torch.rand(b, 1, rows, columns, device=x.device) >= share).float()
        wide = F.interpolate(grid, scale_factor=patch, mode="nearest-exact")
        return wide[:, :, :h, :w]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy with some images partly hidden."""
        self.seed_step(batch_idx)
        x, labels = batch["image"], batch["label"]
        self.size = x.shape[-1]
        mask = None
        if self.hparams["augment"] == "layer_masking":
            mask = self.random_masks(x)
        elif self.hparams["augment"] == "patches":
            x = torch.where(self.random_masks(x) > 0, x, self.mean)
        logits = self(x, mask)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    # --- evaluation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy on complete images, and on the same with half of the patches painted or hidden."""
        self._evaluate(batch, "val", batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Accuracy on complete images, and on the same with half of the patches painted or hidden."""
        self._evaluate(batch, "test", batch_idx)

    def _evaluate(self, batch: dict[str, Any], stage: str, batch_idx: int) -> None:
        x, labels = batch["image"], batch["label"]
        self.size = x.shape[-1]
        patch = self.hparams["patch"]
        generator = torch.Generator().manual_seed(batch_idx)
        grid = torch.rand(len(x), 1, -(-x.shape[2] // patch), -(-x.shape[3] // patch), generator=generator) >= 0.5
        mask = F.interpolate(grid.float(), scale_factor=patch, mode="nearest-exact")[:, :, : x.shape[2], : x.shape[3]]
        mask = mask.to(x)
        answers = {"accuracy": self(x), "accuracy_painted": self(torch.where(mask > 0, x, self.mean))}
        if self.hparams["augment"] == "layer_masking":
            answers["accuracy_masked"] = self(x, mask)
        for name, logits in answers.items():
            right = (logits.argmax(1) == labels).float().mean()
            self.log(f"{stage}/{name}", right, prog_bar=True, on_epoch=True, batch_size=len(x))

    def on_validation_epoch_end(self) -> None:
        """Print the accuracies beside the majority baseline (the most frequent class of the validation set)."""
        data = self.data
        if data is None or not self.trainer.is_global_zero:
            return
        labels = data.sets["val"].labels
        most = max(labels.count(label) for label in set(labels)) / len(labels)
        values = {k.removeprefix("val/"): float(v) for k, v in self.trainer.callback_metrics.items() if "accuracy" in k}
        scores = ", ".join(
            f"{name.replace('_', ', half of the patches ')} {value:.3f}" for name, value in values.items()
        )
        print(f"epoch {self.current_epoch}: this model: {scores}; majority baseline: accuracy {most:.3f}", flush=True)

    # --- from a checkpoint --------------------------------------------------------------------------------------

    @classmethod
    def from_checkpoint(cls, path: str) -> "Classifier":
        """The trained classifier of a checkpoint file, in evaluation mode.

        Raises:
            ValueError: the file is no checkpoint of a Classifier.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = dict(state["hyper_parameters"])
            settings.pop("_instantiator", None)
            if "methods" not in settings:  # of before methods
                mask = LayerMaskConfig.from_dict(settings.pop("mask"))
                settings["methods"] = [mask] if settings["augment"] == "layer_masking" else []
        except (OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no checkpoint of a Classifier ({error!r}).") from error
        model = cls(**{**settings, "pretrained": False})
        model.load_state_dict(state["state_dict"])
        model.size = state["image_size"]
        return model.eval()

    def loaded(self) -> Loaded:
        """The network without the methods on it, for `evaluate.py masking`."""
        mmskip.remove_(self.net)
        return Loaded(self.net, self.size, None, self.hparams["mean"], self.hparams["std"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the size of the images with the settings."""
        checkpoint["image_size"] = self.size


def _check(given: Mapping[str, Any]) -> None:
    """Raise ValueError for settings out of range."""
    ranges = {"augment_share": "[0, 1]", "patch": "[1, inf)", "label_smoothing": "[0, 1)"}
    check_ranges(given, RANGES | ranges)
    check_schedule(given["schedule"])
    if given["augment"] not in AUGMENTS:
        raise ValueError(f"augment is {given['augment']!r}; expected one of {', '.join(AUGMENTS)}.")
    hidden = given["hidden"]
    if len(hidden) != 2 or not 0 <= hidden[0] <= hidden[1] <= 1:
        raise ValueError(f"hidden is {hidden}; expected (low, high) with 0 <= low <= high <= 1.")


def _with_mask(methods: list[Any], augment: str, mask: Any) -> list[Any]:
    """Add the layer masking that `augment` needs, unless `methods` has one; `mask` is its deprecated spelling."""
    if mask is not None:
        warnings.warn("Classifier: give the LayerMaskConfig in methods; mask goes.", FutureWarning, stacklevel=3)
    if augment != "layer_masking" or any(isinstance(method, LayerMaskConfig) for method in methods):
        return methods
    return [*methods, LayerMaskConfig.from_dict(mask) if isinstance(mask, Mapping) else mask or LayerMaskConfig()]
