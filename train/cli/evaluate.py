"""The command line behind `evaluate.py`. Each evaluation is a module with `add_arguments(parser)` and
`run(arguments) -> int` (the exit status); it is imported only when it is asked for.

A new evaluation is one module here and one line in `COMMANDS`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from mmskip.train.cli.train import told as own_message

PACKAGE = "mmskip.train.evaluation."
COMMANDS = {
    "ego4d": (
        "video_llm.ego4d",
        "streaming narration: LM-PPL, LM-Correctness, TimeDiff, Fluency",
    ),
    "coin": ("video_llm.coin", "COIN: step, task, next, procedure and procedure+ accuracy"),
    "coco": (
        "captioner.coco",
        "captions of a checkpoint or a result file: BLEU, ROUGE-L, CIDEr; exits",
    ),
    "snli_ve": (
        "captioner.snli_ve",
        "visual entailment: accuracy of a checkpoint, and of its exits",
    ),
    "lm": (
        "language_model.perplexity",
        "a language model and a method: perplexity, greedy agreement, times",
    ),
    "depth": (
        "language_model.depth",
        "what the layers of a language model do: effects, lens, erasure, maps",
    ),
    "fid": ("generation.fid", "generated images: Frechet distance, KID, precision and recall"),
    "masking": (
        "classifier.masking",
        "which way of leaving pixels out suits an image classifier",
    ),
}
USAGE = """\
usage: python evaluate.py COMMAND [--KEY VALUE ...]

Evaluate a model. Where a command takes --checkpoint RUN, RUN is a folder of a run (runs/NAME/TIME), of all runs of a
name (runs/NAME: the newest), or a checkpoint file. Commands:
{commands}

  python evaluate.py ego4d --checkpoint runs/videollm_mod              its test split
  python evaluate.py ego4d --checkpoint runs/videollm_mod --keep 0.1 0.2 0.4 1.0 --router learned random uniform --blank
  torchrun --nproc-per-node 4 evaluate.py ego4d --checkpoint RUN       on four devices
  python evaluate.py COMMAND --help                                    all settings of a command

A run that was interrupted goes on where it stopped. Exit status: 0 done, 1 done but with --strict something was left
out, 2 nothing done.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what is wrong with arguments or data is one clear line and status 2.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] in ([], ["-h"], ["--help"]):
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {told}" for name, (_, told) in COMMANDS.items())))
        return 0
    name = given[0]
    if name not in COMMANDS:
        sys.stderr.write(f"error: unknown command {name!r}; expected one of {', '.join(COMMANDS)}\n")
        return 2
    path, told = COMMANDS[name]
    module = importlib.import_module(PACKAGE + path)
    parser = argparse.ArgumentParser(prog=f"python evaluate.py {name}", description=told, allow_abbrev=False)
    module.add_arguments(parser)
    try:
        return module.run(parser.parse_args(given[1:]))
    except ValueError as error:
        message = own_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 2
