"""Evaluate a trained model: `python evaluate.py ego4d --checkpoint RUN`, the same as `mmskip evaluate`."""

import sys

from mmskip_cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
