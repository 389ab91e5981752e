"""Turn pictures into the inputs of a model."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_input(image: np.ndarray, resize: int | None, crop: int) -> Tensor:
    """[3, crop, crop] in [0, 1]: the short side resized to `resize` (None: the uncropped image to the crop), the middle
    cut out."""
    picture = Image.fromarray(image)
    if resize is None:
        picture = picture.resize((crop, crop), Image.Resampling.BILINEAR) if picture.size != (crop, crop) else picture
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    scale = resize / min(picture.size)
    width, height = (max(crop, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - crop) // 2, (height - crop) // 2
    return torch.from_numpy(np.array(picture.crop((left, top, left + crop, top + crop)))).permute(2, 0, 1) / 255
