"""`mmskip train`. Lightning is imported only when there is something to run."""

import sys
from collections.abc import Sequence
from pathlib import Path

import mmskip
from mmskip.utils.command import exit_status

CONFIGS = (Path(mmskip.__file__).parent / "configs").resolve()
SUBCOMMANDS = ("fit", "validate", "test", "predict")


def find_config(name: str) -> Path:
    """Find a config by its path, or by its name (with or without .yaml) in configs/ and the folders below.

    Raises:
        ValueError: there is no such file, or several of that name.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    recipes = sorted(CONFIGS.rglob("*.yaml"))
    found = [path for path in recipes if name in (path.name, path.stem)]
    if len(found) > 1:
        places = ", ".join(path.relative_to(CONFIGS).as_posix() for path in found)
        raise ValueError(f"there are {len(found)} configs {name!r} in configs/ ({places}); give the folder too")
    if not found:
        known = ", ".join(path.name for path in recipes)
        raise ValueError(f"there is no config {name!r}, neither here nor in configs/ (which has: {known})")
    return found[0]


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
    """Run the command line; an error in arguments or data is one line and exit status 2.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    status = exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))
    if status:
        sys.exit(status)


def _run(arguments: Sequence[str]) -> None:
    completed, name = prepare_arguments(arguments)
    from mmskip.train.runs import run

    run(completed, name)
