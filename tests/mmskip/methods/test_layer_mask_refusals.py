"""What `mmskip.masked` refuses, and what would leak without."""

import pytest
import torch
import torch.nn.functional as F
from cnn_zoo import images, patch_mask, varied_mask
from masked_nets import SIZE, net, run
from torch import nn

import mmskip
from mmskip.ops.masked import UnmaskableOperation


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("half", r"mask is str; expected a torch\.Tensor"),
        (torch.ones(2, 3, 8, 8), r"mask has shape \(2, 3, 8, 8\); expected \[B, 1, H, W\]"),
        (torch.ones(8), r"mask has shape \(8,\)"),
        (torch.ones(0, 1, 8, 8), "mask has shape"),
        (torch.full((8, 8), 2.0), "mask has values from 2 to 2; expected 0"),
        (torch.full((8, 8), float("nan")), "mask has values from nan"),
        (torch.full((8, 8), 0.5), "soft=True"),
        (torch.ones(8, 8, dtype=torch.complex64), "mask has dtype torch.complex64"),
    ],
)
def test_bad_masks_are_refused_before_anything_runs(mask, message):
    model = net("basic")
    with pytest.raises(ValueError, match=message), mmskip.masked(model, mask):
        pytest.fail("the context was entered")


def test_bad_calls_are_refused():
    model, mask = net("basic"), patch_mask(2, SIZE, 8, 0.5)
    with pytest.raises(ValueError, match="config is 'neighbour'; expected a LayerMaskConfig"):
        run(model, images(2, SIZE), mask, "neighbour")
    with pytest.raises(ValueError, match="is scripted or traced"):
        run(torch.jit.trace(nn.Conv2d(3, 4, 3), images(2, SIZE)), images(2, SIZE), mask)
    with pytest.raises(ValueError, match="the images are on meta and the mask on cpu"):
        run(model, images(2, SIZE).to("meta"), mask)
    with pytest.raises(ValueError, match=r"expected one floating point batch of images"):
        run(model, images(2, SIZE)[0], mask)
    with pytest.raises(RuntimeError, match="nothing was masked"), mmskip.masked(model, mask):
        pass


@pytest.mark.parametrize("other", ["llama", "linear", "vit"])
def test_a_network_that_is_no_cnn_is_told_what_to_use(other):
    if other == "llama":
        from tiny_decoders import tiny_decoder

        model, message = tiny_decoder("llama"), "no 2-d convolutions|has none|hold"
    elif other == "linear":
        model, message = nn.Linear(2, 2), "2-d convolutions"
    else:
        import timm

        model, message = timm.create_model("vit_tiny_patch16_224", depth=1), "drop those of hidden patches"
    with pytest.raises(ValueError, match=message), mmskip.masked(model, torch.ones(8, 8)):
        pytest.fail("the context was entered")


def test_an_operation_without_a_rule_is_named_with_its_module():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x).real

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd())
    with pytest.raises(UnmaskableOperation, match=r"fft_fft2 has no rule \(in module '1', Odd\)"):
        run(model, images(1, SIZE), patch_mask(1, SIZE, 8, 0.5))


@pytest.mark.parametrize(
    "leak",
    [
        lambda x: x.sum(),
        lambda x: x.flip(-1),
        lambda x: x.roll(1, -1),
        lambda x: x.transpose(2, 3),
        lambda x: x.mean(3),
        lambda x: x.softmax(-1),
        lambda x: x.cumsum(-1),
        lambda x: x.sort(-1).values,
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.permute(1, 0, 2, 3),
        lambda x: F.pixel_unshuffle(x, 2),
        lambda x: x[0],
        lambda x: x.reshape(-1),
        lambda x: torch.cat([x, x], 2),
        lambda x: x @ x.mT,
        lambda x: x[..., 0],
        lambda x: x.view(x.shape[0], 4, 5, 6, 5, 6),
        lambda x: torch.zeros_like(x).copy_(x),
        lambda x: F.unfold(x, 3),
    ],
)
def test_nothing_leaks_through_operations_that_mix_positions(leak):
    class Leak(nn.Module):
        def forward(self, x):
            return leak(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Leak())
    with pytest.raises(UnmaskableOperation):
        run(model, images(2, SIZE), varied_mask(SIZE, 8)[:2])
