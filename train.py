"""Train, validate, test or predict: `python train.py --config videollm_mod.yaml`, the same as `mmskip train`."""

import sys

from mmskip_cli import HELP, main, print_train_usage

if __name__ == "__main__":
    if sys.argv[1:2] in HELP:
        print_train_usage("python train.py")
    else:
        sys.exit(main(["train", *sys.argv[1:]]))
