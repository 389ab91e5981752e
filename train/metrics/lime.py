"""Do LIME's explanations lie on the object, and how much does the way of masking segments matter for that?

LIME (Ribeiro et al., KDD 2016) hides random segments of an image, and fits the probability of a class by a linear
function of the segments kept; its weights are the explanation. Shapes: S segments, N samples, H and W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmskip.train.metrics.missingness import predict_probabilities

WIDTH = 0.25
"""Width of LIME's kernel: exp(-distance^2 / width^2), distance = 1 - cosine to the full image."""
RIDGE = 1.0


def grid_segments(size: int, cells: int) -> Tensor:
    """[H, W] numbers of `cells` x `cells` squares; the last row and column take the remainder."""
    place = (torch.arange(size) * cells) // size
    return place[:, None] * cells + place[None]


def lime_weights(
    model: nn.Module, image: Tensor, segments: Tensor, masking: str, samples: int = 512, seed: int = 0, batch: int = 32
) -> Tensor:
    """The weight [S] of every segment for the class predicted for the full image.

    Args:
        model: takes images in [0, 1].
        image: [3, H, W].
        segments: [H, W], numbers 0 to S - 1.
        masking: how hidden segments are left out; see `missingness.MASKINGS`.
        samples: half of the segments are hidden at random in each.
    """
    count = int(segments.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    on_NS = (torch.rand(samples, count, generator=generator) < 0.5).float()
    on_NS[0] = 1  # the full image, as in LIME
    x, m = image[None].expand(samples, -1, -1, -1), on_NS[:, segments][:, None]
    p_NC = predict_probabilities(model, x, m, masking, batch)
    wanted = p_NC[:, p_NC[0].argmax()].double()
    return ridge(on_NS.double(), wanted).to(image)


def ridge(on_NS: Tensor, wanted_N: Tensor) -> Tensor:
    """LIME's weighted ridge regression with an intercept that is not shrunk: the weights [S]."""
    distance = 1 - on_NS.mean(1).sqrt()  # the cosine of a 0-1 vector to all ones is the root of its mean
    near = torch.exp(-(distance**2) / WIDTH**2).sqrt()
    near = near / near.sum()
    centre, level = near @ on_NS, near @ wanted_N
    a, b = on_NS - centre, wanted_N - level
    near = near * len(on_NS)
    gram = a.T @ (near[:, None] * a) + RIDGE * torch.eye(a.shape[1], dtype=a.dtype)
    return torch.linalg.solve(gram, a.T @ (near * b))


def agreement_with_objects(weights: Mapping[int, float] | Tensor, segments: Tensor, objects: Tensor) -> float:
    """Cosine between the weights of segments and how much each lies on the object: sum over its pixels of
    (object - mean).

    Args:
        weights: by segment number.
        segments: [H, W], numbers.
        objects: [H, W], 1 on the object.
    """
    centred = objects - objects.mean()
    numbers = sorted(weights) if isinstance(weights, Mapping) else range(len(weights))
    on = torch.stack([centred[segments == number].sum() for number in numbers])
    w = torch.tensor([float(weights[number]) for number in numbers])
    return float(F.cosine_similarity(w, on.to(w), dim=0))


def top_agreement(weights: Tensor, segments: Tensor, objects: Tensor) -> float:
    """Share of the k segments with the largest weights that are among the k that hold most of the object, where k is
    the number of segments of which at least half is object (one at least)."""
    cover = torch.stack([objects[segments == number].mean() for number in range(len(weights))])
    k = max(1, int((cover >= 0.5).sum()))
    best = set(weights.topk(k).indices.tolist())
    return len(best & set(cover.topk(k).indices.tolist())) / k


def lime_agreement(
    model: nn.Module,
    x: Tensor,
    objects: Tensor,
    maskings: Sequence[str],
    cells: int = 8,
    samples: int = 512,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """By masking: means over the images of `agreement_with_objects` (`cosine`), of `top_agreement` (`top`) and of what
    random weights would give the latter (`chance`).

    Args:
        x: [B, 3, H, W] in [0, 1].
        objects: [B, 1, H, W], 1 on the object.
        cells: segments per side; they form a grid.
    """
    segments = grid_segments(x.shape[-1], cells)
    found: dict[str, dict[str, float]] = {}
    for masking in maskings:
        cosine, top, chance = [], [], []
        for i, (image, on) in enumerate(zip(x, objects[:, 0], strict=True)):
            weights = lime_weights(model, image, segments, masking, samples, seed + i)
            cosine.append(agreement_with_objects(weights, segments, on))
            top.append(top_agreement(weights, segments, on))
            pooled = torch.stack([on[segments == number].mean() for number in range(cells * cells)])
            chance.append(max(1, int((pooled >= 0.5).sum())) / (cells * cells))
        found[masking] = {
            name: sum(values) / len(values) for name, values in (("cosine", cosine), ("top", top), ("chance", chance))
        }
    return found
