"""`python evaluate.py fid`: how far do generated images lie from real ones?"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import mmskip
from mmskip.models.diffusion.samplers import ImageSampler, steps_of
from mmskip.train.evaluation.generation.image_sampler import (
    FidScorer,
    add_sampling_arguments,
    device_of,
    load_sampler,
    read_method,
    reference_features,
)
from mmskip.train.metrics.feature_nets import open_feature_net
from mmskip.train.reports.generation import save_grid
from mmskip.utils.files import write_json, write_text

QUANTITIES = ("frechet", "kernel", "precision", "recall")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the evaluation."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="a run of models/diffusion, or FILE.py:FUNCTION (returns an ImageSampler)",
    )
    add_sampling_arguments(parser)
    parser.add_argument("--samples", type=int, default=2000, help="images per seed (default 2000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise (default 0 1 2)")
    parser.add_argument("--nfe", type=int, nargs="+", default=[9], help="function evaluations per image (default 9)")
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="FILE", help="JSON files of method configs to put on the network"
    )
    parser.add_argument("--grid", type=int, default=8, help="images per row of the picture, 4 rows (default 8)")
    parser.add_argument("--out", help="folder of the results (default: evaluation/fid in the folder of the run)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; the exit status."""
    _check(arguments)
    steps = {nfe: steps_of(arguments.sampler, nfe) for nfe in arguments.nfe}
    methods = [read_method(path) for path in arguments.methods]
    device = device_of(arguments.device)
    net = open_feature_net(arguments.features, device)
    opened = load_sampler(arguments.checkpoint, arguments.guidance, device)
    scorer = FidScorer(net, reference_features(net, arguments, opened))
    for method in methods:
        mmskip.apply_(opened.image_sampler.unet, method)
    folder = Path(arguments.out) if arguments.out else opened.folder / "evaluation" / "fid"
    rows = []
    for nfe, count in steps.items():
        rows.append(_row(arguments, opened.image_sampler, scorer, nfe, count))
        pictured, _ = opened.image_sampler.draw(4 * arguments.grid, 0, arguments.sampler, count, arguments.batch_size)
        save_grid(pictured, 4, folder / f"samples_nfe{nfe}.png")
    text = report(rows, scorer.notes)
    settings = {
        "checkpoint": opened.name,
        "features": net.name,
        "feature_count": scorer.real_NF.shape[1],
        "real_images": len(scorer.real_NF),
        "samples": arguments.samples,
        "sampler": arguments.sampler,
        "guidance": arguments.guidance,
        "methods": [{"type": type(m).__name__, "config": m.to_dict()} for m in methods],
    }
    write_json({**settings, "results": rows, "notes": scorer.notes}, folder / "results.json")
    write_text(text + "\n", folder / "report.txt")
    print(f"{text}\nwritten to {folder}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("samples", 4), ("batch_size", 1), ("grid", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} is {getattr(arguments, name)}; expected at least {least}.")
    if len(set(arguments.seeds)) != len(arguments.seeds) or min(arguments.seeds) < 0:
        raise ValueError(f"seeds are {arguments.seeds}; expected different integers >= 0.")


def _row(
    arguments: argparse.Namespace, sampler: ImageSampler, scorer: FidScorer, nfe: int, steps: int
) -> dict[str, Any]:
    by_seed = {}
    made = nfe
    for seed in arguments.seeds:
        images, made = sampler.draw(arguments.samples, seed, arguments.sampler, steps, arguments.batch_size)
        by_seed[seed] = scorer.all(images)
        print(f"  {made} evaluations, seed {seed}: Frechet distance {by_seed[seed]['frechet']:.4f}", flush=True)
    mean = {name: statistics.fmean(values[name] for values in by_seed.values()) for name in QUANTITIES}
    return {"nfe": made, "steps": steps, "mean": mean, "by_seed": by_seed}


def report(rows: list[dict[str, Any]], notes: list[str]) -> str:
    """The results as a table, with the range over the seeds of the Frechet distance."""
    lines = [
        f"{'NFE':>4}  {'Frechet':>9}  {'range over seeds':>19}  {'kernel x1000':>12}  {'precision':>9}  {'recall':>7}"
    ]
    for row in rows:
        mean, found = row["mean"], [values["frechet"] for values in row["by_seed"].values()]
        lines.append(
            f"{row['nfe']:>4}  {mean['frechet']:>9.4f}  {min(found):>8.4f} .. {max(found):>7.4f}  "
            f"{1000 * mean['kernel']:>12.4f}  {mean['precision']:>9.3f}  {mean['recall']:>7.3f}"
        )
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])
