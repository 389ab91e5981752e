"""`python -m mmskip`: the command `mmskip`, for `torchrun -m mmskip` and places without it on the path."""

import sys

from mmskip_cli import main

if __name__ == "__main__":
    sys.exit(main())
