"""Evaluate a trained model: `python evaluate.py ego4d --checkpoint runs/videollm_mod`."""

import sys

if __name__ == "__main__":
    from mmskip.train.cli.evaluate import main

    sys.exit(main())
