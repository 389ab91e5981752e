"""Narrate a video while it plays: `python stream.py --checkpoint runs/videollm_mod/TIME --video FILE`."""

import sys

if __name__ == "__main__":
    from mmskip.train.cli.stream import main

    sys.exit(main())
