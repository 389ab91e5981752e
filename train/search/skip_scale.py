"""`python -m mmskip.search skip`: the scale rho of the skip connections that suits a number of evaluations.

Shapes: N images, C channels, H and W pixels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmskip
from mmskip.calibration.line_search import Found, search
from mmskip.methods.skip_scale import SCHEDULES, TARGETS, SkipScaleConfig
from mmskip.models.diffusion.samplers import ImageSampler, karras_sigmas, starting_noise, steps_of
from mmskip.train.evaluation.generation.image_sampler import (
    FidScorer,
    LoadedSampler,
    add_sampling_arguments,
    device_of,
    load_sampler,
    pixels,
    real_images,
    reference_features,
    write_method,
)
from mmskip.train.metrics.feature_nets import FeatureNet, open_feature_net
from mmskip.viz.figure import save_png, subplots

COURSES = ("constant", "deepest", "shallowest")
METRICS = ("frechet", "denoising")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the search."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run of models/diffusion, or FILE.py:FUNCTION (returns an ImageSampler)",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--nfe", type=int, nargs="+", default=[9], help="function evaluations per image (default 9)")
    parser.add_argument(
        "--metric", choices=METRICS, default="frechet", help="of samples, or denoising loss in feature space"
    )
    parser.add_argument("--samples", type=int, default=1000, help="images per seed and value (default 1000)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[100], help="of the noise; report on others afterwards (default 100)"
    )
    parser.add_argument(
        "--course",
        choices=COURSES,
        default="constant",
        help="rho at all skips, or linear with rho at the deepest or shallowest skip and 1 at the other end",
    )
    parser.add_argument("--schedule", choices=[s for s in SCHEDULES if s != "window"], default="constant")
    parser.add_argument("--target", choices=TARGETS, default="both")
    parser.add_argument("--low", type=float, default=0.5, help="least rho (default 0.5)")
    parser.add_argument("--high", type=float, default=1.1, help="largest rho (default 1.1)")
    parser.add_argument("--points", type=int, default=5, help="values of the first round (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="each further one halves the spacing (default 3)")
    parser.add_argument("--out", help="folder of the results (default: search/skip in the folder of the run)")


def run(arguments: argparse.Namespace) -> int:
    """Search, print, write; the exit status."""
    if arguments.samples < 4 or not 0 <= arguments.low < arguments.high:
        raise ValueError(
            f"samples is {arguments.samples}, (low, high) is {(arguments.low, arguments.high)}; expected at least 4, "
            "and 0 <= low < high."
        )
    steps = {nfe: steps_of(arguments.sampler, nfe) for nfe in arguments.nfe}
    device = device_of(arguments.device)
    net = open_feature_net(arguments.features, device)
    opened = load_sampler(arguments.checkpoint, arguments.guidance, device)
    folder = Path(arguments.out) if arguments.out else opened.folder / "search" / "skip"
    measure = _measure(arguments, net, opened)
    results: dict[int, Found] = {}
    for nfe, count in steps.items():
        evaluate = rho_score(
            opened.image_sampler, lambda rho: _config(arguments, opened.image_sampler, rho), measure, count
        )
        print(f"{nfe} evaluations per image:", flush=True)
        results[nfe] = search(
            evaluate,
            arguments.low,
            arguments.high,
            arguments.points,
            arguments.rounds,
            also=(1.0,),
            file=folder / f"nfe{nfe}.json",
            settings=_settings(arguments, net, opened, nfe),
        )
        _write(arguments, opened, results, folder)
    print(f"\n{table(results, arguments.metric)}\nwritten to {folder}")
    return 0


def _config(arguments: argparse.Namespace, sampler: ImageSampler, rho: float) -> SkipScaleConfig:
    further = {"schedule": arguments.schedule, "target": arguments.target, **sampler.levels}
    if arguments.course == "constant":
        return SkipScaleConfig(scale=rho, **further)
    ends = (rho, 1.0) if arguments.course == "deepest" else (1.0, rho)
    return SkipScaleConfig(deepest=ends[0], shallowest=ends[1], **further)


def _settings(arguments: argparse.Namespace, net: FeatureNet, opened: LoadedSampler, nfe: int) -> dict[str, Any]:
    names = ("metric", "samples", "seeds", "sampler", "guidance", "course", "schedule", "target", "split", "real_count")
    own = {name: getattr(arguments, name) for name in names}
    return {"network": opened.name, "features": net.name, "real": arguments.real, "nfe": nfe, **own}


def _measure(
    arguments: argparse.Namespace, net: FeatureNet, opened: LoadedSampler
) -> Callable[[ImageSampler, int], float]:
    """Build the objective: (network, steps) -> score; lower is better."""
    if arguments.metric == "denoising":
        images, _, resize = real_images(arguments, opened)
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: arguments.samples].tolist()
        real = pixels(images, chosen, opened.image_sampler.image_shape, resize)
        labels = torch.tensor([images.labels[i] for i in chosen])
        seed = arguments.seeds[0]
        return lambda sampler, steps: feature_denoising_loss(sampler, net, real, labels, steps, seed)
    scorer = FidScorer(net, reference_features(net, arguments, opened))

    def frechet(sampler: ImageSampler, steps: int) -> float:
        found = [
            scorer.frechet(sampler.draw(arguments.samples, seed, arguments.sampler, steps, arguments.batch_size)[0])
            for seed in arguments.seeds
        ]
        while scorer.notes:
            print(f"  note: {scorer.notes.pop()}", flush=True)
        return sum(found) / len(found)

    return frechet


def rho_score(
    sampler: ImageSampler,
    config: Callable[[float], SkipScaleConfig],
    measure: Callable[[ImageSampler, int], float],
    steps: int,
) -> Callable[[float], float]:
    """The score of a value of rho; the network is as it was after every call."""

    def evaluate(rho: float) -> float:
        mmskip.apply_(sampler.unet, config(rho))
        try:
            found = measure(sampler, steps)
        finally:
            mmskip.remove_(sampler.unet)
        print(f"  rho {rho:.4f}: {found:.5f}", flush=True)
        return found

    return evaluate


@torch.no_grad()
def feature_denoising_loss(
    sampler: ImageSampler,
    net: FeatureNet,
    real_NCHW: Tensor,
    label_N: Tensor,
    steps: int,
    seed: int,
    batch_size: int = 250,
) -> float:
    """||phi(D(x + sigma n, sigma)) - phi(x)||^2 beside the variance of phi(x), mean over the noise levels that a
    sampler of `steps` steps visits (the paper's score-matching loss in feature space)."""
    device = next(sampler.unet.parameters()).device
    features_NF = net(real_NCHW)
    spread = (features_NF - features_NF.mean(0)).square().sum(1).mean()
    noise = starting_noise(sampler.image_shape, seed, range(len(real_NCHW)))
    losses = []
    for sigma in karras_sigmas(steps, sampler.sigma_min, sampler.sigma_max)[:-1]:
        parts = []
        for x, n, label in zip(*(t.split(batch_size) for t in (real_NCHW, noise, label_N)), strict=True):
            noisy = (x + sigma * n).to(device)
            parts.append(sampler.denoiser(label.to(device))(noisy, torch.full((len(x),), sigma, device=device)))
        found_NF = net(sampler.finish(torch.cat(parts)).cpu())
        losses.append((found_NF - features_NF).square().sum(1).mean() / spread)
    return float(torch.stack(losses).mean())


def _write(arguments: argparse.Namespace, opened: LoadedSampler, results: dict[int, Found], folder: Path) -> None:
    for nfe, found in results.items():
        config = _config(arguments, opened.image_sampler, found.best)
        further = {"nfe": nfe, "metric": arguments.metric, "score": found.score, "score_at_1": found.scores[1.0]}
        write_method(config, folder / f"best_nfe{nfe}.json", **further)
    curves_picture(results, arguments.metric, folder / "curves.png")


def table(results: dict[int, Found], metric: str) -> str:
    """The best rho by function evaluations."""
    lines = [f"{'NFE':>4}  {'best rho':>8}  {metric:>10}  {'at rho 1':>10}  change"]
    for nfe, found in sorted(results.items()):
        change = 100 * (found.score / found.scores[1.0] - 1) if found.scores[1.0] else 0.0
        lines.append(f"{nfe:>4}  {found.best:>8.4f}  {found.score:>10.4f}  {found.scores[1.0]:>10.4f}  {change:+.1f} %")
    return "\n".join(lines)


def curves_picture(results: dict[int, Found], metric: str, path: Path) -> None:
    """The score against rho for each number of evaluations, and the best rho against that number."""
    figure, axes = subplots(1, 2, 11, 4.2)
    left, right = axes[0]
    for nfe, found in sorted(results.items()):
        (line,) = left.plot(list(found.scores), list(found.scores.values()), "o-", label=f"{nfe} evaluations", ms=3.5)
        left.plot(found.best, found.score, "*", color=line.get_color(), ms=13)
    left.set_xlabel("rho (scale of the skip connections)")
    left.set_ylabel({"frechet": "Frechet distance", "denoising": "denoising loss in feature space"}.get(metric, metric))
    left.set_yscale("log")
    left.axvline(1, color="grey", lw=0.8, ls=":")
    left.legend()
    right.plot(sorted(results), [results[nfe].best for nfe in sorted(results)], "o-")
    right.axhline(1, color="grey", lw=0.8, ls=":")
    right.set_xlabel("function evaluations per image")
    right.set_ylabel("best rho")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    save_png(figure, path, dpi=None)
