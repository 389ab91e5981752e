"""`mmskip.masked`: exactness, gradients, batches, settings."""

import copy
import json

import contract
import pytest
import torch
import torch.nn.functional as F
from cnn_zoo import images, patch_mask, shake, varied_mask
from masked_nets import KINDS, SIZE, net, run
from naive_layer_mask import Naive, masked_like, naive_masked, neighbour_pad
from torch import nn
from torchvision.models import resnet18

import mmskip
from mmskip.ops.masked import Mask, fills


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["neighbour", "none", "partial"])
def test_parity_with_the_naive_reference_forward_and_gradients(kind, padding):
    # in double precision, so that no activation changes sides of a ReLU by rounding
    model, mask = net(kind).double(), varied_mask(SIZE, 4).double()
    ours, theirs = (images(3, SIZE).double().requires_grad_() for _ in range(2))
    y = run(model, ours, mask, mmskip.LayerMaskConfig(padding=padding))
    expected = naive_masked(model, theirs, mask, padding)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((y * weight).sum(), [ours, *model.parameters()])
    wanted = torch.autograd.grad((expected * weight).sum(), [theirs, *model.parameters()])
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(1.0, float(want.abs().max())))
    assert (grads[0][(mask == 0).expand_as(ours)] == 0).all()
    assert all((grads[0][i] != 0).any() for i in ((1, 2) if kind == "resnet" else (0, 1, 2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding", ["neighbour", "none", "partial"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_positions_to_fill_are_listed(kind, padding, mode):
    model, mask, x = net(kind), varied_mask(SIZE, 4), images(3, SIZE)
    config = mmskip.LayerMaskConfig(padding=padding)
    dense = run(model, x, mask, config).detach()
    with mode():
        listed = run(model, x, mask, config)
        again = run(model.to(memory_format=torch.channels_last), x, mask, config)
        poisoned = run(model, torch.where(mask > 0, x, float("nan")), mask, config)
    torch.testing.assert_close(listed, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, dense, rtol=1e-4, atol=1e-5)
    assert torch.equal(poisoned, again)


@pytest.mark.parametrize("shape", [(3, 32, 9, 7), (1, 16, 1, 5), (2, 16, 6, 6)])
@pytest.mark.parametrize("pads", [None, (1, 2, 0, 3)])
@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_listed_positions_hold_what_the_box_sums_give(shape, pads, steps):
    generator = torch.Generator().manual_seed(steps)
    m = (torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.8).float()
    m[0], m[0, 0, 0, 0] = 0, 1
    mask, x = Mask(m, None), torch.randn(shape, generator=generator)
    if pads is not None:
        mask, x = mask.padded(pads), F.pad(x, pads)
    reached = F.max_pool2d(m, 2 * steps + 1, 1, steps)
    reached = reached if pads is None else F.pad(reached, pads)
    with torch.no_grad():
        expected = fills.dense(x, mask, steps)
        got = fills.gathered_(x.clone(memory_format=torch.channels_last), mask, steps)
    torch.testing.assert_close(got * reached, expected, rtol=1e-5, atol=1e-5)


def test_a_context_serves_inference_and_training_in_turn():
    model, mask, x = net("basic"), varied_mask(SIZE, 4), images(3, SIZE)
    with mmskip.masked(model, mask):
        with torch.inference_mode():
            first = model(x)
        y = model(x)
        y.sum().backward()
    torch.testing.assert_close(first.clone(), y.detach(), rtol=1e-4, atol=1e-5)


def test_feature_maps_have_the_layout_of_the_plain_model():
    import timm

    model, x = shake(timm.create_model("resnet18"), SIZE), images(3, SIZE)
    with torch.inference_mode(), mmskip.masked(model, varied_mask(SIZE, 4)):
        assert model.forward_features(x).is_contiguous()


@pytest.mark.parametrize("settings", [(4, 2, 1), (3, 2, 1, 1, 4), (3, 1, 0, 0, 1, True, 2), (2, 2)])
def test_transposed_convolutions(settings):
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(16, 8, *settings)
    model, mask, x = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), layer), varied_mask(SIZE, 8), images(3, SIZE)
    with torch.no_grad():
        y = run(model, x, mask)
        one = (layer.stride, layer.padding, layer.output_padding, 1, layer.dilation)
        before = F.max_pool2d(mask, 3, 1, 1)
        after = F.conv_transpose2d(before, torch.ones(1, 1, *layer.kernel_size), None, *one) > 0
        first = model[0](neighbour_pad(x * mask, mask.expand(-1, 3, -1, -1), 4))
        seen = neighbour_pad(first * before, before.expand(-1, 16, -1, -1), 4)
        torch.testing.assert_close(y, layer(seen) * after, rtol=1e-4, atol=1e-5)
        assert torch.equal(run(model, torch.where(mask > 0, x, float("nan")), mask), y)


class Viewing(nn.Module):
    """Shuffles and flattens by `view`, as older networks do: valid for one layout only."""

    def __init__(self):
        super().__init__()
        self.conv, self.second, self.fc = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 15, 15), nn.Linear(32 * 4, 5)

    def forward(self, x):
        x = self.conv(x)
        x = x.view(x.shape[0], 2, 16, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        x = self.second(x)
        return self.fc(x.view(x.shape[0], -1))


def test_views_work_under_any_layout():
    model, x = Viewing(), images(3, SIZE)
    for mask in (varied_mask(SIZE, 4), varied_mask(SIZE, 16)):
        with torch.no_grad():
            y, expected = run(model, x, mask), naive_masked(model, x, mask)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_changes_nothing_and_is_not_painted_over(kind):
    model, mask, x = net(kind), varied_mask(SIZE, 4), images(3, SIZE)
    with torch.no_grad():
        y = run(model, x, mask)
        poisoned = run(model, torch.where(mask > 0, x, float("nan")), mask)
        assert torch.equal(y, poisoned)
        torch.testing.assert_close(y[2], model(x)[2], rtol=1e-5, atol=1e-5)  # its mask is all ones
        for paint in (0.0, x.mean(), x.min()):
            painted = model(torch.where(mask > 0, x, paint))
            assert ((painted - y)[:2].abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_masks_is_each_alone(kind):
    model, mask, x = net(kind), varied_mask(SIZE, 4), images(3, SIZE)
    with torch.no_grad():
        together = run(model, x, mask)
        alone = torch.cat([run(model, x[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_mask_of_ones_is_the_plain_model_bit_for_bit():
    model, x = net("resnet"), images(2, SIZE)
    y = run(model, x, torch.ones(2, 1, SIZE, SIZE))
    assert torch.equal(y, model(x))


def test_all_hidden_is_the_head_of_nothing():
    model, x = net("resnet"), images(2, SIZE)
    mask = torch.stack([torch.zeros(SIZE, SIZE), torch.ones(SIZE, SIZE)])
    y = run(model, x, mask)
    torch.testing.assert_close(y[0], model.fc.bias, rtol=0, atol=0)
    assert torch.isfinite(y).all()


def test_masks_of_any_shape_dtype_and_resolution():
    model, x = net("basic"), images(2, SIZE)
    grid = patch_mask(1, 8, 1, 0.5)[0, 0]
    fine = grid.repeat_interleave(4, 0).repeat_interleave(4, 1)
    finer = grid.repeat_interleave(8, 0).repeat_interleave(8, 1)
    expected = run(model, x, fine)
    for mask in (grid, grid.bool(), grid.int(), grid[None], grid[None, None].expand(2, 1, 8, 8), finer, fine.double()):
        torch.testing.assert_close(run(model, x, mask), expected, rtol=0, atol=0)


def test_more_rounds_than_the_window_reaches_change_nothing():
    model, mask, x = net("dilated"), varied_mask(SIZE, 8), images(3, SIZE)
    with torch.no_grad():
        y = run(model, x, mask)
        many = run(model, x, mask, mmskip.LayerMaskConfig(iterations=20))
        none = run(model, x, mask, mmskip.LayerMaskConfig(iterations=0))
        plain = run(model, x, mask, mmskip.LayerMaskConfig(padding="none"))
    assert torch.equal(y, many)
    assert torch.equal(none, plain) and not torch.allclose(y, none)


def test_constant_fills_change_gradients_only():
    model, mask = net("basic"), varied_mask(SIZE, 4)
    x = images(3, SIZE).requires_grad_()
    grads, outs = [], []
    for flows in (True, False):
        y = run(model, x, mask, mmskip.LayerMaskConfig(fill_gradient=flows))
        outs.append(y.detach())
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*outs) and not torch.allclose(*grads)


def test_soft_masks_have_gradients_and_end_in_the_hard_ones():
    model, x = net("basic"), images(1, SIZE)
    soft = mmskip.LayerMaskConfig(soft=True)
    hard = patch_mask(1, SIZE, 8, 0.5)
    torch.testing.assert_close(run(model, x, hard, soft), run(model, x, hard))
    mask = torch.full((1, 1, 8, 8), 0.6, requires_grad=True)
    y = run(model, x, mask, soft)
    (grad,) = torch.autograd.grad(y.sum(), mask)
    assert torch.isfinite(grad).all() and (grad != 0).all()
    assert not torch.allclose(y, model(x))


@pytest.mark.parametrize(("config", "kept"), [({}, 5), ({"add": "or"}, 14)])
def test_the_merge_rule_of_sums(config, kept):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            x = self.conv(x) * 0 + 1
            return x[:, :, :, :16] + x[:, :, :, 16:]

    mask = torch.zeros(1, 1, 8, 32)
    # behind the convolution columns 3 to 16 and 27 to 31 are kept: of one half 3 to 15, of the other 0 and 11 to 15
    mask[..., 4:16], mask[..., 28:] = 1, 1
    with torch.no_grad():
        y = run(Two(), torch.ones(1, 3, 8, 32), mask, mmskip.LayerMaskConfig(**config))
    assert (y != 0).float().mean() == kept / 16


def test_training_statistics_are_those_of_what_is_kept():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    mask, x = torch.ones(2, 1, 16, 16), images(2, 16)
    mask[..., :8] = 0
    model.train()
    run(model, x, mask)
    norm = nn.BatchNorm2d(3)
    norm(x[..., 8:])
    torch.testing.assert_close(model[0].running_mean, norm.running_mean)
    torch.testing.assert_close(model[0].running_var, norm.running_var)


def test_bf16_and_channels_last_and_inference_mode():
    model, mask, x = net("resnet"), varied_mask(SIZE, 4), images(3, SIZE)
    with torch.inference_mode():
        y = run(model, x, mask)
        last = run(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), mask)
        with torch.autocast("cpu", torch.bfloat16):
            half = run(model, x, mask)
    torch.testing.assert_close(last, y, rtol=1e-4, atol=1e-5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.1, atol=0.1)


def test_feature_maps_come_back_plain_and_zero_where_nothing_is_kept():
    import timm

    model = shake(timm.create_model("resnet18", features_only=True, out_indices=(0, 1)), SIZE)
    mask = varied_mask(SIZE, 16)
    maps = run(model, images(3, SIZE), mask)
    assert all(type(m) is torch.Tensor for m in maps)
    assert (maps[0][0, :, :, : SIZE // 4 - 2] == 0).all() and (maps[0][0, :, :, SIZE // 4 :] != 0).any()
    whole = shake(timm.create_model("resnet18"), SIZE)
    with mmskip.masked(whole, mask):
        direct = whole.forward_features(images(3, SIZE))
        poisoned = whole.forward_features(torch.where(mask > 0, images(3, SIZE), float("nan")))
    assert torch.equal(direct, poisoned)


def test_gradient_checkpointing_gives_the_same_gradients():
    import timm

    model, mask = shake(timm.create_model("resnet18", num_classes=5), SIZE), varied_mask(SIZE, 4)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        run(model, images(3, SIZE), mask).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_sees_the_mask():
    model, mask, x = net("basic"), varied_mask(SIZE, 4), images(3, SIZE)
    mmskip.apply_(model, mmskip.LayerMaskConfig())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        with mmskip.masked(model, mask):
            y = compiled(x)
        assert torch.equal(plain, model(x)) and torch.equal(compiled(x), plain)
    torch.testing.assert_close(y, run(model, x, mask))


# --- the model afterwards -------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module):
    return [(name, type(m), sorted(m.__dict__)) for name, m in model.named_modules()], list(model.state_dict())


def test_nothing_remains_on_the_model_even_after_an_error():
    model, x, mask = net("resnet"), images(2, SIZE), patch_mask(2, SIZE, 8, 0.5)
    before, expected = fingerprint(model), model(x)
    run(model, x, mask)
    assert fingerprint(model) == before
    with pytest.raises(ValueError, match="one mask per image"), mmskip.masked(model, patch_mask(3, SIZE, 8, 0.5)):
        model(x)
    assert fingerprint(model) == before and torch.equal(model(x), expected)


def test_apply_remove_save_load_and_copy(tmp_path):
    config = mmskip.LayerMaskConfig(padding="none")
    model, x, mask = net("resnet"), images(2, SIZE), patch_mask(2, SIZE, 8, 0.5)
    before, plain, expected = fingerprint(model), model(x), run(model, x, mask, config)
    mmskip.apply_(model, config)
    assert mmskip.applied(model) == [config]
    assert torch.equal(model(x), plain) and torch.equal(run(model, x, mask), expected)
    assert torch.equal(run(copy.deepcopy(model), x, mask), expected)
    mmskip.save(model, tmp_path)
    other = mmskip.load_(net("resnet"), tmp_path)
    assert torch.equal(run(other, x, mask), expected)
    with pytest.raises(ValueError, match=r"carries LayerMaskConfig.*remove_"):
        run(model, x, mask, mmskip.LayerMaskConfig())
    with pytest.raises(ValueError, match=r"input\.mask.*remove_"):
        mmskip.apply_(model, config)
    mmskip.remove_(model)
    assert fingerprint(model) == before and torch.equal(model(x), plain)


def test_the_config_round_trips_through_json_and_cannot_be_changed():
    config = mmskip.LayerMaskConfig(padding="partial", iterations=3, concat="or")
    assert mmskip.LayerMaskConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(AttributeError):
        config.padding = "none"
    with pytest.raises(ValueError, match="no pad;"):
        mmskip.LayerMaskConfig.from_dict({"pad": "none"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"padding": "zeros"}, "padding is 'zeros'; expected one of neighbour, none, partial"),
        ({"iterations": -1}, "iterations is -1; expected an integer >= 0"),
        ({"iterations": 1.5}, "iterations is 1.5"),
        ({"add": "majority"}, "add is 'majority'; expected one of and, or"),
        ({"concat": "mean"}, "concat is 'mean'; expected one of auto"),
        ({"soft": 1}, "soft is 1; expected true or false"),
    ],
)
def test_bad_settings_name_field_value_and_range(values, message):
    with pytest.raises(ValueError, match=message):
        mmskip.LayerMaskConfig(**values)


def test_a_whole_network_of_torchvision_trains_under_masks():
    model = resnet18(num_classes=3)
    x, mask, target = images(4, SIZE), patch_mask(4, SIZE, 8, 0.4), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(run(model, x, mask), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_reference_knows_the_papers_example():
    x, m = torch.tensor([[1.0, 2.0, 9.0]]).reshape(1, 1, 1, 3), torch.tensor([[1.0, 1.0, 0.0]]).reshape(1, 1, 1, 3)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1] = 1
    with Naive():
        y = F.conv2d(masked_like(x, m), weight, padding=1)
    assert y.flatten().tolist() == pytest.approx([3.0, 5.0, 4.0], abs=1e-4)  # 9 is replaced by its neighbour 2


BAD = {"padding": "zero", "iterations": -1, "add": "xor", "concat": "xor", "soft": 1, "fill_gradient": None}
CONTRACT = [
    contract.Case(contract.CNN, mmskip.LayerMaskConfig(), None, BAD, why="the mask decides: see the next case"),
    contract.Case(contract.CNN_UNMASKED, mmskip.LayerMaskConfig(), mmskip.LayerMaskConfig(), BAD, exact=True),
]
