"""Every command of README and docs is read by the parser it is for: programs, tasks, flags, values, recipes, scripts.

`test_docs_videollm.py` runs those of one page to their end as well."""

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import jsonargparse
import pytest
from doc_pages import PAGES, blocks, name_of
from locations import ROOT

import mmskip_cli
from mmskip.train.cli.train import SUBCOMMANDS, prepare_arguments

SETUP = (r"python3? -m venv", r"\. \S+/activate", r"python -m pytest", r"python -m http\.server", r"git clone", r"cd ")
INLINE = re.compile(
    r"`((?:mmskip (?:train|evaluate|stream|search|encode|env)|python \S+|make \w+|pip install)\b[^`]*)`"
)


class Parsed(BaseException):
    """Raised when a program has read its arguments."""


def lines(page: Path) -> list[str]:
    """Commands of the blocks, joined where a line goes on, without comments."""
    text = "\n".join(block.code for block in blocks(page, "bash", "console", "shell")).replace("\\\n", " ")
    found = [re.sub(r"\s+#\s.*$", "", line).strip() for line in text.splitlines()]
    return [line for line in found if line and not line.startswith("#")]


def inline(page: Path) -> list[str]:
    """Complete commands within the text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [match.replace("\n", " ") for match in INLINE.findall(text)]
    return [command for command in found if "..." not in command and " TASK" not in command and "{" not in command]


FOUND = {
    (command, whole): name_of(page)
    for page in PAGES
    for found, whole in ((lines(page), True), (inline(page), False))
    for command in found
}
COMMANDS = [pytest.param(*found, id=f"{page}: {found[0][:70]}") for found, page in FOUND.items()]


@pytest.fixture
def stop_after_parsing(monkeypatch) -> list[bool]:
    """argparse reads the arguments and stops; with [False] required arguments may be missing."""
    whole = [True]
    inside: list[argparse.ArgumentParser] = []
    parse, parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def parse_args(parser, args=None, namespace=None):
        if not whole[0]:
            for needed in (*parser._actions, *parser._mutually_exclusive_groups):
                needed.required = False
        inside.append(parser)
        parse(parser, args, namespace)
        raise Parsed

    def parse_known_args(parser, args=None, namespace=None):
        found = parse_known(parser, args, namespace)
        if not inside and not isinstance(parser, jsonargparse.ArgumentParser):
            raise Parsed  # a program that hands the rest on
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    return whole


def read(program: list[str], monkeypatch) -> None:
    """Give a command to its program."""
    monkeypatch.setattr(sys, "argv", program[1:])
    if program[0] == "mmskip":
        module, arguments = "mmskip", program[1:]
    elif program[:2] == ["python", "-m"]:
        module, arguments = program[2], program[3:]
    elif program[1] in ("train.py", "evaluate.py", "stream.py"):
        module, arguments = "mmskip", [program[1].removesuffix(".py"), *program[2:]]
    else:
        monkeypatch.setattr(sys, "argv", [str(ROOT / program[1]), *program[2:]])
        runpy.run_path(str(ROOT / program[1]), run_name="__main__")
        return
    if module != "mmskip":
        assert module in ("mmskip.env", "mmskip.search", "mmskip.datasets.encode"), module
        arguments = [module.rpartition(".")[2], *arguments]
    if arguments[:1] == ["train"] and len(arguments) > 1:
        read_recipe(arguments[1:], monkeypatch)
        return
    assert not arguments or arguments[0] in mmskip_cli.COMMANDS
    status = 0 if arguments == ["env"] else mmskip_cli.main(arguments)
    sys.exit(status or (len(arguments) > 1 and arguments[-1] != "--help"))


def read_recipe(arguments: list[str], monkeypatch) -> None:
    """Parse the arguments of `mmskip train` with the recipe they name."""
    from mmskip.train.runs import RunCLI, run

    def stop(cli):
        raise Parsed

    monkeypatch.setattr(RunCLI, "before_instantiate_classes", stop)
    if set(arguments) <= set(SUBCOMMANDS):  # in the text, without its settings
        raise Parsed
    completed, name = prepare_arguments(arguments)
    run(completed, name)


@pytest.mark.parametrize(("command", "whole"), COMMANDS)
def test_a_command_is_understood(command, whole, stop_after_parsing, monkeypatch, tmp_path):
    if any(re.match(pattern, command) for pattern in SETUP):
        return
    program = shlex.split(command.replace("&&", ";"))
    if program[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
        assert targets is not None and program[1] in targets[1].split()
        return
    if program[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.search(r"\[(.+)\]", command)
        assert asked is None or set(asked[1].split(",")) <= set(extras)
        return
    if program[0] == "torchrun":
        program = program[program.index("-m") + 1 :] if "-m" in program else ["python", *program[3:]]
    assert program[0] in ("mmskip", "python", ".venv/bin/python"), command
    program[0] = program[0].rpartition("/")[2]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stop_after_parsing[0] = whole
    with pytest.raises((Parsed, SystemExit)) as stopped:
        read(program, monkeypatch)
    assert stopped.type is Parsed or not stopped.value.code, command


def test_the_pages_have_commands():
    """So that a change of format does not leave the test without any."""
    assert len(COMMANDS) > 60
