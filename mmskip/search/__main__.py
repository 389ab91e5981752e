"""`python -m mmskip.search COMMAND`: each command is a module with `add_arguments(parser)` and `run(arguments) -> int`.

A new search is one module here and one line in `COMMANDS`.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "skip": (
        "mmskip.train.search.skip_scale",
        "the scale of a diffusion network's skip connections for few evaluations",
    ),
    "cola": (
        "mmskip.train.search.layer_paths",
        "paths of a language model's layers that answer each sample (an oracle bound)",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; what is wrong with arguments or data is one clear line and status 2.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    from mmskip.train.cli.train import told as own_message

    parser = argparse.ArgumentParser(prog="python -m mmskip.search", description="Search for the setting of a dial.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {}
    for name, (path, told) in COMMANDS.items():
        modules[name] = importlib.import_module(path)
        modules[name].add_arguments(commands.add_parser(name, help=told, description=told, allow_abbrev=False))
    parsed = parser.parse_args(arguments)
    try:
        status: int = modules[parsed.command].run(parsed)
        return status
    except ValueError as error:
        message = own_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
