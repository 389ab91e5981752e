"""Layer masking on many architectures: equal to the naive reference, blind to what is hidden, the plain model where
nothing is, and different from painting over."""

import pytest
import timm
import torch
import torchvision
from cnn_zoo import images, shake, varied_mask
from naive_layer_mask import naive_masked

import mmskip

# one per line of timm's source files; those that take long stand below
FAST = """
resnet18 regnety_002 convnext_atto convnextv2_atto mobilenetv2_100 mobilenetv3_small_100 ghostnet_100
dla46_c cs3darknet_focus_s skresnet18 inception_next_atto starnet_s1 tinynet_e
"""
SLOW = """
resnet34d repvgg_a0 ecaresnet26t resnet50 resnext50_32x4d seresnext26d_32x4d resnetblur18 resnetaa50
wide_resnet50_2 resnetrs50 gcresnext26ts resnet50_gn resnetv2_18 resnetv2_50 legacy_seresnet18 regnetx_002
regnetz_005 regnetv_040 convnext_atto_ols convnext_zepto_rms efficientnet_b0 tf_efficientnet_b0
efficientnetv2_rw_t efficientnet_b0_g8_gn mixnet_s mnasnet_small spnasnet_100 fbnetc_100 hardcorenas_a
lcnet_050 lcnetv2_small mobilenetv1_100 mobilenet_edgetpu_v2_xs mobilenetv4_conv_small ghostnetv2_100
ghostnetv3_100 repghostnet_050 densenet121 rdnet_tiny vgg11_bn inception_v3 inception_v4 inception_resnet_v2
legacy_xception xception41 dla34 dla60_res2net hrnet_w18_small cspresnet50 cspresnext50 cspdarknet53 darknet53
cspnext_s gernet_s mobileone_s0 nfnet_l0 eca_nfnet_l0 dm_nfnet_f0 nf_regnet_b0 nf_resnet26 res2net50_26w_4s
resnest14d skresnext50_32x4d rexnet_100 selecsls42b vovnet39a ese_vovnet19b_slim fasternet_t0 hgnet_tiny
hgnetv2_b0 dpn48b dpn68 convmixer_768_32 repvit_m0_9 mambaout_femto fastvit_t8 pnasnet5large nasnetalarge
"""
TORCHVISION = """
alexnet vgg11 resnet18 resnext50_32x4d wide_resnet50_2 squeezenet1_0 squeezenet1_1 densenet121 googlenet inception_v3
shufflenet_v2_x0_5 mobilenet_v2 mobilenet_v3_small mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf
convnext_tiny
"""
FAST_TORCHVISION = ("squeezenet1_1", "shufflenet_v2_x0_5")
NARROW = ("inception", "googlenet", "alexnet", "squeezenet")  # their maps vanish at 64 px

CASES = [pytest.param("timm", name, id=name) for name in FAST.split()]
CASES += [pytest.param("timm", name, id=name, marks=pytest.mark.slow) for name in SLOW.split()]
CASES += [
    pytest.param("tv", n, id=f"tv_{n}", marks=[] if n in FAST_TORCHVISION else pytest.mark.slow)
    for n in TORCHVISION.split()
]


def built(source: str, name: str, size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    if source == "timm":
        return shake(timm.create_model(name, pretrained=False, num_classes=10), size)
    settings = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    if settings:
        settings["init_weights"] = True
    return shake(getattr(torchvision.models, name)(weights=None, num_classes=10, **settings), size)


@pytest.mark.parametrize(("source", "name"), CASES)
def test_hidden_pixels_do_not_exist(source, name):
    size = 96 if any(part in name for part in NARROW) and "next" not in name else 64
    model, mask = built(source, name, size).double(), varied_mask(size).double()
    x = images(3, size).double()
    # inference mode may write under the mask, so it is the harder case; gradients are tested in test_layer_mask.py
    with torch.inference_mode():
        plain = model(x)
        with mmskip.masked(model, mask):
            y = model(x)
            poisoned = model(torch.where(mask > 0, x, float("nan")))
        with mmskip.masked(model, torch.ones_like(mask)):
            whole = model(x)
    with torch.no_grad():
        expected = naive_masked(model, x, mask)
        black = (x.amin((2, 3), keepdim=True), x.mean((2, 3), keepdim=True), 0.0)
        painted = [model(torch.where(mask > 0, x, value)) for value in black]
    assert torch.equal(poisoned, y)
    assert torch.equal(whole, plain)
    scale = expected.abs().max()
    torch.testing.assert_close(y, expected, rtol=0, atol=float(1e-5 * scale))
    torch.testing.assert_close(y[2], plain[2], rtol=1e-9, atol=float(1e-9 * scale))  # its mask is all ones
    for other in painted:
        assert ((other - y)[:2].abs().amax(1) > 1e-3 * scale).all()


def test_there_are_enough_architectures():
    names = [*FAST.split(), *SLOW.split()]
    files = {timm.model_entrypoint(name).__module__ for name in names}
    assert len(set(names)) >= 40 and len(files) >= 20


UNSUPPORTED = {
    "tresnet_m": "SpaceToDepth",
    "swiftformer_xs": "mixes positions",
    "edgenext_xx_small": "attention between positions",
    "vit_tiny_patch16_224": "attention between positions",
    "mixer_s32_224": "no convolution",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_others_are_refused(name):
    model = timm.create_model(name, pretrained=False).eval()
    size = model.default_cfg["input_size"][-1] if "_224" in name else 64
    with pytest.raises(ValueError, match=UNSUPPORTED[name]), mmskip.masked(model, varied_mask(size)):
        model(images(3, size))
    assert "mmskip" not in repr(type(model).__mro__)
