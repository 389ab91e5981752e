"""`mmskip evaluate`: evaluate a trained model. A further evaluation is one module and one line in `TASKS`."""

import sys
from collections.abc import Sequence

from mmskip.train.cli.tasks import run_task

PACKAGE = "mmskip.train.evaluation"
TASKS = {
    "ego4d": (
        f"{PACKAGE}.video_llm.ego4d",
        "streaming narration: LM-PPL, LM-Correctness, TimeDiff, Fluency",
    ),
    "coin": (f"{PACKAGE}.video_llm.coin", "COIN: step, task, next, procedure and procedure+ accuracy"),
    "coco": (
        f"{PACKAGE}.captioner.coco",
        "captions of a checkpoint or a result file: BLEU, ROUGE-L, CIDEr; exits",
    ),
    "snli_ve": (
        f"{PACKAGE}.captioner.snli_ve",
        "visual entailment: accuracy of a checkpoint, and of its exits",
    ),
    "lm": (
        f"{PACKAGE}.language_model.perplexity",
        "a language model and a method: perplexity, greedy agreement, times",
    ),
    "depth": (
        f"{PACKAGE}.language_model.depth",
        "what the layers of a language model do: effects, lens, erasure, maps",
    ),
    "fid": (f"{PACKAGE}.generation.fid", "generated images: Frechet distance, KID, precision and recall"),
    "masking": (
        f"{PACKAGE}.classifier.masking",
        "which way of removing pixels suits an image classifier",
    ),
}
USAGE = """\
usage: {prog} COMMAND [--KEY VALUE ...]

Evaluate a model. Where a command takes --checkpoint RUN, RUN is a folder of a run (runs/NAME/TIME), of all runs of a
name (runs/NAME: the newest), or a checkpoint file. Commands:
{tasks}

  {prog} ego4d --checkpoint runs/videollm_mod              its test split
  {prog} ego4d --checkpoint runs/videollm_mod --keep 0.1 0.2 0.4 1.0 --router learned random uniform --blank
  torchrun --nproc-per-node 4 -m mmskip evaluate ego4d --checkpoint RUN       on four devices
  {prog} COMMAND --help                                    all settings of a command

An interrupted evaluation resumes where it stopped. Exit status: 0 done, 1 done but with --strict something was
skipped, 2 nothing done.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "mmskip evaluate") -> int:
    """Run one evaluation; returns the exit status.

    Args:
        arguments: without the program's name; None: those of the process.
        prog: command as typed, for the help.
    """
    return run_task(prog, TASKS, USAGE, sys.argv[1:] if arguments is None else arguments)
