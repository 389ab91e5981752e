"""Small or thin convolutional networks with random weights and norms that are not the identity."""

import torch
from torch import Tensor, nn


def shake(model: nn.Module, size: int = 64, seed: int = 0) -> nn.Module:
    """Random biases and statistics, as of a trained network, so that a masked position is not zero by chance."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)

    with torch.no_grad():
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            for name, p in own.items():
                if name == "bias" or p.ndim <= 1:
                    p.add_(noise(p), alpha=0.1)
                if name in ("gamma", "skipinit_gain", "layer_scale"):
                    p.fill_(0.3)
        # statistics of real activations, so that the signal of the image reaches the output of a deep network
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for module in norms:
            module.momentum = None
        model.train()(images(4, size, seed))
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
    return model.eval()


def patch_mask(batch: int, size: int, patch: int, share: float, seed: int = 0) -> Tensor:
    """[B, 1, H, W] of random square patches; in every sample some are kept and some are not."""
    generator = torch.Generator().manual_seed(seed)
    n = size // patch
    order = torch.rand(batch, n * n, generator=generator).argsort(1)
    hidden = max(1, min(n * n - 1, round(share * n * n)))
    grid = (order >= hidden).float().reshape(batch, 1, n, n)
    return nn.functional.interpolate(grid, size=(size, size), mode="nearest-exact")


def varied_mask(size: int, patch: int = 8) -> Tensor:
    """[3, 1, H, W]: the left half hidden, random patches hidden, nothing hidden."""
    mask = patch_mask(3, size, patch, 0.5)
    mask[0] = 1
    mask[0, :, :, : size // 2] = 0
    mask[2] = 1
    return mask


def images(batch: int, size: int, seed: int = 0) -> Tensor:
    """[B, 3, H, W]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
