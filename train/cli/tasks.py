"""Commands with several tasks (`mmskip evaluate TASK`, `mmskip search TASK`)."""

import importlib
import sys
from collections.abc import Mapping, Sequence

from mmskip.utils.command import CommandParser, exit_status

Tasks = Mapping[str, tuple[str, str]]
"""Name -> (module, one line of help). The module holds `add_arguments(parser)` and `run(options) -> int`, and is
imported only when the task is given."""


def run_task(prog: str, tasks: Tasks, usage: str, arguments: Sequence[str]) -> int:
    """Run one task of a command.

    Args:
        prog: command as typed, before the task's name.
        tasks: the tasks of the command.
        usage: help of the command, with places for `prog` and `tasks`.
        arguments: the task and its own arguments.

    Returns:
        Exit status; 2 for wrong arguments or data.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, tasks))
        listed = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in tasks.items())
        print(usage.format(prog=prog, tasks=listed))
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in tasks:
        sys.stderr.write(f"error: unknown command {name!r}; expected one of {', '.join(tasks)}\n")
        return 2
    path, text = tasks[name]
    module = importlib.import_module(path)
    parser = CommandParser(prog=f"{prog} {name}", description=text)
    module.add_arguments(parser)
    return exit_status(lambda: module.run(parser.parse_args(rest)))
