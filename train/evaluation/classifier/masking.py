"""`python evaluate.py masking`: which way of masking pixels suits a classifier?"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from mmskip.datasets.images import ImageSet, batch_of, open_images
from mmskip.models.classifier import Classifier, Loaded
from mmskip.train.metrics.lime import lime_agreement
from mmskip.train.metrics.missingness import MASKINGS, ORDERS, Normalised, frozen, measure, table
from mmskip.utils.files import write_json, write_text
from mmskip.utils.user_function import call_function


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the evaluation."""
    parser.add_argument(
        "--model",
        required=True,
        help="a timm name, torchvision/NAME, FILE.py:FUNCTION (returns a Loaded), or a .ckpt of Classifier",
    )
    parser.add_argument("--weights", help="state dict of a timm or torchvision model (.safetensors or .pth)")
    parser.add_argument("--pretrained", action="store_true", help="the library's own weights (downloads them)")
    parser.add_argument("--images", default="embedded", help="folder, .npz or embedded (default)")
    parser.add_argument("--split", default="val", help="of images that have splits (default val)")
    parser.add_argument("--limit", type=int, default=200, help="images, drawn at random (default 200)")
    parser.add_argument("--patch", type=int, help="side of the hidden patches, pixels (default: 1/14 of the image)")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--maskings", nargs="+", choices=MASKINGS, default=list(MASKINGS))
    parser.add_argument(
        "--lime_images", type=int, default=8, help="explained by LIME where objects are known (default 8)"
    )
    parser.add_argument("--lime_samples", type=int, default=512, help="masks per explained image (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/masking", help="folder of results.json, report.txt and pictures")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; the exit status."""
    from mmskip.train.evaluation.classifier.figures import curves_picture, grid_picture, stages_picture

    if not all(0 < fraction < 1 for fraction in arguments.fractions):
        raise ValueError(f"fractions are {arguments.fractions}; expected numbers between 0 and 1.")
    if arguments.limit < 2:
        raise ValueError(f"limit is {arguments.limit}; expected at least 2 images.")
    if arguments.lime_images < 0 or arguments.lime_samples < 2:
        raise ValueError(
            f"lime_images is {arguments.lime_images} and lime_samples {arguments.lime_samples}; expected at least 0 "
            "(no explanations) and 2."
        )
    loaded = load_model(arguments)
    images = open_images(arguments.images, arguments.split, arguments.limit, loaded.size)
    x, labels, objects = sample(images, loaded, arguments.limit, arguments.seed)
    patch = arguments.patch or default_patch(loaded.size)
    model = Normalised(loaded.model, loaded.mean, loaded.std)
    report = measure(
        model,
        x,
        labels,
        objects,
        arguments.maskings,
        arguments.fractions,
        arguments.orders,
        patch,
        arguments.seed,
        progress=lambda text: print(f"  {text}", flush=True),
    )
    explained = min(arguments.lime_images, len(x))
    if objects is not None and explained:
        cells = max(2, round(loaded.size / patch))
        with frozen(model):
            report.lime = lime_agreement(
                model,
                x[:explained],
                objects[:explained],
                arguments.maskings,
                cells,
                arguments.lime_samples,
                arguments.seed,
            )
        report.notes.append(
            f"LIME: {explained} images, {arguments.lime_samples} masks each, {cells} x {cells} segments"
        )
    folder = Path(arguments.out)
    text = table(report)
    settings = {"model": arguments.model, "images": images.source, "patch": patch, "seed": arguments.seed}
    write_json({**settings, **report.to_dict()}, folder / "results.json")
    write_text(text + "\n", folder / "report.txt")
    curves_picture(report, folder / "curves.png")
    grid_picture(model, x, labels, images.class_names, arguments.maskings, patch, folder / "maskings.png")
    stages_picture(model, x, patch, folder / "stages.png")
    print(f"{text}\nwritten to {folder}")
    return 0


def default_patch(size: int) -> int:
    """The divisor of the image's side that is nearest to its 14th part (16 of 224)."""
    return min((p for p in range(1, size + 1) if size % p == 0), key=lambda p: abs(p - size / 14))


def sample(images: ImageSet, loaded: Loaded, limit: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images [B, 3, S, S] in [0, 1], labels [B] and, where known, object masks [B, 1, S, S]."""
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit].tolist()
    x, labels = batch_of(images, chosen, loaded.size, loaded.resize)
    if images.objects is None:
        return x, labels, None
    objects = torch.from_numpy(images.objects[chosen])[:, None].float()
    return x, labels, nn.functional.interpolate(objects, size=x.shape[-2:], mode="nearest-exact")


def load_model(arguments: argparse.Namespace) -> Loaded:
    """The classifier that the arguments name.

    Raises:
        ValueError: there is no such model or file, or its weights are not given.
    """
    name: str = arguments.model
    file, _, function = name.partition(":")
    if file.endswith(".py"):
        return _from_file(Path(file), function)
    if name.endswith(".ckpt"):
        return Classifier.from_checkpoint(name).loaded()
    if not arguments.weights and not arguments.pretrained:
        raise ValueError(f"{name} without weights knows nothing: give --weights FILE, or --pretrained (a download).")
    loaded = _from_library(name, arguments.pretrained)
    if arguments.weights:
        loaded.model.load_state_dict(read_weights(Path(arguments.weights)))
    return loaded


def _from_file(path: Path, function: str) -> Loaded:
    result = call_function(path, function)
    if not isinstance(result, Loaded):
        raise ValueError(f"{path}:{function} returned {type(result).__name__}; expected mmskip...masking.Loaded.")
    return result


def _from_library(name: str, pretrained: bool) -> Loaded:
    if name.startswith("torchvision/"):
        import torchvision

        short = name.removeprefix("torchvision/")
        if short not in torchvision.models.list_models():
            raise ValueError(f"torchvision has no model {short!r}.")
        return Loaded(torchvision.models.get_model(short, weights="DEFAULT" if pretrained else None), 224, 256)
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}.")
    model = timm.create_model(name, pretrained=pretrained)
    config = timm.data.resolve_model_data_config(model)
    size = config["input_size"][-1]
    return Loaded(model, size, round(size / config["crop_pct"]), config["mean"], config["std"])


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, floating point as float32.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(str(path))
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
