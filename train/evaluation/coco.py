"""`python evaluate.py coco`: the scores of a COCO result file."""

import argparse
from pathlib import Path
from typing import Any

from mmskip.datasets.coco import pair_up, read_captions, read_results
from mmskip.files import write_json
from mmskip.train.metrics.captions import JAVA_NAMES, DocumentFrequency, check_java, java_score, score_captions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `evaluate.py coco`."""
    parser.add_argument("--results", required=True, help='the captions: [{"image_id": 1, "caption": "a dog"}, ...]')
    parser.add_argument("--annotations", required=True, help="COCO's caption annotations, or dataset_coco.json")
    parser.add_argument("--split", help="of dataset_coco.json: train, val or test")
    parser.add_argument("--subset", action="store_true", help="score the captioned images alone if some have no result")
    parser.add_argument("--idf", help="annotations whose captions weigh CIDEr's words (default: those scored against)")
    parser.add_argument("--java", nargs="+", choices=JAVA_NAMES, default=[], help="scores that run in Java, as well")
    parser.add_argument("--out", help="file for the scores (default: the results' name with .scores.json)")


def run(options: argparse.Namespace) -> int:
    """Score, print, write; the exit status."""
    for name in options.java:
        check_java(name)
    images, report = read_captions(options.annotations, options.split)
    captions, references = pair_up(read_results(options.results), images, options.subset)
    frequency = None
    if options.idf:
        frequency = DocumentFrequency.of({image.image_id: image.captions for image in read_captions(options.idf)[0]})
    scores = score_captions(captions, references, frequency)
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
