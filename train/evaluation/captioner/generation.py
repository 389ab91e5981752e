"""Captioning by a checkpoint: COCO's scores and result files at full depth, and sweeps of its exits."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from mmskip.datasets.captioning.coco import CaptionedImage, pair_up, write_results
from mmskip.models.captioner.metrics import CaptionScores, DocumentFrequency, java_score, score_captions
from mmskip.models.captioner.module import Captioner
from mmskip.train.evaluation.captioner.exit_sweep import FULL, ExitVariant, Recorder, depths, encoder_exits
from mmskip.train.evaluation.captioner.task import Batch, CaptionTask, encoded, variants_of
from mmskip.train.evaluation.distributed import process_group
from mmskip.utils.files import write_json


def run(options: argparse.Namespace, frequency: DocumentFrequency | None) -> int:
    """Caption, score, write; the exit status.

    Args:
        options: those of `evaluate.py coco`.
        frequency: that weighs CIDEr's words; None: that of the references.
    """
    if options.beams is not None and options.beams < 1:
        raise ValueError(f"--beams is {options.beams}; expected at least 1")
    variants = variants_of(options)
    with process_group(options.device) as group:
        task = CaptionTask.of("coco", "caption", options.annotations, options, group)
        task.check(variants)
        if len(task.dataset) < 2 and frequency is None:
            raise ValueError(f"CIDEr weighs words by their images and there is {len(task.dataset)}; give --idf as well")
        beams = task.model.hparams["num_beams"] if options.beams is None else options.beams

        def said(model: Captioner, batch: Batch, record: Recorder) -> list[dict[str, Any]]:
            return captioned(model, batch, record, beams, task.collate.tokenizer)

        def call(model: Captioner, batch: Batch) -> Any:
            return model.caption(*encoded(model, batch, batch["caption"].first_of_each()), num_beams=beams)

        totals: dict[str, dict[str, Any]] = {}
        full: dict[str, float] = {}
        for variant in variants:
            records = task.evaluate(variant, said, beams=beams)
            scores = scored(task, records, frequency, options.java)
            if variant.name == FULL:
                full = {uid: one["CIDEr"] for uid, one in scores.images.items()}
            # a caption is right if the early exit cost it nothing
            rows = [{**records[uid], "right": scores.images[uid]["CIDEr"] >= full[uid] - 1e-9} for uid in records]
            totals[variant.name] = {**variant.to_dict(), "metrics": scores.totals, "exits": depths(rows, task.model)}
            if group.first:
                _write(task, variant, totals[variant.name], records, scores)
        status = 0
        if group.first:
            for name, cost in task.costs(variants, call).items():
                totals[name]["compute"] = cost
            status = task.report(totals, ("CIDEr", "Bleu_4", "ROUGE_L", *options.java))
        group.wait()
        return status


def captioned(model: Captioner, batch: Batch, record: Recorder, beams: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The record of each image of a batch: its caption, and the layers that ran for image, prompt and every token. With
    beams all hypotheses count, up to the length of the caption."""
    texts = batch["caption"].first_of_each()
    states = encoded(model, batch, texts)
    images, prompts = encoder_exits(record, texts.image)
    ids = model.caption(*states, num_beams=beams)
    steps = torch.stack([layers[:, -1] for layers in record.decoder], 1)  # [R * beams, steps]
    found = []
    for row, uid in enumerate(texts.uids):
        length = said_length(ids[row, 1:].tolist(), tokenizer.eos_token_id)
        own = steps[row * beams : (row + 1) * beams, :length]
        text = tokenizer.decode(ids[row], skip_special_tokens=True)
        found.append(
            {
                "uid": uid,
                "caption": text.strip(),
                "image": images[row],
                "prompt": prompts[row],
                "decoder": own.flatten().tolist(),
            }
        )
    return found


def said_length(ids: list[int], eos: int) -> int:
    """Tokens up to the eos, itself included."""
    return ids.index(eos) + 1 if eos in ids else len(ids)


def scored(
    task: CaptionTask, records: Mapping[str, Mapping[str, Any]], frequency: DocumentFrequency | None, java: list[str]
) -> CaptionScores:
    """Scores of the captions. One without words is scored as such: it is the model's fault, not the file's."""
    captions = {uid: records[uid]["caption"] for uid in sorted(records)}
    references = {entry.uid: entry.captions for entry in task.dataset.entries if entry.uid in captions}
    references = {uid: references[uid] for uid in captions}
    scores = score_captions(captions, references, frequency)
    for name in java:
        total, parts = java_score(name, captions, references)
        scores.totals[name] = total
        for uid, values in scores.images.items():
            values[name] = parts[uid]
    return scores


def _write(
    task: CaptionTask,
    variant: ExitVariant,
    totals: Mapping[str, Any],
    records: Mapping[str, Mapping[str, Any]],
    scores: CaptionScores,
) -> None:
    """The result file that COCO's evaluation reads, checked against the annotations, and the scores of every image."""
    folder = task.out / variant.name
    # a caption without words has no place in a result file
    captions = {int(uid): record["caption"] or "?" for uid, record in records.items()}
    known = [CaptionedImage(int(entry.uid), entry.path.name, entry.captions) for entry in task.dataset.entries]
    pair_up(captions, known)
    write_results(captions, folder / "captions.json")
    samples = [{**records[uid], **scores.images[uid]} for uid in sorted(records)]
    write_json({**totals, "samples": samples}, folder / "results.json")
