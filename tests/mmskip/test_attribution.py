"""The adapters, against the real packages: a network that looks at one corner must be found out by each."""

import numpy as np
import pytest
import torch
from cnn_zoo import images
from torch import nn

import mmskip
from mmskip import attribution as interpret

SIZE, GRID = 32, 4
CORNER = 5  # the segment that decides: row 1, column 1
SEGMENTS = torch.arange(GRID * GRID).reshape(GRID, GRID).repeat_interleave(SIZE // GRID, 0).repeat_interleave(8, 1)


class Corner(nn.Module):
    """Class 0 by the brightness of one segment; an instrument whose explanation is known."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 3, padding=1, bias=False)
        nn.init.zeros_(self.conv.weight)
        self.conv.weight.data[:, :, 1, 1] = 1
        self.register_buffer("where", (SEGMENTS == CORNER).float())

    def forward(self, x):
        y = (self.conv(x) * self.where).mean((2, 3)) * 20
        return torch.cat([y, -y], 1)


MODEL, IMAGE = Corner().eval(), images(1, SIZE).abs() + 0.5


def best(weights) -> int:
    return int(np.abs(np.asarray(weights)).argmax())


@pytest.mark.parametrize("name", ["FeatureAblation", "KernelShap", "Lime", "Occlusion"])
def test_captum(name):
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    forward, ones = interpret.masked_forward(MODEL), torch.ones(1, 1, SIZE, SIZE)
    options = {"feature_mask": SEGMENTS[None, None]}
    if name == "Occlusion":
        options = {"sliding_window_shapes": (1, 8, 8), "strides": (1, 8, 8)}
    if name in ("KernelShap", "Lime"):
        options["n_samples"] = 200
    found = getattr(captum, name)(forward).attribute(ones, additional_forward_args=(IMAGE,), target=0, **options)
    assert SEGMENTS.flatten()[best(found[0, 0].flatten())] == CORNER


def test_captum_lime_base():
    captum = pytest.importorskip("captum.attr")
    linear = pytest.importorskip("captum._utils.models.linear_model")
    torch.manual_seed(0)
    lime = captum.LimeBase(
        interpret.masked_forward(MODEL),
        linear.SkLearnLasso(alpha=1e-4),
        similarity_func=lambda image, other, rep, **kwargs: 1.0,
        perturb_func=lambda image, **kwargs: torch.bernoulli(torch.full((1, GRID * GRID), 0.5)),
        perturb_interpretable_space=True,
        from_interp_rep_transform=lambda rep, image, **kwargs: interpret.segment_masks(rep, SEGMENTS),
        to_interp_rep_transform=None,
    )
    found = lime.attribute(torch.ones(1, 1, SIZE, SIZE), additional_forward_args=(IMAGE,), target=0, n_samples=100)
    assert best(found.flatten()) == CORNER


def test_shap():
    shap = pytest.importorskip("shap")
    explainer = shap.Explainer(interpret.shap_model(MODEL), interpret.shap_masker(SEGMENTS), algorithm="permutation")
    values = explainer(IMAGE.numpy(), max_evals=2 * GRID * GRID + 1, silent=True).values
    assert best(values[0, :, 0]) == CORNER
    whole, none = (interpret.shap_model(MODEL)(IMAGE.numpy(), np.full((1, 1, SIZE, SIZE), on)) for on in (1, 0))
    assert values[0, :, 0].sum() == pytest.approx(float(whole[0, 0] - none[0, 0]), abs=1e-3), "SHAP's efficiency"


def test_lime():
    lime_image = pytest.importorskip("lime.lime_image")
    found = lime_image.LimeImageExplainer(random_state=0).explain_instance(
        IMAGE[0].permute(1, 2, 0).double().numpy(),
        interpret.lime_classifier(MODEL),
        labels=(0,),
        top_labels=None,
        hide_color=interpret.HIDDEN,
        num_samples=200,
        segmentation_fn=lambda image: SEGMENTS.numpy(),
    )
    assert max(found.local_exp[0], key=lambda item: abs(item[1]))[0] == CORNER


def test_rise():
    heat = interpret.rise(MODEL, IMAGE / 10, target=0, masks=300, grid=4)
    inside, outside = heat[SEGMENTS == CORNER].mean(), heat[(SEGMENTS % 4 == 3)].mean()
    assert inside > outside + 0.01


def test_the_forward_of_the_adapters_is_masked():
    mask = (SEGMENTS != CORNER).float()[None, None]
    poisoned = torch.where(mask > 0, IMAGE, float("nan"))
    forward = interpret.masked_forward(MODEL)
    assert torch.equal(forward(mask, poisoned), forward(mask, IMAGE))
    several = forward(mask.expand(3, -1, -1, -1), IMAGE)
    with mmskip.masked(MODEL, mask):
        torch.testing.assert_close(several, MODEL(IMAGE).expand(3, -1))
    classify = interpret.lime_classifier(MODEL)
    assert np.isfinite(classify(poisoned.permute(0, 2, 3, 1).numpy())).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpret.segment_masks(torch.ones(2, 3), SEGMENTS), r"expected \[B, 16\]"),
        (lambda: interpret.rise(MODEL, IMAGE[0], 0), r"expected \[1, C, H, W\]"),
        (lambda: interpret.rise(MODEL, IMAGE, 0, keep=1.0), "keep 1.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
