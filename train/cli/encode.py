"""`mmskip encode`: encode a folder of videos to sharded features, see `mmskip.datasets.video.encode`."""

from collections.abc import Sequence

from mmskip.datasets.video import encode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return encode.main(arguments, prog="mmskip encode")
