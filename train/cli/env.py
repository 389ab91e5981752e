"""`mmskip env`: versions, the device, and which implementation of each operation runs here."""

from collections.abc import Sequence

from mmskip.env import report
from mmskip.utils.command import CommandParser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    CommandParser(prog="mmskip env", description=__doc__).parse_args(arguments)
    print(report())
    return 0
