"""`python -m mmskip.search`: the old name of `mmskip search`."""

import sys

from mmskip_cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
