"""`mmskip search`: search for the setting of a dial. A further search is one module and one line in `TASKS`."""

import sys
from collections.abc import Sequence

from mmskip.train.cli.tasks import run_task

TASKS = {
    "skip": (
        "mmskip.train.search.skip_scale",
        "the scale of a diffusion network's skip connections for few evaluations",
    ),
    "cola": (
        "mmskip.train.search.layer_paths",
        "paths of a language model's layers that answer each sample (an oracle bound)",
    ),
}
USAGE = """\
usage: {prog} COMMAND [--KEY VALUE ...]

Search for the setting of a dial. Commands:
{tasks}

  {prog} skip --checkpoint RUN --features NET --real DATA --nfe 9
  {prog} COMMAND --help                                    all settings of a command

An interrupted search resumes where it stopped. Exit status: 0 done, 2 nothing done.
"""


def main(arguments: Sequence[str] | None = None, prog: str = "mmskip search") -> int:
    """Run one search; returns the exit status.

    Args:
        arguments: without the program's name; None: those of the process.
        prog: command as typed, for the help.
    """
    return run_task(prog, TASKS, USAGE, sys.argv[1:] if arguments is None else arguments)
