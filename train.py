"""Train, validate, test or predict: `python train.py --config videollm_mod.yaml`."""

import sys
from pathlib import Path

USAGE = """\
usage: python train.py [fit|validate|test|predict] --config CONFIG [--KEY VALUE ...]

Train (fit, the default) or evaluate a model. CONFIG is a YAML file; a bare name is looked up in configs/:
{configs}

  python train.py --config videollm_mod.yaml                        train, evaluate, write runs/videollm_mod/<time>/
  python train.py --config videollm_mod.yaml --ckpt_path last       go on from the last checkpoint of that name
  python train.py test --config videollm_mod.yaml                   test its last checkpoint
  python train.py predict --config videollm_mod.yaml                write its narrations of the test set

Any setting of the YAML can be overridden:
  --trainer.max_epochs 3   --model.lr 5e-4   --model.methods.keep 0.5   --data.batch_size 4   --name my_run
  python train.py fit --help         the settings of the trainer, checkpoints and runs
  python train.py fit --model.help mmskip.models.video_llm.VideoLLM         the settings of a model
  python train.py fit --data.help mmskip.datasets.narration.NarrationData   the settings of its data
"""

if __name__ == "__main__":
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        # before anything is imported: help must not wait for torch
        configs = sorted(path.name for path in (Path(__file__).parent / "configs").glob("*.yaml"))
        print(USAGE.format(configs="\n".join(f"  {name}" for name in configs)))
    else:
        from mmskip.train.cli.train import main

        main()
