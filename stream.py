"""Narrate a video while it plays: `python stream.py --checkpoint runs/videollm_mod --video FILE`, the same as
`mmskip stream`."""

import sys

from mmskip_cli import main

if __name__ == "__main__":
    sys.exit(main(["stream", *sys.argv[1:]]))
