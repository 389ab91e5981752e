"""Skip scales on every kind of network with skips, against concatenations scaled in place."""

import copy
import math

import contract
import pytest
import torch
from tiny_unets import STAGED, TOKENS, UNETS, UserUNet, inputs, output, scaled_concatenations, tiny_unet
from torch import nn

import mmskip
from mmskip import swap
from mmskip.families import find
from mmskip.families.unet import SkipSite, UNetView, describe_unet
from mmskip.methods.freeu import PartState, _amplify
from mmskip.methods.skip_scale import JointState, NoiseLevel, _rho, ddpm_sigmas, measure_skip_norms


def count(unet):
    return len(find(unet, ("unet",)).skips)


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_scale_one_is_the_base_model_bit_for_bit_and_nothing_remains(name):
    unet, arguments = tiny_unet(name), inputs(name)
    expected, keys = output(unet, arguments), list(unet.state_dict())
    classes = [(n, type(m), set(m.__dict__)) for n, m in unet.named_modules()]
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=1.0))
    assert torch.equal(output(unet, arguments), expected) and list(unet.state_dict()) == keys
    mmskip.remove_(unet)
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=1.0, schedule="decreasing"))
    assert torch.equal(output(unet, arguments), expected)
    mmskip.remove_(unet)
    assert [(n, type(m), set(m.__dict__)) for n, m in unet.named_modules()] == classes
    assert torch.equal(output(unet, arguments), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_scales_equal_scaled_concatenations(name):
    unet, arguments = tiny_unet(name), inputs(name)
    scales = [0.3 + 0.2 * i for i in range(count(unet))]
    with scaled_concatenations(name, scales) as reference:
        expected = output(unet, arguments)
    assert reference.seen == len(scales)
    plain = output(unet, arguments)
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=scales))
    found = output(unet, arguments)
    assert torch.equal(found, expected) and not torch.allclose(found, plain, atol=1e-4)


def rho_at(config, rho, times):
    """The schedules, written down sample by sample."""
    values = []
    for t in times:
        if config.levels == "edm":
            sigma = math.exp(4 * t)
            u = math.log(sigma / config.sigma_min) / math.log(config.sigma_max / config.sigma_min)
        else:
            u, kept = t / (config.num_timesteps - 1), 1.0
            for step in range(int(t) + 1):
                beta = config.beta_start + (config.beta_end - config.beta_start) * step / (config.num_timesteps - 1)
                kept *= 1 - beta
            sigma = math.sqrt((1 - kept) / kept)
        if config.schedule == "window":
            values.append(rho if config.window[0] <= sigma <= config.window[1] else 1.0)
        elif config.schedule == "increasing" or config.prediction == "epsilon":
            values.append(rho + (1 - rho) * u)
        else:
            values.append(1 + (rho - 1) * u)
    return torch.tensor(values)


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "increasing"},
        {"schedule": "decreasing"},
        {"schedule": "auto", "prediction": "epsilon"},
        {"schedule": "auto", "prediction": "sample", "levels": "edm"},
        {"schedule": "window", "window": [0.0, 2.0]},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_schedules_equal_the_reference_sample_by_sample(name, settings):
    config = mmskip.SkipScaleConfig(deepest=0.4, shallowest=0.9, **settings)
    times = (-1.0, 0.4) if config.levels == "edm" else (40, 700)
    unet, arguments = tiny_unet(name), inputs(name, timestep=times)
    scales = [rho_at(config, rho, times) for rho in config.scales(count(unet))]
    with scaled_concatenations(name, scales):
        expected = output(unet, arguments)
    mmskip.apply_(unet, config)
    torch.testing.assert_close(output(unet, arguments), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_window_holds_the_noise_levels_at_its_ends():
    # ln(sigma) / 4 in fp32 comes back below .002 and above others
    for low, high in ((0.002, 20.0), (0.002, 80.0), (0.01, 3.0), (0.03, 7.0), (0.3, 50.0)):
        levels = {"levels": "edm", "sigma_min": low, "sigma_max": high}
        for window, expected in (((low, high), [0.5, 0.5, 0.5]), ((1.5 * low, 0.9 * high), [1.0, 0.5, 1.0])):
            config = mmskip.SkipScaleConfig(scale=0.5, schedule="window", window=window, **levels)
            t_B = torch.tensor([low, 1.0, high]).log() / 4
            state = JointState(config, 0.5, None, NoiseLevel(t_B, (4 * t_B).exp()))
            assert _rho(state, torch.zeros(3, 1)).flatten().tolist() == expected


@torch.no_grad()
def test_a_number_as_timestep_serves_the_whole_batch():
    unet = mmskip.apply_(tiny_unet("unet2d"), mmskip.SkipScaleConfig(scale=0.5, schedule="decreasing"))
    assert torch.equal(
        output(unet, inputs("unet2d", timestep=300)), output(unet, inputs("unet2d", timestep=(300, 300)))
    )


class OnePath(nn.Module):
    """A residual block of which only one path sees a scaled skip, written out."""

    def __init__(self, block, start, rho, path):
        super().__init__()
        self.block, self.start, self.rho, self.path = block, start, rho, path

    def forward(self, x, temb):
        block = self.block
        scaled = torch.cat([x[:, : self.start], self.rho * x[:, self.start :]], 1)
        seen, passed = (scaled, x) if self.path == "norm" else (x, scaled)
        h = block.conv1(block.nonlinearity(block.norm1(seen)))
        h = h + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
        h = block.conv2(block.nonlinearity(block.norm2(h)))
        return (block.conv_shortcut(passed) + h) / block.output_scale_factor


@torch.no_grad()
@pytest.mark.parametrize("path", ["norm", "residual"])
def test_one_path_alone_sees_the_scale(path):
    unet, arguments = tiny_unet("unet2d"), inputs("unet2d")
    reference = copy.deepcopy(unet)
    skips = iter(find(unet, ("unet",)).skips)
    for stage in reference.up_blocks:
        for index, block in enumerate(stage.resnets):
            stage.resnets[index] = OnePath(block, next(skips).start, 0.5, path)
    expected = output(reference, arguments)
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5, target=path))
    torch.testing.assert_close(output(unet, arguments), expected, atol=1e-5, rtol=1e-5)
    whole = mmskip.apply_(tiny_unet("unet2d"), mmskip.SkipScaleConfig(scale=0.5))
    assert not torch.allclose(output(whole, arguments), expected, atol=1e-4)


def test_courses_of_the_scale():
    def course(**settings):
        return mmskip.SkipScaleConfig(**settings).scales(4)

    ends = {"deepest": 0.5, "shallowest": 1.0}
    assert course(scale=0.8) == (0.8,) * 4
    assert course(**ends) == pytest.approx((0.5, 0.5 + 1 / 6, 0.5 + 2 / 6, 1.0))
    assert course(**ends, spacing="from_deepest") == pytest.approx((0.5, 0.625, 0.75, 0.875))
    assert course(**ends, spacing="to_shallowest") == pytest.approx((0.625, 0.75, 0.875, 1.0))
    assert course(kappa=0.5) == (0.125, 0.25, 0.5, 1.0)


def test_gradients_equal_those_of_the_reference_also_with_checkpointing():
    def gradients(unet):
        unet.zero_grad()
        output(unet, arguments).square().sum().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    unet, arguments = tiny_unet("unet2d").train(), inputs("unet2d")
    with scaled_concatenations("unet2d", [0.6] * 4):
        expected = gradients(unet)
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.6))
    torch.testing.assert_close(gradients(unet), expected)
    unet.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(unet), expected)


@torch.no_grad()
def test_a_concatenation_that_others_may_read_is_not_written_to():
    """A user's network may keep it; without gradients the others' are scaled where they lie."""
    unet, x = UserUNet().eval(), torch.randn(2, 3, 8, 8)
    kept = []
    unet.up2.register_forward_pre_hook(lambda module, args: kept.append((args[0], args[0].clone())))
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5))
    with torch.no_grad():
        unet(x, 10)
    assert torch.equal(*kept[0])


def test_controlnet_residuals_are_scaled_with_the_skips_they_join():
    unet, arguments = tiny_unet("unet2d_condition"), inputs("unet2d_condition")
    shapes = []
    for channels, size in ((8, 16), (8, 16), (8, 16), (8, 8), (16, 8), (16, 8)):
        shapes.append(torch.randn(2, channels, size, size))
    arguments |= {"down_block_additional_residuals": shapes, "mid_block_additional_residual": torch.randn(2, 16, 8, 8)}
    scales = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    with scaled_concatenations("unet2d_condition", scales):
        expected = output(unet, arguments)
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=scales))
    assert torch.equal(output(unet, arguments), expected)


@torch.no_grad()
def test_attention_slicing_and_channels_last_keep_working():
    unet, arguments = tiny_unet("unet2d_condition"), inputs("unet2d_condition")
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.6))
    expected = output(unet, arguments)
    unet.set_attention_slice("max")
    unet.to(memory_format=torch.channels_last)
    torch.testing.assert_close(output(unet, arguments), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_in_both_orders(order):
    from peft import LoraConfig

    def build(scaled):
        unet = tiny_unet("unet2d_condition")
        config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
        if scaled and order == "after":
            mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5))
        torch.manual_seed(3)
        unet.add_adapter(config)
        if scaled and order == "before":
            mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5))
        return unet

    arguments = inputs("unet2d_condition")
    with scaled_concatenations("unet2d_condition", [0.5] * 6):
        expected = output(build(False), arguments)
    scaled = build(True)
    assert list(scaled.state_dict()) == list(build(False).state_dict())
    torch.testing.assert_close(output(scaled, arguments), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_deepcopy_save_and_load(tmp_path):
    config = mmskip.SkipScaleConfig(deepest=0.5, shallowest=0.8, schedule="window", window=[0.1, 9.0])
    unet, arguments = mmskip.apply_(tiny_unet("unet2d"), config), inputs("unet2d")
    expected = output(unet, arguments)
    mmskip.save(unet, tmp_path)
    twin = copy.deepcopy(unet)
    mmskip.remove_(unet)
    assert torch.equal(output(twin, arguments), expected)
    assert not torch.equal(output(unet, arguments), expected)
    assert torch.equal(output(mmskip.load_(unet, tmp_path), arguments), expected)
    assert mmskip.applied(unet) == [config]


def test_an_error_half_way_leaves_the_network_as_it_was(monkeypatch):
    unet = tiny_unet("unet2d")
    classes, original, calls = [type(m) for m in unet.modules()], swap.swap, []

    def failing(change):
        calls.append(change)
        if len(calls) == 3:
            raise RuntimeError("boom")
        original(change)

    monkeypatch.setattr(swap, "swap", failing)
    with pytest.raises(RuntimeError, match="boom"):
        mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5))
    assert [type(m) for m in unet.modules()] == classes and mmskip.applied(unet) == []


@torch.no_grad()
@pytest.mark.slow
def test_a_constant_scale_compiles_into_one_graph():
    unet, arguments = mmskip.apply_(tiny_unet("unet2d"), mmskip.SkipScaleConfig(scale=0.5)), inputs("unet2d")
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(compiled, arguments), output(unet, arguments), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_scales_in_full_precision():
    unet = mmskip.apply_(tiny_unet("unet2d").bfloat16(), mmskip.SkipScaleConfig(scale=0.777))
    arguments = inputs("unet2d")
    arguments["sample"] = arguments["sample"].bfloat16()
    found = output(unet, arguments)
    mmskip.remove_(unet)
    with scaled_concatenations("unet2d", [0.777] * 4):
        assert torch.equal(found, output(unet, arguments))


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_skip_norms_measure_skip_over_decoder_features(name):
    unet, arguments = tiny_unet(name), inputs(name)
    parts = []

    def record(module, args, kwargs):
        parts.append(args[0] if args else kwargs["input_tensor"])

    view = find(unet, ("unet",))
    handles = [skip.joint.register_forward_pre_hook(record, with_kwargs=True) for skip in view.skips]
    output(unet, arguments)
    for handle in handles:
        handle.remove()
    expected = []
    for x, skip in zip(parts, view.skips, strict=True):
        rows = x.movedim(skip.dim, 1).flatten(2)
        own = [c for c in range(skip.channels) if skip.start <= c < skip.stop]
        up = [c for c in range(skip.channels) if not skip.start <= c < skip.stop]
        expected.append(sum(float(row[own].norm() / row[up].norm()) for row in rows) / len(rows))
    with pytest.warns(FutureWarning, match="measure_skip_norms"):
        assert mmskip.skip_norms(unet, **arguments) == measure_skip_norms(unet, **arguments)
    found = measure_skip_norms(unet, **arguments)
    assert list(found) == [f"skip.{i}" for i in range(len(expected))]
    assert list(found.values()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of the three"),
        ({"scale": 0.5, "kappa": 0.9}, "exactly one of the three"),
        ({"deepest": 0.5}, "both ends"),
        ({"scale": -0.1}, "scale is -0.1; expected a number >= 0"),
        ({"scale": []}, "scale is empty"),
        ({"scale": math.nan}, "scale is nan"),
        ({"kappa": 0}, "kappa is 0; expected a number > 0"),
        ({"scale": 0.5, "target": "both paths"}, "target is 'both paths'; expected one of both, norm, residual"),
        ({"scale": 0.5, "schedule": "auto"}, "schedule is 'auto' and prediction is None"),
        ({"scale": 0.5, "window": [1, 2]}, "give both or neither"),
        ({"scale": 0.5, "schedule": "window", "window": [3, 2]}, "0 <= least < largest"),
        ({"scale": 0.5, "schedule": "window", "window": [500.0, 600.0]}, "would never be entered"),
        ({"scale": 0.5, "num_timesteps": 1}, "num_timesteps is 1"),
        ({"scale": 0.5, "beta_end": 2.0}, r"0 < beta_start < beta_end < 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mmskip.SkipScaleConfig(**settings)


def test_what_does_not_fit_the_model_is_refused_before_anything_changes():
    unet = tiny_unet("unet2d")
    with pytest.raises(ValueError, match="scale has 3 values; expected 4"):
        mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=[1, 1, 1]))
    with pytest.raises(ValueError, match="no norm path"):
        mmskip.apply_(tiny_unet("user"), mmskip.SkipScaleConfig(scale=0.5, target="norm"))
    with pytest.raises(ValueError, match=r"needs skip connections.*Sequential has none"):
        mmskip.apply_(nn.Sequential(nn.Linear(2, 2)), mmskip.SkipScaleConfig(scale=0.5))
    mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5))
    with pytest.raises(ValueError, match=r"do not compose: both claim skip\.0"):
        mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.6))


def test_a_wrong_description_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.up(torch.cat([x, x], 1))

    describe_unet(Net)(lambda net: UNetView(net, (SkipSite(net.up, 2, 4, 4),), timestep="t"))
    with pytest.raises(ValueError, match="has no argument 't'"):
        mmskip.apply_(Net(), mmskip.SkipScaleConfig(scale=0.5))
    describe_unet(Net)(lambda net: UNetView(net, (SkipSite(net.up, 2, 6, 6),), timestep=None))
    with pytest.raises(RuntimeError, match=r"got 4 channels.*concatenation of 6"):
        mmskip.apply_(Net(), mmskip.SkipScaleConfig(scale=0.5))(torch.randn(1, 2, 4, 4))
    with pytest.raises(ValueError, match="has no argument for its noise level"):
        mmskip.apply_(Net(), mmskip.SkipScaleConfig(scale=0.5, schedule="increasing"))


def test_sigmas_are_those_of_the_scheduler():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    config = mmskip.SkipScaleConfig(scale=1, beta_start=0.00085, beta_end=0.012, scaled_betas=True)
    expected = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    torch.testing.assert_close(ddpm_sigmas(config).float(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_freeu_equals_that_of_diffusers():
    unet, arguments = tiny_unet("unet2d_condition"), inputs("unet2d_condition")
    plain = output(unet, arguments)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    expected = output(unet, arguments)
    unet.disable_freeu()
    mmskip.apply_(unet, mmskip.FreeUConfig(b=(1.4, 1.6), s=(0.9, 0.2), content_dependent=False))
    torch.testing.assert_close(output(unet, arguments), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)
    mmskip.remove_(unet)
    assert torch.equal(output(unet, arguments), plain)


@torch.no_grad()
@pytest.mark.parametrize("name", STAGED)
def test_freeu_by_content_touches_half_of_the_features_by_their_mean(name):
    unet, arguments = tiny_unet(name), inputs(name)
    skip = find(unet, ("unet",)).skips[-1]
    stage = skip.stage
    dials = tuple(1.0 if i < stage else 1.7 for i in range(stage + 1))
    mmskip.apply_(unet, mmskip.FreeUConfig(b=dials, s=(1.0,) * len(dials)))
    x = torch.randn(2, skip.channels, 8, 8)
    found = _amplify(x, PartState(skip, 1.7, True))
    up = x[:, : skip.start]
    for row in range(2):
        mean = up[row].mean(0)
        h = (mean - mean.min()) / (mean.max() - mean.min())
        half = skip.start // 2
        torch.testing.assert_close(found[row, :half], up[row, :half] * (0.7 * h + 1))
        assert torch.equal(found[row, half:], x[row, half:])
    assert torch.isfinite(output(unet, arguments)).all()


@torch.no_grad()
def test_freeu_without_its_skip_dial_composes_with_a_scale():
    unet, arguments = tiny_unet("unet2d_condition"), inputs("unet2d_condition")
    free = mmskip.FreeUConfig(b=(1.4, 1.6), s=(1.0, 1.0), content_dependent=False)
    unet.enable_freeu(s1=1.0, s2=1.0, b1=1.4, b2=1.6)
    with scaled_concatenations("unet2d_condition", [0.5] * 6):
        expected = output(unet, arguments)
    unet.disable_freeu()
    for order in ([free, mmskip.SkipScaleConfig(scale=0.5)], [mmskip.SkipScaleConfig(scale=0.5), free]):
        for config in order:
            mmskip.apply_(unet, config)
        torch.testing.assert_close(output(unet, arguments), expected, atol=1e-5, rtol=1e-5)
        mmskip.remove_(unet)
    mmskip.apply_(unet, mmskip.FreeUConfig())
    with pytest.raises(ValueError, match=r"do not compose: both claim skip\.0"):
        mmskip.apply_(unet, mmskip.SkipScaleConfig(scale=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b": (), "s": ()}, "one each per stage"),
        ({"b": (1.2,), "s": (1.0, 0.9)}, "b has 1 values and s has 2"),
        ({"b": (-1.0, 1.0)}, r"b\[0\] is -1.0; expected a number >= 0"),
    ],
)
def test_bad_freeu_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mmskip.FreeUConfig(**settings)


@pytest.mark.parametrize("name", TOKENS)
def test_freeu_refuses_tokens(name):
    with pytest.raises(ValueError, match="FreeU needs feature maps"):
        mmskip.apply_(tiny_unet(name), mmskip.FreeUConfig())


CONTRACT = [
    contract.Case(
        contract.UNET,
        mmskip.SkipScaleConfig(scale=0.5),
        mmskip.SkipScaleConfig(scale=1.0),
        {"scale": -1, "target": "none"},
    ),
    contract.Case(
        contract.UNET,
        mmskip.FreeUConfig(b=(1.4, 1.6), s=(0.9, 0.2)),
        None,
        {"b": (-1, 1), "s": (-1, 1)},
        why="settings that change nothing are refused",
    ),
]
