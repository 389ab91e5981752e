"""The command `mmskip`: its subcommands, its flag style, its errors, and what it does not print."""

import json
import re
import subprocess
import sys
import tomllib
import types

import pytest
from locations import ROOT

import mmskip_cli
from mmskip.train.cli import evaluate, search
from mmskip.utils.command import CommandParser, exit_status, user_message
from mmskip.utils.extras import check_installed, require


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_help_lists_every_command_without_loading_torch():
    code = "import sys, mmskip_cli; status = mmskip_cli.main(['--help']); sys.exit(status or 'torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name, (_, text) in mmskip_cli.COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert text in done.stdout


def test_every_command_and_task_is_a_module_that_is_there():
    """The tables name modules that are imported late: a wrong name would show only when a user asks for it."""
    tables = (mmskip_cli.COMMANDS, evaluate.TASKS, search.TASKS)
    modules = [path for table in tables for path, _ in table.values()]
    missing = [path for path in modules if not (ROOT / f"{path.replace('.', '/')}.py").is_file()]
    assert missing == []


@pytest.mark.parametrize("arguments", [["tarin"], ["evaluate", "ego5d"], ["search", "skipp"]])
def test_an_unknown_command_is_one_line_that_lists_the_known_ones(arguments, capsys):
    assert mmskip_cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert repr(arguments[-1]) in error
    assert {"tarin": "train", "ego5d": "ego4d", "skipp": "cola"}[arguments[-1]] in error


@pytest.mark.parametrize("command", ["evaluate", "search"])
def test_help_of_a_command_lists_its_tasks(command, capsys):
    assert mmskip_cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (evaluate.TASKS if command == "evaluate" else search.TASKS))


# the programs of version 0.1, each of which still has its flags
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (["evaluate.py", "coco", "--help"], "--batch_size"),
        (["stream.py", "--help"], "--max_new_tokens"),
        (["-m", "mmskip.search", "cola", "--help"], "--answer_tokens"),
        (["-m", "mmskip.datasets.video.encode", "--help"], "--image_size"),
        (["-W", "ignore::FutureWarning", "-m", "mmskip.datasets.encode", "--help"], "--image_size"),
        (["-m", "mmskip.env"], "ragged_attention"),
        (["-m", "mmskip", "env"], "ragged_attention"),
    ],
)
def test_programs_run_and_print_no_warnings_of_other_libraries(program, expected):
    done = python(*program)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert done.stderr == ""


def test_search_is_a_function_and_a_folder_with_a_command():
    code = "import mmskip, mmskip.search.__main__, mmskip.train.search.skip_scale; print(callable(mmskip.search))"
    assert python("-c", code).stdout.strip() == "True"


# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [["--batch_size", "3"], ["--batch-size", "3"], ["--batch-size=3"]])
def test_hyphens_and_underscores_spell_one_flag(given):
    parser = CommandParser()
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--name")
    parsed = parser.parse_args([*given, "--name=a-b--c-d"])
    assert (parsed.batch_size, parsed.name) == (3, "a-b--c-d")


def test_an_abbreviated_or_unknown_flag_is_refused_as_given(capsys):
    parser = CommandParser()
    parser.add_argument("--batch_size")
    for flag in ("--batch", "--batch-sizes"):
        with pytest.raises(SystemExit):
            parser.parse_args([flag, "3"])
        assert flag in capsys.readouterr().err


# --- errors ---------------------------------------------------------------------------------------------------------


def ours(message: str) -> None:
    """Raise as a module of mmskip does."""
    module = types.ModuleType("mmskip.somewhere")
    exec("def fail(message):\n    raise ValueError(message)", module.__dict__)
    module.fail(message)


def wrapped(message: str) -> None:
    try:
        ours(message)
    except ValueError as error:
        raise TypeError("a parser's view of it") from error


def test_an_error_of_mmskip_is_one_line_and_status_2(capsys):
    assert exit_status(lambda: ours("keep is 7; expected at most 1")) == 2
    assert capsys.readouterr().err == "error: keep is 7; expected at most 1\n"
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 1) == 1


def test_an_error_of_another_library_passes_through():
    with pytest.raises(json.JSONDecodeError):
        exit_status(lambda: json.loads("not ours"))
    with pytest.raises(KeyError):
        exit_status(lambda: {}["key"])


def test_an_error_wrapped_by_a_parser_is_found():
    with pytest.raises(TypeError) as caught:
        wrapped("keep is 7")
    assert user_message(caught.value) == "keep is 7"
    never_raised = TypeError("alone")
    assert user_message(never_raised) is None


def test_a_missing_extra_is_named():
    with pytest.raises(ValueError, match=r"a test needs mmskip_no_such, .*: pip install 'mmskip\[diffusion\]'\."):
        require("diffusion", "mmskip_no_such.part", "a test")
    with pytest.raises(ValueError, match=r"METEOR needs mmskip_no_such, .*pip install 'mmskip\[coco\]'"):
        check_installed("coco", "mmskip_no_such", "METEOR")
    assert require("diffusion", "json", "a test") is json


def test_every_extra_that_code_names_is_one_of_the_package():
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = set()
    for folder in ("mmskip", "models", "datasets", "train", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            named |= set(re.findall(r"\b(?:require|check_installed)\(\s*\"([\w-]+)\"", text))
            named |= set(re.findall(r"mmskip\[([\w-]+)\]", text))
    assert named - known == set()
    assert {"diffusion", "coco", "quantize", "search", "interpret", "lm-eval"} <= named
