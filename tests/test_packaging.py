"""The package in every form a user meets it: editable checkout, wheel, sdist, and the repository root as cwd."""

import json
import os
import site
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
from locations import ROOT

LINKED = ("models", "datasets", "train", "configs")


def run_python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees `cwd` first, as `python train.py` does."""
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def source_files() -> set[str]:
    """Files of the package as they must appear in a distribution; `py.typed` tells type checkers to look in."""
    paths = [ROOT / "mmskip_cli.py", *(ROOT / "mmskip").rglob("*.py"), ROOT / "mmskip" / "py.typed"]
    for name in LINKED:
        paths += [*(ROOT / "mmskip" / name).rglob("*.py"), *(ROOT / "mmskip" / name).rglob("*.yaml")]
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, built offline from a copy of the tracked files."""
    pytest.importorskip("build")
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "mmskip", "mmskip_cli.py", *LINKED):
        subprocess.run(["cp", "-a", str(ROOT / name), str(source)], check=True)
    out = source / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", str(out)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def test_links_lead_into_the_top_level_folders():
    for name in LINKED:
        link = ROOT / "mmskip" / name
        assert os.readlink(link) == f"../{name}"
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would shadow other packages"


def test_installed_metadata_matches_the_package():
    import mmskip

    assert version("mmskip") == mmskip.__version__
    assert metadata("mmskip")["License-Expression"] == "Apache-2.0"


def test_wheel_holds_every_source_file_under_the_package_name(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert source_files() <= names
    assert {name.split("/")[0] for name in names if not name.startswith("mmskip-")} == {
        "mmskip",
        "mmskip_cli.py",
    }


def test_sdist_holds_every_source_file(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.split("/", 1)[1] for member in members if member.isfile() and "/" in member.name}
    assert source_files() | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_imports_without_the_checkout(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = run_python("import mmskip, mmskip.datasets, mmskip.models, mmskip.train; print(mmskip.__file__)", tmp_path)
    assert found.stdout.strip() == str(tmp_path / "mmskip" / "__init__.py"), found.stderr


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The `bin` folder of a fresh environment with the wheel; its dependencies are those of this environment."""
    (wheel,) = distributions.glob("*.whl")
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, timeout=120)
    (packages,) = venv.glob("lib/python*/site-packages")
    # a line of a .pth file comes after the environment's own folder, and the .pth files in it are not read
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return venv / "bin"


def test_the_installed_command_trains_a_packaged_config_in_an_empty_folder(installed, tmp_path):
    sizes = {"train": 2, "val": 1, "test": 1}
    llm = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    llm |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    command = [str(installed / "mmskip"), "train", "--config", "videollm_mod.yaml", f"--model.llm={json.dumps(llm)}"]
    command += [f"--data.generated.{name}={count}" for name, count in sizes.items()]
    command += ["--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", "--model.max_new_tokens=2"]
    command += ["--trainer.enable_progress_bar=false"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this model" in done.stdout
    strange = [line for line in done.stderr.splitlines() if "Enum subclass" in line or "mmskip/" in line]
    assert strange == []  # the package of the wheel, not that of the checkout, and no other library's import warnings


def test_the_installed_command_shows_help_without_torch(installed, tmp_path):
    (packages,) = installed.parent.glob("lib/python*/site-packages")
    code = "import sys, mmskip_cli; mmskip_cli.main(['train']); print(mmskip_cli.__file__, 'torch' in sys.modules)"
    shown = subprocess.run([str(installed / "python"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert f"{packages / 'mmskip_cli.py'} False" in shown.stdout, shown.stderr
    assert "videollm_mod_ego4d.yaml" in shown.stdout


def test_repository_root_does_not_shadow_hugging_face_datasets():
    found = run_python(
        "import datasets; datasets.Dataset.from_dict({'a': [1]}); from transformers import Trainer; print('ok')"
    )
    assert found.stdout.strip() == "ok", found.stderr


def test_import_is_light_and_silent():
    found = run_python("import sys, mmskip; print([name for name in ('lightning', 'xformers') if name in sys.modules])")
    assert found.stdout.strip() == "[]", found.stderr
    ours = [line for line in found.stderr.splitlines() if "mmskip" in line or "xformers" in line.lower()]
    assert ours == []


def test_everything_imports_by_the_package_name():
    paths = (Path(name).with_suffix("") for name in source_files() if name.endswith(".py"))
    modules = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)
    found = run_python(f"import importlib\nfor name in {modules}: importlib.import_module(name)")
    assert found.returncode == 0, found.stderr


def test_no_module_imports_the_top_level_folders_directly():
    """`import models...` works at the repository root only, and loads a second copy of the module."""
    wrong = []
    for name in (*LINKED, "mmskip"):
        for path in (ROOT / name).rglob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["from"], ["import"]) and words[1].split(".")[0] in ("models", "train"):
                    wrong.append(f"{path}: {line}")
    assert wrong == []
