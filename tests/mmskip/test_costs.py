"""Counted costs agree with torch's own counter: the dense model's, and what ran of it under a method."""

import dataclasses

import open_clip
import pytest
import timm
import tiny_seq2seq
import torch
from cnn_zoo import patch_mask
from peft import LoraConfig, get_peft_model
from tiny_decoders import VOCAB, stream_layout, tiny_decoder
from torch import nn
from transformers import CLIPConfig, CLIPModel, DynamicCache, T5ForConditionalGeneration

import mmskip
from mmskip.costs import torch_flops
from mmskip.exits.settings import ExitAt
from mmskip.families import family
from mmskip.families.base import View
from mmskip.meters import Meter
from mmskip.registry import register
from mmskip.swap import replace

LAYOUT = stream_layout(6, lead=0).expand(2, -1)
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def counted(call):
    with torch_flops() as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window", "phi3", "olmo2", "opt"])
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_counted_flops_agree_with_torch(name, keep):
    wide = {"hidden_size": 128, "intermediate_size": 256, "ffn_dim": 256, "word_embed_proj_dim": 128}
    model = tiny_decoder(name, **wide)
    dense = counted(lambda: model(IDS))
    mmskip.apply_(model, mmskip.MoDConfig(keep=keep))
    with torch.no_grad(), mmskip.trace(model) as trace:
        ran = counted(lambda: model(IDS, layout=LAYOUT))
    cost = mmskip.cost(model, trace)
    assert cost.dense_flops == pytest.approx(dense, rel=1e-3)
    assert cost.flops == pytest.approx(ran, rel=3e-3)
    assert cost.ideal_speedup == pytest.approx(dense / ran, rel=3e-3)


def test_counted_flops_of_a_training_step_and_of_lora():
    model = get_peft_model(tiny_decoder("llama", hidden_size=128), LoraConfig(r=4, target_modules="all-linear"))
    mmskip.apply_(model, mmskip.MoDConfig())
    with torch.no_grad(), mmskip.trace(model) as trace:
        ran = counted(lambda: model(input_ids=IDS, layout=LAYOUT))
    assert mmskip.cost(model, trace).flops == pytest.approx(ran, rel=5e-3)
    model.train()
    with mmskip.trace(model) as step:
        model(input_ids=IDS, layout=LAYOUT)
    assert mmskip.cost(model, step).flops == pytest.approx(3 * mmskip.cost(model, trace).flops)


def test_trace_counts_tokens_and_stored_bytes():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(keep=0.2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS, layout=LAYOUT, past_key_values=cache)
        model(torch.tensor([[4], [5]]), past_key_values=cache)
    first, second = trace.forwards
    assert [layer.ran for layer in first.layers] == [132, 36, 132, 36]
    assert [layer.tokens for layer in second.layers] == [2] * 4 and second.layers[1].keys == 19
    stored = [sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) for layer in cache.layers]
    assert [layer.kv_bytes for layer in second.layers] == stored
    cost = mmskip.cost(model, trace)
    assert cost.kv_bytes == sum(stored) and cost.dense_kv_bytes == 4 * stored[0]
    assert cost.kv_bytes / cost.dense_kv_bytes == pytest.approx((67 + 19) / (2 * 67))
    assert "ideal speed-up" in str(cost)
    assert torch.equal(first.layout, LAYOUT)


def test_a_window_bounds_the_dense_bytes_it_is_compared_with():
    model = tiny_decoder("mistral_window")
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS, use_cache=True)
    assert trace.forwards[0].layers[0].kv_bytes == trace.forwards[0].layers[0].dense_kv_bytes


def test_an_empty_trace_is_refused():
    model = tiny_decoder("llama")
    with mmskip.trace(model) as trace:
        pass
    with pytest.raises(ValueError, match="empty"):
        mmskip.cost(model, trace)
    with pytest.raises(TypeError, match=r"got Trace and LlamaForCausalLM; expected.*mmskip.cost\(model, trace\)"):
        mmskip.cost(trace, model)


# --- every other family ----------------------------------------------------------------------------------------------

PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
TEXT = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(3))
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}


def vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=3, embed_dim=32, num_heads=2, num_classes=5
    )


def clip():
    text = {**TOWER, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**TOWER, "image_size": 16, "patch_size": 4}))


def two_towers():
    vision = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16}
    text = {"context_length": 7, "vocab_size": 50, "width": 32, "heads": 2, "layers": 3}
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))


def seq2seq(name):
    def call(model):
        if isinstance(model, T5ForConditionalGeneration):
            return model(input_ids=TEXT, decoder_input_ids=TEXT[:, :4])
        return model(**tiny_seq2seq.inputs(name))

    return lambda: tiny_seq2seq.build(name), call


def cnn(name):
    return lambda: timm.create_model(name, num_classes=7), lambda model: model(IMAGES)


def unet(name, time=40):
    def build():
        return pytest.importorskip("tiny_unets").tiny_unet(name)

    def call(model, time=time):
        import tiny_unets

        return tiny_unets.output(model, tiny_unets.inputs(name, timestep=time))

    return build, call


MODELS = {
    "llama": (lambda: tiny_decoder("llama"), lambda model: model(IDS)),
    "grouped_queries": (lambda: tiny_decoder("qwen3"), lambda model: model(IDS)),
    "mixture_of_experts": (lambda: tiny_decoder("mixtral"), lambda model: model(IDS)),
    "t5": seq2seq("t5"),
    "bart": seq2seq("bart"),
    "vit_timm": (vit, lambda model: model(PIXELS)),
    "clip": (clip, lambda model: model(input_ids=TEXT, pixel_values=PIXELS)),
    "open_clip": (two_towers, lambda model: model(PIXELS, TEXT)),
    "resnet": cnn("resnet18"),
    "mobilenet": cnn("mobilenetv3_small_050"),
    "regnet": cnn("regnetx_002"),
    "unet2d": unet("unet2d"),
    "unet2d_condition": unet("unet2d_condition"),
    "unet3d": unet("unet3d"),
    "user_unet": unet("user"),
}
TOLERANCE = {"mixture_of_experts": 0.01}
"""Relative; the gate of a mixture of experts is not counted. All else agrees exactly."""


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_dense_cost_of_every_family_is_that_of_torchs_counter(name):
    build, call = MODELS[name]
    model = build().eval()
    with mmskip.trace(model) as trace:
        ran = counted(lambda: call(model))
    cost = mmskip.cost(model, trace)
    assert cost.flops == cost.dense_flops == pytest.approx(ran, rel=TOLERANCE.get(name, 1e-9))
    assert cost.ideal_speedup == 1 and cost.activation_bytes == cost.dense_activation_bytes > 0


def test_a_training_step_counts_three_times_in_every_family():
    for build, call in (MODELS["bart"], MODELS["resnet"]):
        model = build().train()
        with mmskip.trace(model) as trace:
            call(model)
        with torch.no_grad(), mmskip.trace(model) as forward:
            call(model)
        assert mmskip.cost(model, trace).flops == pytest.approx(3 * mmskip.cost(model, forward).flops)


def test_operations_are_counted_in_inference_mode_too():
    model = vit().eval()
    with torch.inference_mode(), mmskip.trace(model) as trace:
        model(PIXELS)
    assert mmskip.cost(model, trace).flops == counted(lambda: model(PIXELS))


@torch.no_grad()
def test_generation_of_an_encoder_decoder_counts_the_encoder_and_the_cache():
    model = tiny_seq2seq.build("bart").eval()
    call = {"input_ids": TEXT, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with mmskip.trace(model) as trace:
        ran = counted(lambda: model.generate(**call))
    cost = mmskip.cost(model, trace)
    assert cost.flops == cost.dense_flops == ran
    assert [len(forward.layers) for forward in trace.forwards] == [4] * 6 and trace.forwards[0].length == 7
    # 4 layers hold keys and values of width 32: 5 tokens of the decoder, 7 of the encoder, 3 rows, 4 bytes
    assert cost.kv_bytes == cost.dense_kv_bytes == 4 * 2 * 32 * (5 + 7) * 3 * 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet2d", "unet2d_condition"])
def test_a_step_cache_costs_what_torch_counts_against_full_steps(name):
    (build, call), times = unet(name), (900, 700, 500, 300, 100)
    plain = build()
    dense = counted(lambda: [call(plain, time) for time in times])
    model = mmskip.apply_(build(), mmskip.StepCacheConfig(interval=3))
    with mmskip.trace(model) as trace:
        ran = counted(lambda: [call(model, time) for time in times])
    cost = mmskip.cost(model, trace)
    assert cost.flops == ran and cost.dense_flops == dense and cost.ideal_speedup > 1.1
    with mmskip.trace(model) as middle:
        call(model, 50)
    with pytest.raises(ValueError, match=r"does not show the dense cost of stage\.1.*Begin the trace before the first"):
        mmskip.cost(model, middle)


@torch.no_grad()
def test_scales_of_skips_save_nothing():
    build, call = MODELS["unet2d"]
    for config in (mmskip.SkipScaleConfig(scale=0.7), mmskip.FreeUConfig()):
        model = mmskip.apply_(build(), config)
        with mmskip.trace(model) as trace:
            call(model)
        cost = mmskip.cost(model, trace)
        assert cost.flops == cost.dense_flops == counted(lambda: call(build()))


@torch.no_grad()
def test_a_layer_mask_saves_nothing():
    model = timm.create_model("resnet18", num_classes=7).eval()
    dense = counted(lambda: model(IMAGES))
    with mmskip.trace(model) as trace, mmskip.masked(model, patch_mask(2, 64, 16, 0.5)):
        model(IMAGES)
    cost = mmskip.cost(model, trace)
    assert cost.flops == cost.dense_flops == dense and cost.ideal_speedup == 1


def sharp(build):
    """A model whose states change enough from layer to layer that exits differ."""
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


def generation(ids, padding):
    call = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": padding}
    return lambda model: model.generate(ids, **call)


ROWS = torch.cat([IDS[:, :9], IDS[:, :9].flip(1)])
EXITS = {
    "llama": (lambda: tiny_decoder("llama"), {"decoder": 0.7}, generation(ROWS, 0)),
    "bart": (lambda: tiny_seq2seq.build("bart"), {"encoder": 0.5, "decoder": 0.3}, generation(TEXT, 1)),
    "t5": (lambda: tiny_seq2seq.build("t5"), {"encoder": 0.3, "decoder": 0.3}, generation(TEXT, 1)),
    "vit": (vit, {"encoder": 0.8, "decoder": None}, lambda model: model(PIXELS)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", EXITS)
@pytest.mark.parametrize("cache_policy", ["recompute", "copy", "mask"])
def test_early_exit_costs_what_torch_counts(name, cache_policy):
    build, thresholds, call = EXITS[name]
    plain = sharp(build)
    dense = counted(lambda: call(plain))
    config = mmskip.EarlyExitConfig(**thresholds, cache_policy=cache_policy, compact="always")
    model = mmskip.apply_(sharp(build), config)
    with mmskip.trace(model) as trace:
        ran = counted(lambda: call(model))
    cost = mmskip.cost(model, trace)
    assert cost.flops == ran < cost.dense_flops == dense
    layers = [layer for forward in trace.forwards for layer in forward.layers]
    assert any(layer.ran < layer.tokens for layer in layers)
    if cache_policy == "recompute":
        assert any(0 < layer.ran < layer.tokens for layer in layers), "layers that ran on some rows"
    if name != "vit":
        assert any(layer.ran == 0 for layer in layers), "layers that did not run"
        assert any(layer.filled for layer in layers) == (cache_policy == "recompute")


@torch.no_grad()
def test_the_heads_that_decide_exits_are_billed():
    exits = {"decoder": ExitAt(0.05, "confidence")}
    for name in ("llama", "bart"):
        build, _, call = EXITS[name]
        plain = sharp(build)
        dense = counted(lambda: call(plain))  # noqa: B023
        model = mmskip.apply_(sharp(build), mmskip.EarlyExitConfig(**exits))
        with mmskip.trace(model) as trace:
            ran = counted(lambda: call(model))  # noqa: B023
        cost = mmskip.cost(model, trace)
        assert cost.flops == ran < cost.dense_flops == dense
        assert sum(forward.overhead.flops for forward in trace.forwards) > 0.01 * ran


@torch.no_grad()
@pytest.mark.parametrize("threshold", [1.0, 0.45])
def test_image_and_text_that_run_an_encoder_apart_are_billed_for_their_own_pairs(threshold):
    given = tiny_seq2seq.inputs("florence2")
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    plain = sharp(lambda: tiny_seq2seq.build("florence2"))
    count = plain.get_image_features(pixels).pooler_output.shape[1]
    image = torch.full((2, count), tiny_seq2seq.VOCABULARY - 1)
    ids, mask = torch.cat([image, given["input_ids"]], 1), given["attention_mask"]
    batch = {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones_like(image), mask], 1),
        "pixel_values": pixels,
        "decoder_input_ids": TEXT[:2, :4],
    }
    dense = counted(lambda: plain(**batch))
    config = mmskip.EarlyExitConfig(image=threshold, text=threshold, decoder=None)
    model = mmskip.apply_(sharp(lambda: tiny_seq2seq.build("florence2")), config)
    with mmskip.trace(model) as trace:
        ran = counted(lambda: model(**batch))
    cost = mmskip.cost(model, trace)
    assert cost.flops == ran < cost.dense_flops == pytest.approx(dense, rel=1e-12)
    assert set(trace.forwards[0].exits) == {"image", "text"}


@dataclasses.dataclass(frozen=True)
class Pooled:
    """Depthwise convolutions give way to max-pools."""


@torch.no_grad()
def test_a_replaced_convolution_saves_what_it_cost(monkeypatch):
    monkeypatch.setattr("mmskip.registry._HANDLERS", {})

    @register(Pooled, "cnn")
    def pool(config, view):
        convs = [site for site in view.sites("conv") if site.module.groups == site.module.in_channels > 1]
        pools = [nn.MaxPool2d(c.module.kernel_size, c.module.stride, c.module.padding) for c in convs]
        return [replace(site, pool, view.root) for site, pool in zip(convs, pools, strict=True)]

    model = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    dense = counted(lambda: model(IMAGES))
    mmskip.apply_(model, Pooled())
    with mmskip.trace(model) as trace:
        ran = counted(lambda: model(IMAGES))
    cost = mmskip.cost(model, trace)
    assert cost.flops == ran < cost.dense_flops == dense


# --- families from outside -------------------------------------------------------------------------------------------


class Waves(nn.Module):
    """A network of a plug-in: two blocks that its view names."""

    def __init__(self):
        super().__init__()
        self.waves = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for wave in self.waves:
            x = wave(x)
        return x


class WavesView(View):
    family = "waves"

    def __init__(self, root):
        self.root, self.stacks = root, {"wave": tuple(root.waves)}


@pytest.fixture
def waves(monkeypatch):
    monkeypatch.setattr("mmskip.families._MATCHES", {})

    @family("waves")
    def match(model):
        return (WavesView(model), "") if isinstance(model, Waves) else (None, "no waves")

    return Waves()


def test_a_plug_in_family_is_counted(waves):
    with torch.no_grad(), mmskip.trace(waves) as trace:
        waves(torch.zeros(2, 5, 6))
    assert [(layer.site, layer.tokens) for layer in trace.forwards[0].layers] == [("wave.0", 10), ("wave.1", 10)]
    assert mmskip.cost(waves, trace).flops == 2 * 10 * 6 * 6 * 2


def test_a_plug_in_family_supplies_its_own_meter(waves, monkeypatch):
    class TwicePerToken(Meter):
        def forward_cost(self, forward, trace):
            from mmskip.meters import ForwardCost

            ran = float(sum(2 * layer.ran for layer in forward.layers))
            return ForwardCost(ran, ran, 0, 0)

    monkeypatch.setattr(WavesView, "meter", lambda view: TwicePerToken(view))
    with mmskip.trace(waves) as trace:
        waves(torch.zeros(2, 5, 6))
    assert mmskip.cost(waves, trace).dense_flops == 3 * 40
    monkeypatch.setattr(WavesView, "meter", lambda view: Meter(view))
    with pytest.raises(ValueError, match=r"Meter of family 'waves' does not count: it has no forward_cost"):
        mmskip.cost(waves, trace)
    monkeypatch.setattr(WavesView, "meter", lambda view: None)
    with pytest.raises(ValueError, match=r"family 'waves' has no meter: WavesView\.meter\(\) returned None"):
        mmskip.cost(waves, trace)
