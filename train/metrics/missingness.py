"""Answers of a classifier to images with missing parts, by way of masking.

Shapes: B images, H and W pixels; masks [B, 1, H, W] with 1 = kept; images [B, 3, H, W] in [0, 1].
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmskip
from mmskip.utils.extras import require

Fill = Callable[[Tensor, Tensor], Tensor]
Recall = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]
LAYER_MASKINGS = {
    "partial conv": mmskip.LayerMaskConfig(padding="partial"),
    "layer masking": mmskip.LayerMaskConfig(),
}


def fill_black(x: Tensor, m: Tensor) -> Tensor:
    """0."""
    return x * m


def fill_grey(x: Tensor, m: Tensor) -> Tensor:
    """0.5."""
    return x * m + 0.5 * (1 - m)


def fill_mean(x: Tensor, m: Tensor) -> Tensor:
    """The mean colour of the visible part of the image; grey if nothing is visible."""
    share = m.mean((2, 3), keepdim=True)
    mean = (x * m).mean((2, 3), keepdim=True) / share.clamp(min=1e-8)
    return x * m + torch.where(share > 0, mean, 0.5) * (1 - m)


def fill_blur(x: Tensor, m: Tensor) -> Tensor:
    """A wide Gaussian blur of the visible part (a blur of the full image would reveal the hidden part)."""
    size = x.shape[-1]
    sigma = size / 16
    reach = min(round(3 * sigma), size - 1)
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2)).to(x)

    def blur(t: Tensor) -> Tensor:
        kernel = (taps / taps.sum()).reshape(1, 1, 1, -1).expand(t.shape[1], 1, 1, -1)
        t = F.conv2d(t, kernel, padding=(0, reach), groups=t.shape[1])
        return F.conv2d(t, kernel.transpose(2, 3), padding=(reach, 0), groups=t.shape[1])

    weight = blur(m)
    smooth = torch.where(weight > 1e-4, blur(x * m) / weight.clamp(min=1e-4), fill_mean(x, m))
    return x * m + smooth * (1 - m)


def fill_inpaint(x: Tensor, m: Tensor) -> Tensor:
    """Telea's inpainting by OpenCV, radius 3.

    Raises:
        ValueError: OpenCV is not installed.
    """
    cv2 = require("interpret", "cv2", "the fill 'inpaint'")
    done = []
    # OpenCV looks at a few pixels inside the hole, so those of the image must not stand there
    for image, keep in zip(fill_mean(x, m), m, strict=True):
        picture = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        hole = (keep[0] == 0).byte().numpy()
        done.append(torch.from_numpy(cv2.inpaint(picture, hole, 3, cv2.INPAINT_TELEA)).permute(2, 0, 1) / 255)
    return x * m + torch.stack(done) * (1 - m)


FILLS: dict[str, Fill] = {
    "black": fill_black,
    "grey": fill_grey,
    "mean": fill_mean,
    "blur": fill_blur,
    "inpaint": fill_inpaint,
}
MASKINGS = (*FILLS, *LAYER_MASKINGS)


class Normalised(nn.Module):
    """A classifier of images in [0, 1].

    Args:
        model: takes normalised images.
        mean, std: per channel, of images in [0, 1].
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.model((x - self.mean) / self.std)


def predict(model: nn.Module, x: Tensor, m: Tensor, masking: str, batch: int = 32) -> Tensor:
    """Predicted classes [B] under a masking; errors as `predict_probabilities`."""
    return predict_probabilities(model, x, m, masking, batch).argmax(1)


@torch.inference_mode()
def predict_probabilities(model: nn.Module, x: Tensor, m: Tensor, masking: str, batch: int = 32) -> Tensor:
    """Probabilities [B, classes] under a masking.

    Raises:
        ValueError: an unknown masking, or one that the network cannot do.
    """
    if masking not in MASKINGS:
        raise ValueError(f"masking is {masking!r}; expected one of {', '.join(MASKINGS)}.")
    found = []
    for part, keep in zip(x.split(batch), m.split(batch), strict=True):
        if masking in FILLS:
            found.append(model(FILLS[masking](part, keep)).softmax(1))
            continue
        with mmskip.masked(model, keep, LAYER_MASKINGS[masking]):
            found.append(model(part).softmax(1))
    return torch.cat(found)


def saliency(model: nn.Module, x: Tensor, batch: int = 16) -> Tensor:
    """|gradient of the best logit x image| summed over channels, [B, 1, H, W]."""
    maps = []
    for part in x.split(batch):
        part = part.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(part).amax(1).sum(), part)
        maps.append((grad * part.detach()).abs().sum(1, keepdim=True))
    return torch.cat(maps)


def patch_orders(scores: Tensor, patch: int, order: str, seed: int = 0) -> Tensor:
    """The order [B, P] in which the patches of each image are hidden.

    Args:
        scores: saliency [B, 1, H, W].
        order: `random`, `salient first` or `salient last`.
    """
    per_patch = F.avg_pool2d(scores, patch).flatten(1)
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(per_patch.shape, generator=generator).argsort(1)
    return per_patch.argsort(dim=1, descending=order == "salient first", stable=True)


ORDERS = ("random", "salient first", "salient last")


def patch_masks(order_BP: Tensor, fraction: float, size: int, patch: int) -> Tensor:
    """Masks [B, 1, H, W] with the first `fraction` of the patches hidden."""
    hidden = round(fraction * order_BP.shape[1])
    keep = torch.ones(order_BP.shape).scatter(1, order_BP[:, :hidden], 0.0)
    side = size // patch
    return F.interpolate(keep.reshape(-1, 1, side, side), size=(size, size), mode="nearest-exact")


@dataclass
class Answers:
    """Metrics of predicted classes.

    Attributes:
        accuracy: share of right answers.
        entropy: of the distribution of predicted classes, nats.
        classes: how many classes are predicted at all.
        agreement: share of answers equal to those for the full images.
    """

    accuracy: float
    entropy: float
    classes: int
    agreement: float

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor, clean: Tensor) -> "Answers":
        """From predicted classes, labels, and the classes predicted for the full images, [B] each."""
        share = torch.bincount(predicted).double() / len(predicted)
        share = share[share > 0]
        return cls(
            accuracy=(predicted == labels).double().mean().item(),
            entropy=float(-(share * share.log()).sum()) + 0.0,
            classes=len(share),
            agreement=(predicted == clean).double().mean().item(),
        )


@dataclass
class Missingness:
    """The report on one classifier.

    Attributes:
        clean: of the full images.
        curves: answers by order, masking and fraction hidden.
        shape: shape-leak figures by masking, see `shape_leak`.
        maskings, fractions, orders: as measured.
        count, classes: images, and classes among their labels.
        lime: how LIME's explanations agree with the objects, by masking, see `mmskip.train.metrics.lime`.
    """

    clean: Answers
    curves: dict[str, dict[str, dict[float, Answers]]]
    shape: dict[str, dict[str, float]]
    maskings: Sequence[str]
    fractions: Sequence[float]
    orders: Sequence[str]
    count: int
    classes: int
    notes: list[str] = field(default_factory=list)
    lime: dict[str, dict[str, float]] = field(default_factory=dict)

    def score(self, masking: str) -> float:
        """Mean accuracy over the fractions, patches hidden at random (or the first order measured)."""
        curve = self.curves["random" if "random" in self.orders else self.orders[0]][masking]
        return sum(a.accuracy for a in curve.values()) / len(curve)

    def recommended(self) -> str:
        """The masking with the best score."""
        return max(self.maskings, key=self.score)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "clean": vars(self.clean),
            "curves": {
                order: {
                    masking: {str(fraction): vars(answers) for fraction, answers in curve.items()}
                    for masking, curve in curves.items()
                }
                for order, curves in self.curves.items()
            },
            "shape": self.shape,
            "lime": self.lime,
            "scores": {masking: self.score(masking) for masking in self.maskings},
            "recommended": self.recommended(),
            "images": self.count,
            "classes": self.classes,
            "notes": self.notes,
        }


def measure(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    objects: Tensor | None,
    maskings: Sequence[str],
    fractions: Sequence[float],
    orders: Sequence[str],
    patch: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    recall: Recall = lambda key, make: make(),
) -> Missingness:
    """Run the report.

    Args:
        model: takes images in [0, 1].
        x, labels: images and classes.
        objects: masks [B, 1, H, W] with 1 on the object; None: the most salient 30 % of each image stand for it.
        patch: side of the hidden patches, pixels.
        recall: called with the name of each part and a function that computes it (a dict for JSON); may return an
            earlier result.

    Raises:
        ValueError: the patches do not fit the image.
    """
    size = x.shape[-1]
    if size % patch:
        raise ValueError(f"patch is {patch}; expected a divisor of the image size {size}.")
    with frozen(model):
        full = predict(model, x, torch.ones_like(x[:, :1]), "black")
        scores = saliency(model, x)
        curves: dict[str, dict[str, dict[float, Answers]]] = {}
        for order in orders:
            sequence = patch_orders(scores, patch, order, seed)
            curves[order] = {masking: {} for masking in maskings}
            for fraction in fractions:
                m = patch_masks(sequence, fraction, size, patch)
                for masking in maskings:

                    def answers(m: Tensor = m, masking: str = masking) -> dict[str, Any]:
                        return vars(Answers.of(predict(model, x, m, masking), labels, full))

                    found = recall(f"{order}/{fraction}/{masking}", answers)
                    curves[order][masking][fraction] = Answers(**found)
                progress(f"{order}, {fraction:.0%} hidden")
        silhouettes = salient_regions(scores) if objects is None else objects
        leak = functools.partial(shape_leak, model, x, labels, silhouettes)
        shape = {masking: recall(f"shape/{masking}", functools.partial(leak, masking)) for masking in maskings}
    clean = Answers.of(full, labels, full)
    report = Missingness(clean, curves, shape, maskings, fractions, orders, len(x), len(set(labels.tolist())))
    if objects is None:
        report.notes.append("no object masks were given: the most salient 30 % of each image stand for the object")
    return report


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of weights."""
    training = model.training
    wanted = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in wanted:
        p.requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p in wanted:
            p.requires_grad_(True)


def salient_regions(scores: Tensor, share: float = 0.3) -> Tensor:
    """Masks [B, 1, H, W] with 1 on the most salient share of the smoothed saliency."""
    window = scores.shape[-1] // 8 * 2 + 1
    smooth = F.avg_pool2d(scores, window, 1, window // 2, count_include_pad=False)
    limit = smooth.flatten(1).quantile(1 - share, dim=1).reshape(-1, 1, 1, 1)
    return (smooth > limit).float()


def shape_leak(
    model: nn.Module, x: Tensor, labels: Tensor, objects: Tensor, masking: str, batch: int = 32
) -> dict[str, float]:
    """Does the outline of the hidden region reveal the class?

    `object` and `rolled`: accuracy with the object hidden, and with the same hole rolled by half a width. `donor` and
    `donor rolled`: how often an image with the hole of another image (of another class) is taken for that image's
    class; with the hole where it was, and rolled. An uninformative outline gives the chance rate.
    """
    half = x.shape[-1] // 2

    def accuracy(holes: Tensor, wanted: Tensor, pick: Tensor) -> float:
        answers = predict(model, x, 1 - holes, masking, batch)
        return (answers == wanted)[pick].double().mean().item() if pick.any() else math.nan

    everyone = torch.ones_like(labels, dtype=torch.bool)
    order = torch.arange(len(x)).roll(1)
    other = labels[order] != labels
    return {
        "object": accuracy(objects, labels, everyone),
        "rolled": accuracy(objects.roll(half, -1), labels, everyone),
        "donor": accuracy(objects[order], labels[order], other),
        "donor rolled": accuracy(objects[order].roll(half, -1), labels[order], other),
    }


def table(report: Missingness) -> str:
    """The report in words."""
    lines = [
        f"{report.count} images of {report.classes} classes; whole: accuracy {report.clean.accuracy:.3f}, class "
        f"entropy {report.clean.entropy:.2f} nats, {report.clean.classes} classes predicted"
    ]
    for order, curves in report.curves.items():
        lines.append(f"\npatches hidden: {order}\n{'accuracy':<16}" + _row(f"{f:.0%}" for f in report.fractions))
        for masking, curve in curves.items():
            lines.append(f"{masking:<16}" + _row(f"{a.accuracy:.3f}" for a in curve.values()))
        lines.append(f"{'class entropy':<16}")
        for masking, curve in curves.items():
            lines.append(f"{masking:<16}" + _row(f"{a.entropy:.2f}" for a in curve.values()))
    lines.append(f"\n{'shape leak':<16}" + _row(next(iter(report.shape.values()))))
    for masking, figures in report.shape.items():
        lines.append(f"{masking:<16}" + _row(f"{value:.3f}" for value in figures.values()))
    if report.lime:
        lines.append(f"\n{'LIME on objects':<16}" + _row(next(iter(report.lime.values()))))
        for masking, figures in report.lime.items():
            lines.append(f"{masking:<16}" + _row(f"{value:.3f}" for value in figures.values()))
    scores = sorted(report.maskings, key=report.score, reverse=True)
    best = ", ".join(f"{name} {report.score(name):.3f}" for name in scores)
    lines.append(f"\nmean accuracy: {best}\nrecommended for this checkpoint: {report.recommended()}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _row(values: Any) -> str:
    return "".join(f"{value:>14}" for value in values)
