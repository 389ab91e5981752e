"""Small CNNs of several kinds, and how they run under a mask."""

import torch
from cnn_zoo import shake
from timm.layers import BlurPool2d
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition
from torchvision.models.resnet import BasicBlock

import mmskip

SIZE = 32


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def stem(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def net(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in ("resnet", "dilated"):  # ResNet-50's blocks, thin and one per stage
        stride = 32 if kind == "resnet" else 8
        return shake(ResNet(Bottleneck, (1, 1, 1, 1), 5, output_stride=stride, channels=(4, 8, 16, 16)), SIZE)
    middle, width = {
        "basic": (nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16)), 16),
        "grouped": (nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, groups=4), nn.SiLU(), nn.MaxPool2d(3, 2, 1)), 24),
        "depthwise": (nn.Sequential(nn.Conv2d(16, 16, 5, 2, 2, groups=16), nn.Hardswish(), nn.Conv2d(16, 32, 1)), 32),
        "dense": (nn.Sequential(_DenseBlock(3, 16, 2, 8, 0.0), _Transition(40, 20)), 20),
        "blur": (nn.Sequential(BlurPool2d(16), nn.Conv2d(16, 16, (1, 5), padding="same"), nn.GELU()), 16),
    }[kind]
    return shake(nn.Sequential(stem(16), middle, head(width)), SIZE)


KINDS = ("resnet", "basic", "grouped", "depthwise", "dilated", "dense", "blur")


def run(model, x, mask, config=None):
    with mmskip.masked(model, mask, config):
        return model(x)
