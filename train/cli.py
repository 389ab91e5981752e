"""The command line behind `train.py`; Lightning is imported only when there is something to run."""

import sys
from collections.abc import Sequence
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SUBCOMMANDS = ("fit", "validate", "test", "predict")


def find_config(name: str) -> Path:
    """The file of a config: a path, or a name (with or without .yaml) in configs/.

    Raises:
        ValueError: there is no such file.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml")))
    raise ValueError(f"there is no config {name!r}, neither here nor in configs/ (which has: {known})")


def prepare_arguments(arguments: Sequence[str]) -> tuple[list[str], str]:
    """Complete the arguments: `fit` where no subcommand is given, and paths for bare config names.

    Returns:
        The arguments, and the default name of the run: that of the last config file, or "run".

    Raises:
        ValueError: a config that does not exist.
    """
    done = list(arguments)
    if not done or done[0] not in SUBCOMMANDS:
        done.insert(0, "fit")
    name = "run"
    for index, argument in enumerate(done):
        flag, equals, value = argument.partition("=")
        if flag not in ("--config", "-c"):
            continue
        if equals:
            path = find_config(value)
            done[index] = f"{flag}={path}"
        elif index + 1 < len(done):
            path = find_config(done[index + 1])
            done[index + 1] = str(path)
        else:
            continue
        # the config saved by a run is called config.yaml: its folder's parent is the name of the run
        name = path.resolve().parents[1].name if path.name == "config.yaml" else path.stem
    return done, name


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors in arguments and data are one clear line and exit status 2.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        completed, name = prepare_arguments(given)
        from mmskip.train.runs import run

        run(completed, name)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
