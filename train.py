"""Train, validate, test or predict: `python train.py --config videollm_mod.yaml`."""

from mmskip.train.cli import main

if __name__ == "__main__":
    main()
