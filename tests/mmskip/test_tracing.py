"""Traces say what ran, in every family, and leave nothing behind on the model."""

import pytest
import timm
import tiny_seq2seq
import torch
from cnn_zoo import patch_mask
from tiny_decoders import VOCAB, stream_layout, tiny_decoder
from torch import nn

import mmskip
from mmskip.exits.runs import layers_run
from mmskip.recording import Work, recorder

LAYOUT = stream_layout(3, lead=0).expand(2, -1)
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_nothing_of_a_trace_remains_also_after_an_error():
    model = tiny_decoder("llama")
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), mmskip.trace(model):
        raise RuntimeError("stop")
    assert hooks() == before


def test_a_trace_inside_a_trace_is_refused():
    model = tiny_decoder("llama")
    with mmskip.trace(model), pytest.raises(RuntimeError, match="already"), mmskip.trace(model):
        pass


def test_a_forward_that_fails_is_not_recorded():
    model = tiny_decoder("llama")
    with torch.no_grad(), mmskip.trace(model) as trace:
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model()
        with pytest.raises(IndexError):
            model(torch.tensor([[VOCAB + 1]]))
        model(IDS)
    assert len(trace.forwards) == 1 and len(trace.forwards[0].layers) == 4 and trace.forwards[0].head_rows == 66


def test_what_mechanisms_record_outside_of_a_trace_goes_nowhere():
    assert recorder() is None
    model = tiny_decoder("llama")
    with mmskip.trace(model) as trace:
        recorder().block(model, Work(3))
        recorder().visit(model)
        assert recorder().overhead(sum, [1, 2]) == 3
        with torch.no_grad():
            model(IDS)
    assert [layer.ran for layer in trace.forwards[0].layers] == [66] * 4


def test_a_plan_is_traced_by_its_visits():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.LayerPlanConfig(order=(0, 2, 1, 3), drop_attn=(2,)))
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS)
    assert [(layer.attn, layer.mlp) for layer in trace.forwards[0].layers] == [(66, 66), (66, 66), (0, 66), (66, 66)]
    mmskip.remove_(model)
    mmskip.apply_(model, mmskip.LayerPlanConfig(drop=(1,)))
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS)
    assert trace.forwards[0].ran == ["block.0", "block.2", "block.3"]


@torch.no_grad()
def test_both_stacks_of_an_encoder_decoder_are_traced_also_where_the_encoder_runs_alone():
    model = tiny_seq2seq.build("bart").eval()
    with mmskip.trace(model) as trace:
        model(**tiny_seq2seq.inputs("bart"))
        model.get_encoder()(IDS % 48)
    both, alone = trace.forwards
    sites = [f"{stack}.{index}" for stack in ("encoder", "decoder") for index in range(4)]
    assert [layer.site for layer in both.layers] == sites and [layer.site for layer in alone.layers] == sites[:4]
    assert [layer.tokens for layer in alone.layers] == [66] * 4 and (alone.batch, alone.length) == (2, 33)


@torch.no_grad()
def test_exits_of_every_stack_are_traced():
    model = mmskip.apply_(tiny_seq2seq.build("bart").eval(), mmskip.EarlyExitConfig(encoder=0.9, decoder=-1.0))
    with mmskip.trace(model) as trace:
        model(**tiny_seq2seq.inputs("bart"))
    forward = trace.forwards[0]
    found = layers_run(model)
    assert set(forward.exits) == {"encoder", "decoder"}
    assert all(torch.equal(forward.exits[stack], found[stack]) for stack in found) and (found["decoder"] == 1).all()
    ran = {layer.site: layer.ran for layer in forward.layers}
    assert ran["decoder.0"] > 0 == ran["decoder.1"] and forward.ran[-1] == "decoder.0"
    model.train()
    with mmskip.trace(model) as trace:
        model(**tiny_seq2seq.inputs("bart"))
    assert trace.forwards[0].exits == {} and len(trace.forwards[0].ran) == 8


@torch.no_grad()
def test_a_mask_is_traced_as_the_visible_share_at_every_convolution():
    model = timm.create_model("resnet18").eval()
    with mmskip.trace(model) as trace, mmskip.masked(model, patch_mask(2, 32, 16, 0.5)):
        model(IMAGES)
    layers = {layer.site: layer for layer in trace.forwards[0].layers}
    assert len(layers) == len(mmskip.families.find(model, ("cnn",)).sites("conv"))
    assert 0 < layers["conv.layer1.0.conv1"].visible < 1 and layers["conv.conv1"].tokens == 2 * 16 * 16
    with mmskip.trace(model) as trace:
        model(IMAGES)
    assert all(layer.visible is None for layer in trace.forwards[0].layers)


@torch.no_grad()
def test_stages_taken_from_the_step_cache_are_named_per_call():
    tiny_unets = pytest.importorskip("tiny_unets")
    model = mmskip.apply_(tiny_unets.tiny_unet("unet2d"), mmskip.StepCacheConfig(interval=2))
    with mmskip.trace(model) as trace:
        for time in (900, 600, 300):
            tiny_unets.output(model, tiny_unets.inputs("unet2d", timestep=time))
    assert [forward.reused for forward in trace.forwards] == [[], ["stage.1", "stage.2", "stage.3"], []]
    assert trace.forwards[1].ran == ["stage.0", "stage.4"] and len(trace.forwards[0].ran) == 5


def test_a_model_of_no_family_is_refused_with_every_reason():
    reasons = r"no family fits Linear(.|\n)*cnn: needs a network with 2-d convolutions"
    with pytest.raises(ValueError, match=reasons), mmskip.trace(nn.Linear(2, 2)):
        pass
    assert recorder() is None
