"""Reuse of deep features between sampling steps."""

import copy

import contract
import pytest
import torch
from tiny_unets import STAGED, inputs, output, tiny_unet

import mmskip
from mmskip.families import find


def deep_stages(unet, depth=1):
    view = find(unet, ("unet",))
    middle = [] if view.middle is None else [view.middle]
    return [*view.encoder[depth:], *middle, *view.decoder[: len(view.decoder) - depth]]


def calls_of(unet, name, times, reference=None):
    """Outputs at a course of timesteps."""
    outputs = []
    for index, t in enumerate(times):
        if reference is not None:
            reference(index)
        outputs.append(output(unet, inputs(name, timestep=t, seed=index)))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("name", STAGED)
def test_interval_one_is_the_base_model_bit_for_bit(name):
    unet = tiny_unet(name)
    expected = calls_of(unet, name, [900, 600, 300])
    mmskip.apply_(unet, mmskip.StepCacheConfig(interval=1))
    assert all(map(torch.equal, calls_of(unet, name, [900, 600, 300]), expected))


@torch.no_grad()
@pytest.mark.parametrize("name", STAGED)
def test_between_full_steps_the_deep_stages_return_what_they_returned(name):
    times, full = [900, 700, 500, 300, 100], (0, 3)
    reference = tiny_unet(name)
    remembered = {}
    now = {"full": True}

    def replay(stage, args, kwargs, result):
        if now["full"]:
            remembered[stage] = result
        return remembered[stage]

    for stage in deep_stages(reference):
        stage.register_forward_hook(replay, with_kwargs=True)
    expected = calls_of(reference, name, times, lambda index: now.update(full=index in full))
    unet = mmskip.apply_(tiny_unet(name), mmskip.StepCacheConfig(interval=3))
    ran = []
    deepest = deep_stages(unet)[0].resnets[0]
    deepest.register_forward_hook(lambda *_: ran.append(1))
    found = calls_of(unet, name, times)
    assert all(map(torch.equal, found, expected)) and len(ran) == len(full)
    assert not torch.equal(found[1], calls_of(tiny_unet(name), name, times)[1])


@torch.no_grad()
def test_guidance_in_two_calls_equals_guidance_in_one():
    name, times = "unet2d_condition", [900, 700, 500, 300]
    together = mmskip.apply_(tiny_unet(name), mmskip.StepCacheConfig(interval=2))
    apart = mmskip.apply_(tiny_unet(name), mmskip.StepCacheConfig(interval=2))
    for index, t in enumerate(times):
        arguments = inputs(name, timestep=t, seed=index)
        both = output(together, arguments)
        for row in range(2):
            alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            torch.testing.assert_close(output(apart, alone), both[row : row + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_repeated_timesteps_and_new_trajectories_start_fresh():
    name = "unet2d"
    base, unet = tiny_unet(name), mmskip.apply_(tiny_unet(name), mmskip.StepCacheConfig(interval=2))
    # a timestep seen twice, as PNDM and Heun's solver do: the second call has no features of its own yet
    for first in (900, 950):
        course = [first, 700, 700, 500]
        expected, found = calls_of(base, name, course), calls_of(unet, name, course)
        same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
        assert same == [True, False, True, True]
    # another size is another trajectory, whatever the timestep
    small = {"sample": torch.randn(1, 3, 8, 8), "timestep": 400}
    assert torch.equal(output(unet, small), output(base, small))
    # many trajectories of one step each: all in full, and no more features kept than guidance needs
    for seed in range(6):
        arguments = inputs(name, timestep=999, seed=seed)
        assert torch.equal(output(unet, arguments), output(base, arguments))
    outputs = deep_stages(unet)[0].__dict__["_mmskip_installed"]["CachedStage"][0].outputs
    assert len(outputs) <= 4


@torch.no_grad()
def test_it_composes_with_scales_and_survives_copies(tmp_path):
    name, times = "unet2d", [900, 700, 500]
    scaled = mmskip.apply_(tiny_unet(name), mmskip.SkipScaleConfig(scale=0.5))
    expected = calls_of(scaled, name, times)
    mmskip.apply_(scaled, mmskip.StepCacheConfig(interval=1))
    assert all(map(torch.equal, calls_of(scaled, name, times), expected))
    mmskip.save(scaled, tmp_path)
    assert mmskip.applied(mmskip.load_(tiny_unet(name), tmp_path)) == mmskip.applied(scaled)
    twin = copy.deepcopy(scaled)
    calls_of(twin, name, [800])
    assert all(map(torch.equal, calls_of(scaled, name, times), expected))
    mmskip.remove_(scaled)
    assert all(map(torch.equal, calls_of(scaled, name, times), calls_of(tiny_unet(name), name, times)))


def test_what_does_not_fit_is_refused():
    for settings, message in (({"interval": 0}, "interval is 0"), ({"depth": 0}, "depth is 0")):
        with pytest.raises(ValueError, match=message):
            mmskip.StepCacheConfig(**settings)
    with pytest.raises(ValueError, match="depth is 2; UNet2DModel has 2 stages, so at most 1"):
        mmskip.apply_(tiny_unet("unet2d"), mmskip.StepCacheConfig(depth=2))
    with pytest.raises(ValueError, match="not made of encoder and decoder stages"):
        mmskip.apply_(tiny_unet("hunyuan_dit"), mmskip.StepCacheConfig())
    unet = mmskip.apply_(tiny_unet("unet2d"), mmskip.StepCacheConfig())
    with torch.no_grad(), pytest.raises(ValueError, match="different timesteps"):
        output(unet, inputs("unet2d", timestep=(40, 700)))
    with pytest.raises(RuntimeError, match="remove_ it before training"):
        output(unet.train(), inputs("unet2d", timestep=40))


CONTRACT = [
    contract.Case(
        contract.UNET,
        mmskip.StepCacheConfig(interval=2),
        mmskip.StepCacheConfig(interval=1),
        {"interval": 0, "depth": 0},
    )
]
