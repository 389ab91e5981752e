"""`python -m mmskip.search`: the old name of `mmskip search`."""

import sys
from collections.abc import Sequence

import mmskip_cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one search; returns the exit status."""
    return mmskip_cli.main(["search", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
