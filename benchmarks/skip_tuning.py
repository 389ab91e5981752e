"""Skip scales beside their rivals: Frechet distance against function evaluations.

    python benchmarks/skip_tuning.py --checkpoint RUN --features RUN [--nfe 5 7 9 13] [--samples 600] [--name NAME]

For each number of evaluations: rho on a grid on a search seed, the best rho by a finer search there; then, on seeds
the search never saw, the plain network, the found rho, random scales of equal size, FreeU (the best of a few settings
on the search seed) and step caching, with measured time. Resumable; ends with one JSON line, a JSON file and a picture
in benchmarks/results. The network may be any that `evaluate.py fid` takes: `benchmarks/prepare/ddpm_unets.py:mnist`.
"""

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmskip
from common import measure as _measure
from mmskip.costs import torch_flops
from mmskip.families import find
from mmskip.models.diffusion.samplers import ImageSampler, steps_of
from mmskip.train.evaluation.generation.image_sampler import (
    FidScorer,
    LoadedSampler,
    add_sampling_arguments,
    device_of,
    load_sampler,
    reference_features,
)
from mmskip.train.metrics.feature_nets import open_feature_net
from mmskip.utils.command import CommandParser
from mmskip.utils.files import atomic_path
from mmskip.utils.results import ResumableResults

FREEU = (((1.1, 1.1), (0.9, 0.5)), ((1.2, 1.2), (0.9, 0.5)), ((1.1, 1.1), (1.0, 1.0)))


@dataclass
class Bench:
    """Measures networks with methods on them, and keeps every result on disk as soon as it is known.

    Attributes:
        opened, scorer: the network, and what judges its images.
        samples, sampler, batch_size: of every distance.
        known: results by key.
    """

    opened: LoadedSampler
    scorer: FidScorer
    samples: int
    sampler: str
    batch_size: int
    known: ResumableResults

    def distance(self, nfe: int, seed: int, config: Any = None) -> float:
        """The Frechet distance of images drawn with a method on the network."""
        label = "plain" if config is None else f"{type(config).__name__} {json.dumps(config.to_dict())}"
        key = f"{nfe} {seed} {self.samples} {self.sampler} {label}"

        def measure() -> float:
            image_sampler = self.opened.image_sampler
            if config is not None:
                mmskip.apply_(image_sampler.unet, config)
            try:
                steps = steps_of(self.sampler, nfe)
                images, _ = image_sampler.draw(self.samples, seed, self.sampler, steps, self.batch_size)
            finally:
                if config is not None:
                    mmskip.remove_(image_sampler.unet)
            found = self.scorer.frechet(images)
            shown = label if len(label) < 90 else f"{label[:87]}..."
            print(f"NFE {nfe:>3} seed {seed:>3}: {found:8.4f}  {shown}", flush=True)
            return found

        return float(self.known.once(key, measure))

    def mean(self, nfe: int, seeds: Sequence[int], config: Any = None) -> list[float]:
        """Distances by seed."""
        return [self.distance(nfe, seed, config) for seed in seeds]


def open_bench(options: argparse.Namespace) -> Bench:
    """The network and the scorer that the command line names, with earlier results of these weights."""
    device = device_of(options.device)
    net = open_feature_net(options.features, device)
    opened = load_sampler(options.checkpoint, options.guidance, device)
    scorer = FidScorer(net, reference_features(net, options, opened))
    file = Path("runs") / "skip_tuning_bench" / f"{opened.name}-{net.name}-{len(scorer.real_NF)}.json".replace(":", "_")
    return Bench(opened, scorer, options.samples, options.sampler, options.batch_size, ResumableResults(file))


def searched(bench: Bench, nfe: int, seed: int, grid: Sequence[float], rounds: int) -> tuple[float, dict[float, float]]:
    """The best rho on one seed, and all scores: the grid, then the middles beside the best."""

    def score(rho: float) -> float:
        return bench.distance(nfe, seed, None if rho == 1 else mmskip.SkipScaleConfig(scale=rho))

    found = mmskip.search(score, min(grid), max(grid), len(grid), rounds, also=(1.0,))
    return found.best, found.scores


def random_scales(rho: float, count: int, draw: int) -> mmskip.SkipScaleConfig:
    """Scales 1 + r z_i, z standard normal and brought to the length of the constant change, r = |rho - 1|.

    Draws 2 k and 2 k + 1 are a pair, z and -z, whose mean scale is 1. A scale that would be below 0 is set to 0; that
    shortens the change and lifts the mean (possible from r = 1/3 on with nine skips).
    """
    rng = random.Random(f"{draw // 2} {count}")
    z = [rng.gauss(0, 1) for _ in range(count)]
    length = (sum(v * v for v in z) / count) ** 0.5
    r = -abs(rho - 1) if draw % 2 else abs(rho - 1)
    return mmskip.SkipScaleConfig(scale=[round(max(0.0, 1 + r * v / length), 6) for v in z])


def drawn(bench: Bench, nfe: int, seeds: Sequence[int], configs: Sequence[Any]) -> dict[str, Any]:
    """Random scales: of every draw its mean scale and its distances by seed; and the mean of the draws by seed."""
    rows = [{"scale": statistics.fmean(c.scale), "distances": bench.mean(nfe, seeds, c)} for c in configs]
    by_seed = zip(*(row["distances"] for row in rows), strict=True)
    return {"random": [statistics.fmean(distances) for distances in by_seed], "random_draws": rows}


def judged(bench: Bench, nfe: int, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one number of evaluations."""
    unet, search_seed = bench.opened.image_sampler.unet, options.search_seed
    count = len(find(unet, ("unet",)).skips)
    rho, scores = searched(bench, nfe, search_seed, options.grid, options.rounds)
    found = {"best_rho": rho, "search": {str(k): v for k, v in scores.items()}}
    found["plain"] = bench.mean(nfe, options.seeds)
    tuned = None if rho == 1 else mmskip.SkipScaleConfig(scale=rho)
    found["skip_scale"] = bench.mean(nfe, options.seeds, tuned)
    # of equal size: with rho found to be 1, a change of 5 %
    shaken = [random_scales(rho if rho != 1 else 0.95, count, draw) for draw in range(options.randoms)]
    found.update(drawn(bench, nfe, options.seeds, shaken))
    stages = 1 + max(skip.stage for skip in find(unet, ("unet",)).skips)
    freeu = [mmskip.FreeUConfig(b=b[:stages], s=s[:stages]) for b, s in FREEU]
    best = min(freeu, key=lambda c: bench.distance(nfe, search_seed, c))
    found["freeu"], found["freeu_config"] = bench.mean(nfe, options.seeds, best), best.to_dict()
    return found


def cached(bench: Bench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Step caching: Frechet distance, and the time of a batch in interleaved pairs beside the counted operations."""
    other = load_sampler(options.checkpoint, options.guidance, device_of(options.device)).image_sampler
    deepest = len(find(other.unet, ("unet",)).decoder) - 1
    rows = []
    for nfe, interval, depth in itertools.product(options.cache_nfe, options.intervals, options.depths):
        if depth > deepest:
            continue
        config = mmskip.StepCacheConfig(interval=interval, depth=depth)
        plain = statistics.fmean(bench.mean(nfe, options.seeds))
        quick = statistics.fmean(bench.mean(nfe, options.seeds, config))
        mmskip.apply_(other.unet, config)
        pair = (bench.opened.image_sampler, other)
        first, second = (_drawing(image_sampler, bench.sampler, nfe, options.timed) for image_sampler in pair)
        ratio = _measure.interleaved_ratio(first, second, options.pairs)
        ideal = _operations(first) / _operations(second)
        mmskip.remove_(other.unet)
        row = {"nfe": nfe, "interval": interval, "depth": depth, "frechet_plain": plain, "frechet": quick}
        rows.append({**row, "change": quick / plain - 1, **_measure.summary(ratio, ideal)})
        shares = f"{ratio.median:.3f}x of {ideal:.3f}x counted, {quick / plain - 1:+.1%}"
        print(f"step caching, NFE {nfe}, interval {interval}, depth {depth}: {shares}", flush=True)
    return rows


def _drawing(image_sampler: ImageSampler, sampler: str, nfe: int, count: int) -> Callable[[], object]:
    return lambda: image_sampler.draw(count, 0, sampler, steps_of(sampler, nfe))


def _operations(draw: Callable[[], object]) -> int:
    with torch_flops() as counter:
        draw()
    return counter.get_total_flops()


# --- report ---------------------------------------------------------------------------------------------------------


def verdict(by_nfe: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Per number of evaluations: the change of the distance by the found rho, by random scales (mean of the draws) and
    by FreeU; whether on every seed the found rho lowers it by 10 % and by more than random scales do in the mean; and
    how many single draws beat the found rho on every seed."""
    rows = {}
    for nfe, found in by_nfe.items():
        changes = {
            name: [value / plain - 1 for value, plain in zip(found[name], found["plain"], strict=True)]
            for name in ("skip_scale", "random", "freeu")
        }
        holds = all(c <= -0.1 and c < r for c, r in zip(changes["skip_scale"], changes["random"], strict=True))
        draws = [draw["distances"] for draw in found["random_draws"]]
        better = sum(all(d < f for d, f in zip(draw, found["skip_scale"], strict=True)) for draw in draws)
        row = {"best_rho": found["best_rho"], "holds": holds, "changes": changes}
        rows[str(nfe)] = {**row, "draws_better": better, "draws": len(draws)}
    return rows


def picture(by_nfe: dict[int, dict[str, Any]], path: Path) -> None:
    """Distance against evaluations, distance against rho, and the best rho against evaluations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.3), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    counts = sorted(by_nfe)
    names = {"plain": "plain", "skip_scale": "found rho", "random": "random scales", "freeu": "FreeU"}
    for key, name in names.items():
        values = [by_nfe[nfe][key] for nfe in counts]
        (line,) = left.plot(counts, [statistics.fmean(v) for v in values], "o-", label=name, ms=4)
        left.fill_between(counts, list(map(min, values)), list(map(max, values)), color=line.get_color(), alpha=0.15)
    left.set_title("seeds never searched (range shaded)", fontsize=10)
    left.set_ylabel("Frechet distance")
    for nfe in counts:
        scores = {float(rho): score for rho, score in by_nfe[nfe]["search"].items()}
        (line,) = middle.plot(sorted(scores), [scores[rho] for rho in sorted(scores)], "o-", label=f"NFE {nfe}", ms=3)
        middle.plot(by_nfe[nfe]["best_rho"], min(scores.values()), "*", color=line.get_color(), ms=12)
    middle.set_title("search seed", fontsize=10)
    middle.set_xlabel("rho, all skips")
    middle.axvline(1, color="grey", lw=0.8, ls=":")
    right.plot(counts, [by_nfe[nfe]["best_rho"] for nfe in counts], "o-", label="here")
    right.plot([9, 39], [0.675, 0.85], "s--", color="grey", label="paper, EDM on ImageNet-64")
    right.axhline(1, color="grey", lw=0.8, ls=":")
    right.set_ylabel("best rho")
    for axis in (left, middle):
        axis.set_yscale("log")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("function evaluations (NFE)")
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="as for evaluate.py fid")
    add_sampling_arguments(parser)
    parser.add_argument("--name", default="skip_tuning", help="of the result files")
    parser.add_argument("--nfe", type=int, nargs="+", default=[5, 7, 9, 13])
    parser.add_argument("--samples", type=int, default=600, help="images per distance (default 600)")
    parser.add_argument("--search_seed", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="reported, never searched")
    parser.add_argument("--grid", type=float, nargs="+", default=[0.6, 0.7, 0.8, 0.9, 1.0, 1.1], help="even values")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--randoms", type=int, default=4, help="random scales of equal size, in pairs (default 4)")
    parser.add_argument("--cache_nfe", type=int, nargs="*", default=[9, 25], help="for step caching; none: left out")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--depths", type=int, nargs="+", default=[1])
    parser.add_argument("--timed", type=int, default=32, help="images per timed batch (default 32)")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=_measure.RESULTS, help="folder of the results")
    parsed = parser.parse_args(given)
    if parsed.search_seed in parsed.seeds or len(parsed.seeds) < 3:
        parser.error("give at least three --seeds, --search_seed not among them")
    return parsed


def main(given: Sequence[str] | None = None) -> None:
    """Measure, draw, print."""
    options = arguments(given)
    bench = open_bench(options)
    opened, scorer = bench.opened, bench.scorer
    by_nfe = {nfe: judged(bench, nfe, options) for nfe in options.nfe}
    picture(by_nfe, options.out / f"{options.name}.png")
    caching = cached(bench, options)
    good = [row for row in caching if row["change"] < 0.05]
    best = max(good, key=lambda row: row["speedup"], default={"speedup": 1.0, "ideal": 1.0})
    result = {
        "name": options.name,
        "speedup": best["speedup"],
        "ideal": best["ideal"],
        "shape": {
            "image": list(opened.image_sampler.image_shape),
            "skips": len(find(opened.image_sampler.unet, ("unet",)).skips),
            "parameters": sum(p.numel() for p in opened.image_sampler.unet.parameters()),
            "samples": options.samples,
            "real_images": len(scorer.real_NF),
            "features": scorer.real_NF.shape[1],
        },
        "network": opened.name,
        "feature_network": scorer.net.name,
        "sampler": options.sampler,
        "search_seed": options.search_seed,
        "seeds": options.seeds,
        "verdict": verdict(by_nfe),
        "by_nfe": {str(nfe): found for nfe, found in by_nfe.items()},
        "step_caching": caching,
        "notes": scorer.notes,
    }
    _measure.emit(result, options.out / f"{options.name}.json")


if __name__ == "__main__":
    main()
