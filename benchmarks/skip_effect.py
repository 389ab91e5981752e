"""When does a scale on the skips help? One network and one thing changed at a time.

    python benchmarks/skip_effect.py [CASE ...]      # all of them: about an hour on one core

Every case is a trained network and a sampler; a run that is missing is trained first (`skip_tuning.yaml` with a few
settings changed). Per number of evaluations, as in skip_tuning.py: rho searched on seed 100, reported on seeds 0 to 2
beside random scales of equal size and FreeU. And a control without any skip: the predicted noise times a constant s,
D' = x + s (D - x), searched in the same way. Per network: the share of each skip's channels whose scale the next
normalisation cancels, what rho = 0.9 does to D at several noise levels, and how far the samples are from converged.
Resumable; ends with one JSON line, a JSON file and a picture in benchmarks/results.

Shapes: B images, C channels, H and W pixels.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skip_tuning import Bench, judged, open_bench, verdict
from skip_tuning import arguments as tuning_arguments
from torch import Tensor, nn

from common import measure as _measure
from common.skip_probes import cancelled, noise_scaled, other_ways, reach, unconverged
from mmskip.models.diffusion.module import Diffusion
from mmskip.train.cli.train import main as train
from mmskip.train.metrics.frechet import FeatureStatistics, frechet_distance
from mmskip.utils.command import CommandParser
from mmskip.utils.files import atomic_path
from mmskip.utils.results import ResumableResults
from prepare.ddpm_unets import DATA

MNIST, FASHION = DATA / "mnist" / "mnist_test_first6667.npz", DATA / "fashion_mnist" / "fashion_mnist_sprite_600.npz"
CIFAR_FEATURES = "benchmarks/prepare/cifar_features.py:resnet20"
# as many pixels as the recipe's pictures; with the data change their channels, classes, spread and flips, the number of
# steps (more images per epoch), and the feature network with its real images: the case "digits_cifar" takes those back
DIGITS = (
    "unet.in_channels=1",
    "unet.out_channels=1",
    "unet.num_class_embeds=10",
    "sigma_data=0.5",
    f"data.source={MNIST}",
    "data.channels=1",
    "data.flip=false",
)


class NoisePrediction(Diffusion):
    """The same network as a DDPM: it predicts the noise, D(x, sigma) = x - sigma F(c_in x), with equal weight at every
    noise level."""

    def denoise(self, unet: nn.Module, x_BCHW: Tensor, sigma_B: Tensor, label_B: Tensor | None = None) -> Tensor:
        """D(x, sigma), as far as an image goes."""
        sigma = sigma_B.view(-1, 1, 1, 1)
        extra = {} if label_B is None else {"class_labels": label_B}
        noise = unet(x_BCHW / (1 + sigma**2).sqrt(), sigma_B.log() / 4, **extra).sample
        denoised = x_BCHW - sigma * noise
        return denoised if self.training else denoised.clamp(-1, 1)

    def _loss(self, unet: nn.Module, batch: dict[str, Tensor], noise: Tensor, log_sigma_B: Tensor) -> Tensor:
        sigma_B, clean = log_sigma_B.exp(), batch["image"]
        label_B = self._labels(batch, training=unet.training)
        denoised = self.denoise(unet, clean + sigma_B.view(-1, 1, 1, 1) * noise, sigma_B, label_B)
        return ((denoised - clean).square().mean((1, 2, 3)) / sigma_B**2).mean()


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a sampler.

    Attributes:
        about: the change.
        checkpoint: a run, trained by `recipe` where it is missing, or FILE.py:FUNCTION.
        recipe: settings of skip_tuning.yaml that differ.
        features, real: as for evaluate.py fid.
        sampler, nfe, samples: of the distances.
        noise: the network predicts the noise.
        ways: numbers of evaluations at which other courses of rho are searched.
        draws: of random scales.
    """

    about: str
    checkpoint: str
    recipe: tuple[str, ...] = ()
    features: str = CIFAR_FEATURES
    real: Path | None = None
    sampler: str = "dpm++"
    nfe: tuple[int, ...] = (5, 9)
    samples: int = 240
    noise: bool = False
    ways: tuple[int, ...] = ()
    draws: int = 8


_RECIPE = Case("the recipe", "runs/skip_tuning")
_EIGHT = ("max_epochs=8",)
_ONE = ("unet.norm_num_groups=1",)
# as a DDPM, which learns from a wider range of noise levels
_WIDE = (*_ONE, "log_sigma_mean=0.0", "log_sigma_std=1.7", "max_epochs=16")
_DIGITS = Case("digits, 8 epochs", "runs/skip_mnist16", (*DIGITS, *_EIGHT), "runs/mnist_features", nfe=(3, 5, 9))
CASES = {
    "embedded": dataclasses.replace(_RECIPE, nfe=(3, 5, 9), ways=(3, 5, 9)),
    "heun": dataclasses.replace(_RECIPE, about="the recipe, Heun", sampler="heun"),
    "epochs8": Case("8 epochs", "runs/skip_epochs8", _EIGHT),
    "epochs2": Case("2 epochs", "runs/skip_epochs2", ("max_epochs=2",)),
    "half": Case(
        "half the width, 8 epochs", "runs/skip_half", ("unet.block_out_channels=[8,16,24]", *_EIGHT), nfe=(5,)
    ),
    "wide": Case(
        "twice the width, 8 epochs", "runs/skip_wide8", ("unet.block_out_channels=[32,64,96]", *_EIGHT), nfe=(5,)
    ),
    "one_group8": Case("one group, 8 epochs", "runs/skip_one_group8", (*_ONE, *_EIGHT), nfe=(5,)),
    "one_group": Case("one group, wide sigma, 16 epochs", "runs/skip_one_group", _WIDE, nfe=(5,)),
    "noise8": Case("one group, 8 epochs, noise", "runs/skip_noise8", (*_ONE, *_EIGHT), nfe=(5,), noise=True),
    "noise": Case("one group, wide sigma, 16 epochs, noise", "runs/skip_noise", _WIDE, nfe=(5,), noise=True),
    "digits": _DIGITS,
    "digits_cifar": dataclasses.replace(_DIGITS, about="digits, 8 epochs, CIFAR features", features=CIFAR_FEATURES),
    "ddpm_fashion": Case(
        "DDPM, Fashion-MNIST",
        "benchmarks/prepare/ddpm_unets.py:fashion",
        features="runs/fashion_features",
        real=FASHION,
        nfe=(3, 5, 9),
        samples=300,
        draws=4,
    ),
}


def trained(case: Case) -> None:
    """Train the run of a case if it has no checkpoint."""
    if ".py:" in case.checkpoint or any(Path(case.checkpoint).rglob("*.ckpt")):
        return
    given = ["--config", "skip_tuning.yaml", "--name", Path(case.checkpoint).name]
    if case.noise:
        given.append("--model=skip_effect.NoisePrediction")
    for setting in case.recipe:
        part = "" if setting.startswith("data.") else "trainer." if setting.startswith("max_") else "model."
        given.append(f"--{part}{setting}")
    epochs = [setting for setting in case.recipe if setting.startswith("max_epochs")]
    given += [f"--trainer.check_val_every_n_epoch={s.partition('=')[2]}" for s in epochs]
    train([*given, "--trainer.enable_progress_bar=false"])


def opened(case: Case) -> tuple[Bench, argparse.Namespace]:
    """The bench of a case and the settings of its search."""
    given = ["--checkpoint", case.checkpoint, "--features", case.features, "--sampler", case.sampler]
    given += ["--real", str(case.real)] if case.real else []
    options = tuning_arguments([*given, "--samples", str(case.samples), "--rounds", "3", "--randoms", str(case.draws)])
    options.grid = [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6]
    bench = open_bench(options)
    if case.noise:
        assert bench.opened.run is not None
        model = NoisePrediction.load_from_checkpoint(bench.opened.run.checkpoint, "cpu", weights_only=True)
        # the checkpoint alone does not show it: the same weights under EDM's preconditioning are another network
        name, file = f"{bench.opened.name}-noise", bench.known.path.with_stem(f"{bench.known.path.stem}-noise")
        network = dataclasses.replace(bench.opened, image_sampler=model.eval().image_sampler(), name=name)
        bench = dataclasses.replace(bench, opened=network, known=ResumableResults(file))
    return bench, options


def studied(case: Case) -> dict[str, Any]:
    """Everything about a case."""
    trained(case)
    bench, options = opened(case)
    by_nfe: dict[int, dict[str, Any]] = {}
    for nfe in case.nfe:
        found = {**judged(bench, nfe, options), **noise_scaled(bench, nfe, options)}
        if nfe in case.ways:
            found["ways"] = other_ways(bench, nfe, options)
        found["unconverged"] = unconverged(bench, nfe, found["best_rho"] if found["best_rho"] != 1 else 0.9)
        by_nfe[nfe] = found
    real_NF = bench.scorer.real_NF
    few = FeatureStatistics.of(real_NF[: case.samples])
    return {
        **{k: v for k, v in dataclasses.asdict(case).items() if k in ("about", "sampler", "samples")},
        "noise": case.noise or case.checkpoint.startswith("benchmarks/"),
        "network": bench.opened.name,
        "parameters": sum(p.numel() for p in bench.opened.image_sampler.unet.parameters()),
        "feature_network": bench.scorer.net.name,
        "real_against_real": frechet_distance(bench.scorer.statistics, few),
        "cancelled": cancelled(bench.opened.image_sampler.unet),
        "reach": reach(bench, options),
        "by_nfe": {str(nfe): found for nfe, found in by_nfe.items()},
        "verdict": verdict(by_nfe),
    }


# --- report ---------------------------------------------------------------------------------------------------------


def changes(found: dict[str, Any], name: str) -> list[float]:
    """Relative change of the distance by seed."""
    return [value / plain - 1 for value, plain in zip(found[name], found["plain"], strict=True)]


def picture(cases: dict[str, dict[str, Any]], path: Path) -> None:
    """The change of the distance of every case, by what brought it; how far a scale reaches in every network; and the
    best rho against evaluations."""
    from matplotlib.figure import Figure

    count = sum(len(case["by_nfe"]) for case in cases.values())
    figure = Figure(figsize=(14, max(7, 1.6 + 0.31 * count)), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic([["changes", "reach"], ["changes", "best"]], width_ratios=(3, 2), height_ratios=(3, 2))
    _draw_changes(axes["changes"], cases)
    _draw_reach(axes["reach"], cases)
    _draw_best(axes["best"], cases)
    for axis in axes.values():
        axis.grid(alpha=0.3)
    axes["changes"].legend(fontsize=8, loc="upper left")
    axes["reach"].legend(fontsize=6, loc="upper left", ncols=2)
    axes["best"].legend(fontsize=7, loc="upper right")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")


def _draw_changes(axis: Any, cases: dict[str, dict[str, Any]]) -> None:
    rows = [(f"{c['about']}, NFE {nfe}", found) for c in cases.values() for nfe, found in c["by_nfe"].items()]
    names = {"skip_scale": "found rho", "random": "random scales, mean of the draws", "noise_scale": "noise times s"}
    for row, (_, found) in enumerate(rows):
        plain = statistics.fmean(found["plain"])
        draws = [100 * min(statistics.fmean(draw["distances"]) / plain - 1, 0.3) for draw in found["random_draws"]]
        label = "single draws, mean of the seeds" if row == 0 else None
        axis.plot(draws, [row] * len(draws), "|", ms=7, color="C1", alpha=0.6, label=label)
        for number, (key, name) in enumerate(names.items()):
            values, height = [100 * min(c, 0.3) for c in changes(found, key)], row + 0.25 * (number - 1)
            axis.plot([min(values), max(values)], [height] * 2, lw=1.5, color=f"C{number}")
            label = name if row == 0 else None
            axis.plot(statistics.fmean(values), height, "o", ms=4, color=f"C{number}", label=label)
    axis.axvline(0, color="grey", lw=0.8)
    axis.axvline(-10, color="grey", lw=0.8, ls=":")
    axis.set_yticks(range(len(rows)), [f"{name}, rho {found['best_rho']:g}" for name, found in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("change of the Frechet distance, %")
    axis.set_title("seeds never searched (mean and range; cut at +30)", fontsize=10)


def _draw_reach(axis: Any, cases: dict[str, dict[str, Any]]) -> None:
    networks: dict[str, dict[str, Any]] = {}
    for case in cases.values():
        networks.setdefault(case["network"], case)
    for number, case in enumerate(networks.values()):
        reached = {float(sigma): row["shift"] for sigma, row in case["reach"].items()}
        line = "-" if case["noise"] else "--"
        drawn = {"marker": "o", "ms": 3, "color": f"C{number}", "label": case["about"]}
        axis.plot(list(reached), list(reached.values()), line, **drawn)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("sigma")
    axis.set_ylabel("in the spread of the images")
    axis.set_ylim(top=20)  # room for the legend
    axis.set_title("how far rho = 0.9 moves D (solid: predicts the noise)", fontsize=10)


def _draw_best(axis: Any, cases: dict[str, dict[str, Any]]) -> None:
    shown = [case for case in cases.values() if len(case["by_nfe"]) >= 3]
    for case in shown:
        counts = sorted(map(int, case["by_nfe"]))
        axis.plot(counts, [case["by_nfe"][str(n)]["best_rho"] for n in counts], "o-", ms=4, label=case["about"])
        # all that lies within 1 % of the best score, which the seeds cannot tell apart
        near = [_near_best(case["by_nfe"][str(n)]["search"]) for n in counts]
        axis.vlines(counts, [low for low, _ in near], [high for _, high in near], color=axis.lines[-1].get_color())
    axis.plot([9, 39], [0.675, 0.85], "s--", color="grey", ms=4, label="paper, EDM on ImageNet-64")
    axis.axhline(1, color="grey", lw=0.8, ls=":")
    axis.set_xscale("log")
    axis.set_xticks([3, 5, 9, 20, 39], ["3", "5", "9", "20", "39"])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("function evaluations (NFE)")
    axis.set_ylabel("best rho")
    axis.set_title("best rho on the search seed (bar: within 1 % of the best)", fontsize=10)


def _near_best(search: dict[str, float]) -> tuple[float, float]:
    """Least and largest rho tried whose score lies within 1 % of the best."""
    best = min(search.values())
    near = [float(rho) for rho, score in search.items() if score <= 1.01 * best]
    return min(near), max(near)


def main(given: Sequence[str] | None = None) -> None:
    """Study the cases; earlier results of the others are kept."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, default=_measure.RESULTS, help="folder of the results")
    options = parser.parse_args(given)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    file = options.out / "skip_effect.json"
    cases = json.loads(file.read_text())["cases"] if file.is_file() else {}
    for name in options.cases or CASES:
        cases[name] = studied(CASES[name])
        ordered = {name: cases[name] for name in CASES if name in cases}
        picture(ordered, options.out / "skip_effect.png")
        result = {"name": "skip_effect", "speedup": 1.0, "ideal": 1.0, "shape": {"cases": len(ordered)}}
        _measure.emit({**result, "cases": ordered}, file)


if __name__ == "__main__":
    main()
