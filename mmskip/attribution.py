"""Layer masking in the hands of captum, SHAP, LIME and RISE: features are taken away, not painted over.

None of these packages is imported unless its adapter is used.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmskip.methods.layer_mask import LayerMaskConfig, masked
from mmskip.utils.extras import require

HIDDEN = float("nan")
"""The `hide_color` for LIME: `lime_classifier` takes pixels of this value as hidden."""


def masked_forward(model: nn.Module, config: LayerMaskConfig | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the model as a function of (mask, image), for captum: the attributed input is the mask.

        from mmskip.attribution import masked_forward

        forward = masked_forward(model)
        FeatureAblation(forward).attribute(mask, additional_forward_args=(image,), feature_mask=segments, target=c)

    with a mask of ones [B, 1, H, W]; the same for `KernelShap`, `Lime`, `ShapleyValueSampling` and `Occlusion`
    (`sliding_window_shapes=(1, h, w)`). `LimeBase` gets the mask from its `from_interp_rep_transform`.

    Args:
        model: a CNN, see `mmskip.masked`.
        config: None: the paper's.
    """

    def forward(mask: Tensor, image: Tensor) -> Tensor:
        if image.shape[0] != mask.shape[0]:
            image = image.repeat_interleave(mask.shape[0] // image.shape[0], 0)
        with masked(model, mask, config):
            return model(image)

    return forward


def segment_masks(on: Tensor, segments: Tensor) -> Tensor:
    """Masks [B, 1, H, W] that keep the chosen segments.

    Args:
        on: [B, S], true where a segment is kept; S is the number of distinct values in `segments`.
        segments: [H, W] or [1, H, W], numbers in any order.

    Raises:
        ValueError: another number of segments.
    """
    numbers, place = torch.unique(segments.reshape(segments.shape[-2:]), return_inverse=True)
    if on.ndim != 2 or on.shape[1] != len(numbers):
        raise ValueError(f"on has shape {tuple(on.shape)}; expected [B, {len(numbers)}], one value per segment.")
    return on.float()[:, place][:, None]


def lime_classifier(
    model: nn.Module, config: LayerMaskConfig | None = None, batch: int = 32
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the `classifier_fn` of LIME's image explainer, which sees images only: hidden pixels come as NaN.

        LimeImageExplainer().explain_instance(image, lime_classifier(model), hide_color=HIDDEN)

    with a floating point image [H, W, 3], scaled as the model takes it (put the normalisation into the model).
    """

    @torch.no_grad()
    def classify(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.stack(list(images))).permute(0, 3, 1, 2)
        like = next(model.parameters())
        x = x.to(like.device, like.dtype)
        parts = []
        for part in x.split(batch):
            with masked(model, ~part.isnan().any(1), config):
                parts.append(model(part).softmax(1))
        return torch.cat(parts).double().cpu().numpy()

    return classify


def shap_model(model: nn.Module, config: LayerMaskConfig | None = None) -> Callable[..., np.ndarray]:
    """Return the model that `shap.Explainer` calls with what `shap_masker` makes: images and masks.

    shap.Explainer(shap_model(model), shap_masker(segments), algorithm="permutation")(image[None])
    """

    @torch.no_grad()
    def predict(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
        like = next(model.parameters())
        x = torch.from_numpy(np.asarray(images)).to(like.device, like.dtype)
        with masked(model, torch.from_numpy(np.asarray(masks)).to(like.device), config):
            return model(x).double().cpu().numpy()

    return predict


def shap_masker(segments: Tensor) -> Any:
    """Return a SHAP masker whose features are segments [H, W] of the image, and which passes (image, mask) on.

    Raises:
        ValueError: shap is not installed.
    """
    shap: Any = require("interpret", "shap", "a SHAP masker")

    count = len(torch.unique(segments))

    class SegmentMasker(shap.maskers.Masker):
        def __init__(self) -> None:
            self.shape = lambda image: (1, count)
            self.mask_shapes = lambda image: [(count,)]
            self.feature_names = lambda image: [[f"segment {i}" for i in range(count)]]

        def __call__(self, mask: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            on = torch.as_tensor(np.broadcast_to(np.asarray(mask, bool), (count,)).copy())
            return np.asarray(image)[None], segment_masks(on[None], segments).numpy()

    return SegmentMasker()


@torch.no_grad()
def rise(
    model: nn.Module,
    image: Tensor,
    target: int,
    masks: int = 500,
    grid: int = 7,
    keep: float = 0.5,
    batch: int = 32,
    seed: int = 0,
    config: LayerMaskConfig | None = None,
) -> Tensor:
    """RISE (Petsiuk et al., BMVC 2018) with hard masks: how much the class's probability owes to each pixel, [H, W].

    Args:
        image: [1, C, H, W].
        target: class index.
        masks: how many random masks, >= 1.
        grid: cells per side of a mask before it is scaled up and shifted, >= 2.
        keep: chance of a cell to be kept, in (0, 1).

    Raises:
        ValueError: a value out of range, or more than one image.
    """
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}; expected [1, C, H, W].")
    if masks < 1 or grid < 2 or not 0 < keep < 1:
        raise ValueError(f"masks is {masks}, grid {grid}, keep {keep}; expected >= 1, >= 2 and a number in (0, 1).")
    generator = torch.Generator().manual_seed(seed)
    h, w = image.shape[-2:]
    cell_h, cell_w = -(-h // grid), -(-w // grid)
    total, kept = image.new_zeros(h, w), image.new_zeros(h, w)
    for start in range(0, masks, batch):
        count = min(batch, masks - start)
        cells = (torch.rand(count, 1, grid + 1, grid + 1, generator=generator) < keep).float()
        wide = F.interpolate(cells, size=((grid + 1) * cell_h, (grid + 1) * cell_w), mode="nearest-exact")
        tops = torch.randint(cell_h, (count,), generator=generator).tolist()
        lefts = torch.randint(cell_w, (count,), generator=generator).tolist()
        m = torch.stack([wide[i, :, t : t + h, s : s + w] for i, (t, s) in enumerate(zip(tops, lefts, strict=True))])
        m = m.to(image)
        with masked(model, m, config):
            score = model(image.expand(count, -1, -1, -1)).softmax(1)[:, target]
        total += (score.reshape(-1, 1, 1) * m[:, 0]).sum(0)
        kept += m[:, 0].sum(0)
    return total / kept.clamp(min=1)
