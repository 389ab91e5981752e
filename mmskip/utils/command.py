"""Shared by all command lines: one flag style, one way to show errors, and no import warnings of other libraries."""

import argparse
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


class CommandParser(argparse.ArgumentParser):
    """argparse's parser without abbreviations; `--batch-size` is accepted for the flag `--batch_size`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse as argparse does, after spelling known flags with underscores."""
        return super().parse_known_args([self._spelled(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def _spelled(self, argument: str) -> str:
        flag, equals, value = argument.partition("=")
        known = flag.startswith("--") and "--" + flag[2:].replace("-", "_")
        if known and flag not in self._option_string_actions and known in self._option_string_actions:
            return known + equals + value
        return argument


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command; an error in its arguments or data becomes one line on stderr.

    Args:
        command: returns its exit status, None for 0.

    Returns:
        The exit status; 2 after a `ValueError` raised by mmskip. All other errors pass through with their traceback.
    """
    try:
        return command() or 0
    except ValueError as error:
        message = user_message(error)
        if message is None:
            raise
        sys.stderr.write(f"error: {message}\n")
        return 2


def user_message(error: BaseException | None) -> str | None:
    """Find the message for the user in a chain of errors: that of the first `ValueError` raised by mmskip.

    Errors that mmskip raises say what was given, what was expected and what to do; those of other libraries need their
    traceback. (jsonargparse wraps what a constructor raises, hence the chain.)

    Returns:
        The message; None if mmskip raised no error of the chain.
    """
    while error is not None:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        package = frames[-1].f_globals.get("__name__", "").partition(".")[0] if frames else ""
        if isinstance(error, ValueError) and package == "mmskip":
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def quiet_imports() -> None:
    """Drop the two warnings that torch logs when transformers or peft import torchao 0.18: torchao registers two enums
    that torch no longer needs registered. Call it before transformers is imported."""
    logger = logging.getLogger("torch.utils._pytree")
    if _not_about_enums not in logger.filters:
        logger.addFilter(_not_about_enums)


def _not_about_enums(record: logging.LogRecord) -> bool:
    return "is an Enum subclass and is now natively supported" not in str(record.msg)
