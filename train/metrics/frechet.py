"""Distances between generated and real images, in the features of a network chosen by the user.

Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), precision and recall (Kynkaanniemi et
al. 2019). Shapes: N images, F features.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean [F] and covariance [F, F], fp64, of the features of `count` images."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features_NF: Tensor) -> "FeatureStatistics":
        """Statistics of features [N, F].

        Warns:
            UserWarning: no more images than features, so that the covariance is singular and the distance depends on
                N; compare such distances at equal N only, or use the kernel distance.

        Raises:
            ValueError: fewer than two images, or features that are not finite.
        """
        count, width = features_NF.shape
        if count < 2:
            raise ValueError(f"got features of {count} image(s); expected at least 2.")
        if not bool(torch.isfinite(features_NF).all()):
            raise ValueError("some features are not finite; look at the images and the feature network's input range.")
        if count <= width:
            warnings.warn(
                f"{count} images and {width} features: the covariance is singular, and the Frechet distance is too "
                f"large by an amount that depends on the number of images. Use more than {width} images, a network "
                "with fewer features, or the kernel distance.",
                stacklevel=2,
            )
        wide = features_NF.double()
        return cls(wide.mean(0), torch.cov(wide.T), count)


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the square root through symmetric matrices, which a singular
    covariance does not upset.

    Raises:
        ValueError: statistics of different feature networks.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"the statistics have {len(one.mean)} and {len(other.mean)} features; use one feature network."
        )
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    squares = (one.mean - other.mean).square().sum()
    return float(squares + one.covariance.trace() + other.covariance.trace() - 2 * cross)


def kernel_distance(one_NF: Tensor, other_NF: Tensor, subsets: int = 50, size: int = 500, seed: int = 0) -> float:
    """KID: the unbiased squared MMD under the kernel (x . y / F + 1)^3, mean over random subsets."""
    size = min(size, len(one_NF), len(other_NF))
    generator = torch.Generator().manual_seed(seed)
    one_NF, other_NF = one_NF.double(), other_NF.double()
    width = one_NF.shape[1]
    total = 0.0
    for _ in range(subsets):
        x = one_NF[torch.randperm(len(one_NF), generator=generator)[:size].to(one_NF.device)]
        y = other_NF[torch.randperm(len(other_NF), generator=generator)[:size].to(one_NF.device)]
        xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        own = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        total += float(own - 2 * xy.mean())
    return total / subsets


def precision_recall(
    real_NF: Tensor, generated_NF: Tensor, neighbours: int = 3, chunk: int = 1024
) -> tuple[float, float]:
    """Share of generated images within the manifold of the real ones, and the reverse; a manifold is the union of the
    balls around its images that reach to the `neighbours`-th nearest of their own kind.

    Raises:
        ValueError: not more images than neighbours.
    """
    if min(len(real_NF), len(generated_NF)) <= neighbours:
        raise ValueError(
            f"got {len(real_NF)} real and {len(generated_NF)} generated images; expected more than {neighbours} each."
        )

    def inside(points: Tensor, centres: Tensor) -> float:
        radii = torch.cat(
            [torch.cdist(c, centres).kthvalue(neighbours + 1, dim=1).values for c in centres.split(chunk)]
        )
        hits = [(torch.cdist(p, centres) <= radii).any(1) for p in points.split(chunk)]
        return float(torch.cat(hits).double().mean())

    real, generated = real_NF.double(), generated_NF.double()
    return inside(generated, real), inside(real, generated)
