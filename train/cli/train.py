"""The command line behind `train.py`; Lightning is imported only when there is something to run."""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import mmskip

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
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
    """Run the command line; what is wrong with arguments or data is one clear line and exit status 2.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        completed, name = prepare_arguments(given)
        from mmskip.train.runs import run

        run(completed, name)
    except ValueError as error:
        message = told(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)


def told(error: BaseException | None) -> str | None:
    """The message of the error in this chain that our own code raised: it says all. (The parser wraps what a
    constructor raises.) None: there is none, so the traceback is needed."""
    folders = [Path(mmskip.__file__).parent, *(CONFIGS.parent / name for name in ("models", "datasets", "train"))]
    while error is not None:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if isinstance(error, ValueError) and any(folder.resolve() in origin.parents for folder in folders):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
