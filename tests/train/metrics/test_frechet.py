"""Distances between sets of features."""

import math
import warnings

import pytest
import torch

from mmskip.train.metrics.frechet import FeatureStatistics, frechet_distance, kernel_distance, precision_recall


def features(count, width=8, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, generator=generator) @ mix + shift


def test_frechet_distance_of_known_normal_distributions():
    one = FeatureStatistics(torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4.0])).double(), 10)
    other = FeatureStatistics(torch.tensor([3.0, 0.0]).double(), torch.diag(torch.tensor([9.0, 1.0])).double(), 10)
    assert frechet_distance(one, other) == pytest.approx(9 + (1 - 3) ** 2 + (2 - 1) ** 2)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_agrees_with_torchmetrics():
    reference = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    one, other = features(300).double(), features(200, shift=0.5, seed=1).double() * 1.3
    expected = float(reference(one.mean(0), one.T.cov(), other.mean(0), other.T.cov()))
    found = frechet_distance(FeatureStatistics.of(one), FeatureStatistics.of(other))
    assert found == pytest.approx(expected, rel=1e-4) and found > 1


def test_kernel_distance_agrees_with_torchmetrics_and_is_about_nought_for_equal_distributions():
    kid = pytest.importorskip("torchmetrics.image.kid")
    one, other = features(120) / 5, features(120, seed=1) / 5 + 1.0
    expected = float(kid.poly_mmd(one.double(), other.double()))
    assert kernel_distance(one, other, subsets=1, size=120) == pytest.approx(expected, rel=1e-6)
    assert abs(kernel_distance(one, features(120, seed=2) / 5)) < expected / 5


def test_precision_and_recall_tell_missing_modes_from_bad_images():
    real = torch.cat([features(100), features(100, shift=40.0, seed=1)])
    one_mode = features(100, seed=2)
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.7 and 0.3 < recall < 0.5 + 1e-9
    precision, recall = precision_recall(real, torch.cat([real + 1e-6, features(200, shift=-90.0)]))
    assert math.isclose(precision, 0.5) and recall == 1.0


def test_too_few_images_are_reported():
    with pytest.warns(UserWarning, match="8 images and 8 features: the covariance is singular"):
        few = FeatureStatistics.of(features(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        many = FeatureStatistics.of(features(500))
    assert math.isfinite(frechet_distance(few, many))
    with pytest.raises(ValueError, match="at least 2"):
        FeatureStatistics.of(features(1))
    with pytest.raises(ValueError, match="not finite"):
        FeatureStatistics.of(features(20) / 0)
    with pytest.raises(ValueError, match="more than 3 each"):
        precision_recall(features(3), features(10))
    with pytest.raises(ValueError, match="have 8 and 4 features"):
        frechet_distance(many, FeatureStatistics.of(features(20, 4)))
