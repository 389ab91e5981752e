"""`python evaluate.py coco`: the scores of a COCO result file, or of the captions of a checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from mmskip.datasets.captioning.coco import pair_up, read_captions, read_results
from mmskip.models.captioner.metrics import JAVA_NAMES, DocumentFrequency, check_java, java_score, score_captions
from mmskip.train.evaluation.captioner import generation as captioning
from mmskip.train.evaluation.captioner.task import add_run_arguments
from mmskip.utils.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `evaluate.py coco`."""
    parser.add_argument("--results", help='captions to score: [{"image_id": 1, "caption": "a dog"}, ...]')
    add_run_arguments(parser)
    parser.add_argument("--annotations", help="COCO's caption annotations, or dataset_coco.json")
    parser.add_argument("--beams", type=int, help="when captioning (default: as trained)")
    parser.add_argument("--subset", action="store_true", help="score the captioned images alone if some have no result")
    parser.add_argument("--idf", help="annotations whose captions weigh CIDEr's words (default: those scored against)")
    parser.add_argument("--java", nargs="+", choices=JAVA_NAMES, default=[], help="scores that run in Java, as well")


def run(options: argparse.Namespace) -> int:
    """Score, print, write; the exit status."""
    for name in options.java:
        check_java(name)
    if (options.results is None) == (options.checkpoint is None):
        raise ValueError("give either --results, a file of captions, or --checkpoint, a model that makes them")
    if options.results is None:
        return captioning.run(options, _frequency(options.idf))
    if options.annotations is None:
        raise ValueError("--results needs --annotations, the captions to score against")
    return _score_file(options)


def _frequency(path: str | None) -> DocumentFrequency | None:
    if path is None:
        return None
    return DocumentFrequency.of({image.image_id: image.captions for image in read_captions(path)[0]})


def _score_file(options: argparse.Namespace) -> int:
    images, report = read_captions(options.annotations, options.split)
    captions, references = pair_up(read_results(options.results), images, options.subset)
    scores = score_captions(captions, references, _frequency(options.idf))
    totals, each = dict(scores.totals), scores.images
    for name in options.java:
        totals[name], parts = java_score(name, captions, references)
        each = {image: values | {name: parts[image]} for image, values in each.items()}
    out = Path(options.out) if options.out else Path(options.results).with_suffix(".scores.json")
    content: dict[str, Any] = {
        "name": "coco",
        "results": str(options.results),
        "annotations": str(options.annotations),
        "split": options.split,
        "images": len(references),
        "images_of_the_annotations": len(images),
        "idf": options.idf,
        "scores": totals,
        "caption_tokens": scores.caption_tokens,
        "reference_tokens": scores.reference_tokens,
        "left_out": report.counts,
        "samples": [{"image_id": image, "caption": captions[image]} | values for image, values in each.items()],
    }
    path = write_json(content, out)
    print(f"\n{len(references)} of {len(images)} annotated images\n")
    print("\n".join(f"{name:<8} {100 * value:6.1f}" for name, value in totals.items()))
    if len(references) < len(images):
        print("\nA subset: its scores are not comparable with those of all images.")
    if report.counts:
        print(f"\nleft out of the annotations: {report}")
    print(f"\nwritten to {path}")
    return 0
