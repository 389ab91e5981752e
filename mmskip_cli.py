"""The command `mmskip`. Help is printed without importing torch, so this module stands outside the package.

A further command is one line in `COMMANDS`: its name, the module that holds `main(arguments) -> int | None` (imported
only when the command is given), and a line of help.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "train": ("mmskip.train.cli.train", "train, validate, test or predict, from a YAML config"),
    "evaluate": ("mmskip.train.cli.evaluate", "evaluate a trained model on a benchmark"),
    "stream": ("mmskip.train.cli.stream", "narrate a video while it plays"),
    "search": ("mmskip.train.cli.search", "search for the setting of a dial"),
    "encode": ("mmskip.train.cli.encode", "encode a folder of videos to features"),
    "env": ("mmskip.train.cli.env", "show versions, the device, and which kernels run here"),
}

USAGE = """\
usage: mmskip COMMAND [--KEY VALUE ...]

A dial on depth for multimodal models. Commands:
{commands}

  mmskip train --config videollm_mod.yaml                 train; writes runs/videollm_mod/<time>/
  mmskip evaluate ego4d --checkpoint runs/videollm_mod    evaluate the newest run of that name
  mmskip COMMAND --help                                   the settings of a command

Words of a flag are joined by underscores (--batch_size); hyphens are accepted too.
"""

TRAIN_USAGE = """\
usage: {prog} [fit|validate|test|predict] --config CONFIG [--KEY VALUE ...]

Train (fit, the default) or evaluate a model. CONFIG is a YAML file; a bare name is looked up in configs/:
{configs}

  {prog} --config videollm_mod.yaml                        train, evaluate, write runs/videollm_mod/<time>/
  {prog} --config videollm_mod.yaml --ckpt_path last       resume from the last checkpoint of that name
  {prog} test --config videollm_mod.yaml                   test its last checkpoint
  {prog} predict --config videollm_mod.yaml                write its narrations of the test set

Any setting of the YAML can be overridden:
  --trainer.max_epochs 3   --model.lr 5e-4   --model.methods.keep 0.5   --data.batch_size 4   --name my_run
  {prog} fit --help         the settings of the trainer, checkpoints and runs
  {prog} fit --model.help mmskip.models.video_llm.VideoLLM         the settings of a model
  {prog} fit --data.help mmskip.datasets.narration.NarrationData   the settings of its data
"""

HELP: tuple[list[str], ...] = ([], ["-h"], ["--help"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command and its own arguments; None: those of the process.

    Returns:
        Exit status; 2 for wrong arguments or data.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] in HELP:
        width = max(map(len, COMMANDS))
        print(USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())))
        return 0
    if given[:1] == ["--version"]:
        import mmskip

        print(f"mmskip {mmskip.__version__}")
        return 0
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        sys.stderr.write(f"error: unknown command {name!r}; expected one of {', '.join(COMMANDS)}\n")
        return 2
    if name == "train" and rest[:1] in HELP:
        print_train_usage("mmskip train")
        return 0
    module = importlib.import_module(COMMANDS[name][0])
    return module.main(rest) or 0


def print_train_usage(prog: str) -> None:
    """Print the help of `train` with the names of all recipes; `prog` is what the user typed."""
    spec = importlib.util.find_spec("mmskip")
    folders = spec.submodule_search_locations if spec is not None else None
    configs = sorted(path.name for folder in folders or () for path in (Path(folder) / "configs").rglob("*.yaml"))
    print(TRAIN_USAGE.format(prog=prog, configs="\n".join(f"  {name}" for name in configs)))


if __name__ == "__main__":
    sys.exit(main())
