"""The layers of the house: who may import whom, how large a file may be, and what `import mmskip` loads.

Imports are read from the source, those inside functions too. `models/`, `datasets/` and `train/` are read at the top,
where they stand; inside the package they are links.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mmskip", "models", "datasets", "train", "benchmarks")
LAYERS = ("library", "datasets", "models", "train", "benchmarks")
LINKS = {"models", "datasets", "train"}
FILE_LINES, FUNCTION_LINES = 500, 60

KNOWN: dict[str, str] = {}
"""Violations that are still there: file -> reason."""


@functools.cache
def files() -> dict[str, Path]:
    """Module name -> file, of the library, the three linked folders and the benchmarks."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == "mmskip" and len(parts) > 1 and parts[1] in LINKS:
                continue
            parts = ("mmskip", *parts) if folder in LINKS else parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def nodes(root: ast.AST, inside: bool) -> Iterator[ast.AST]:
    """All nodes; without `inside`, those that run at import (no functions, no `if TYPE_CHECKING`)."""
    for child in ast.iter_child_nodes(root):
        if not inside and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from nodes(child, inside)


@functools.cache
def imports(name: str, inside: bool = True) -> frozenset[str]:
    """Full names that a module imports: our modules as far as they go, others as written."""
    path, found = files()[name], set()
    for node in nodes(tree(path), inside):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in files() else base)
    return frozenset(found)


def layer(name: str) -> str | None:
    """The layer of a module of ours; None for another library's."""
    parts = name.split(".")
    if parts[0] == "benchmarks":
        return "benchmarks"
    if parts[0] != "mmskip":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKS else "library"


def area(name: str) -> tuple[str, str] | None:
    """(folder, area) of a module that belongs to an area; what stands in `common` or flat in a folder belongs to all.

    Data kinds that several systems read (video, synthetic, ...) are areas as well.
    """
    parts = name.split(".")
    prefixes = (("mmskip", "datasets"), ("mmskip", "models"), ("mmskip", "train", "evaluation"))
    for prefix in prefixes:
        inner = tuple(parts[len(prefix) :])
        if tuple(parts[: len(prefix)]) == prefix and inner and (ROOT / "/".join((*prefix[1:], inner[0]))).is_dir():
            return None if inner[0] == "common" else (".".join(prefix[1:]), inner[0])
    return None


def relative(name: str) -> str:
    return str(files()[name].relative_to(ROOT))


def report(violations: list[tuple[str, str]]) -> None:
    """Fail with the violations that are not known."""
    new = [f"{relative(name)}: {message}" for name, message in violations if relative(name) not in KNOWN]
    assert not new, "\n".join(new)


def outside_imports(name: str, roots: tuple[str, ...], inside: bool = True) -> list[str]:
    return sorted(other for other in imports(name, inside) if other.split(".")[0] in roots)


def test_imports_run_one_way():
    violations = []
    for name in files():
        own = layer(name)
        for other in sorted(imports(name)):
            theirs = layer(other)
            if own and theirs and LAYERS.index(theirs) > LAYERS.index(own):
                violations.append((name, f"{own} imports {other} of the layer {theirs} above it"))
    report(violations)


def test_the_library_imports_no_lightning():
    report(
        [
            (name, f"imports {other}")
            for name in files()
            if layer(name) == "library"
            for other in outside_imports(name, ("lightning", "pytorch_lightning"))
        ]
    )


SHARED_DATA = {
    # what several data areas are made from: readers and towers, and the generated worlds
    ("datasets", "video"): "frames of any video",
    ("datasets", "synthetic"): "generated sets in the formats of the areas",
}


def test_areas_never_import_each_other():
    violations = []
    for name in files():
        own = area(name)
        for other in sorted(imports(name)):
            theirs = area(other)
            if own and theirs and own[0] == theirs[0] and own != theirs and not {own, theirs} & set(SHARED_DATA):
                violations.append((name, f"{'/'.join(own)} imports {other}"))
    report(violations)


def test_no_circle_of_files():
    """Among imports that run when a module is imported."""
    graph = {name: {o for o in imports(name, inside=False) if o in files() and o != name} for name in files()}
    state: dict[str, int] = {}
    circles = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        state[name] = 1
        for other in sorted(graph[name]):
            if state.get(other) == 1:
                circles.append((name, "circle " + " -> ".join((*path[path.index(other) :], other))))
            elif other not in state:
                visit(other, (*path, other))
        state[name] = 2

    for name in sorted(graph):
        if name not in state:
            visit(name, (name,))
    report(circles)


MAY_NOT = [
    # (who, whom, also inside functions)
    ("mmskip.methods", ("mmskip.families.", "mmskip.hf."), False),
    ("mmskip.families", ("mmskip.methods", "mmskip.registry"), True),
    ("mmskip.hf", ("mmskip.methods", "mmskip.registry"), True),
    ("mmskip.ops", ("mmskip.methods", "mmskip.registry", "mmskip.families"), True),
    ("mmskip.tokens", ("mmskip.methods", "mmskip.registry", "mmskip.families", "mmskip.hf"), True),
    ("mmskip.exits", ("mmskip.methods", "mmskip.registry", "mmskip.families", "mmskip.hf"), True),
]
OPEN = {"mmskip.families.base"}
"""What everyone may import: the vocabulary of sites."""


@pytest.mark.parametrize(("who", "whom", "inside"), MAY_NOT, ids=lambda value: str(value))
def test_the_floors_of_the_library(who, whom, inside):
    violations = []
    for name in files():
        if name == who or name.startswith(f"{who}."):
            for other in sorted(imports(name, inside) - OPEN):
                lower = any(other == w.rstrip(".") or other.startswith(f"{w.rstrip('.')}.") for w in whom)
                if lower and not (who == "mmskip.methods" and other == "mmskip.families"):
                    violations.append((name, f"imports {other}{'' if inside else ' when it is imported'}"))
    report(violations)


KNOWS_TRANSFORMERS = ("mmskip.hf.", "mmskip.families.", "mmskip.ops.hf_attention", "mmskip.utils.pretrained")


def test_transformers_is_known_to_families_and_hf_only():
    """`ops/hf_attention` registers a kernel with it, and `utils/pretrained` builds from its configs."""
    report(
        [
            (name, f"imports {other}")
            for name in files()
            if layer(name) == "library" and not name.startswith(KNOWS_TRANSFORMERS)
            for other in outside_imports(name, ("transformers",))
        ]
    )


def test_files_and_functions_stay_small():
    violations = []
    for name, path in files().items():
        lines = len(path.read_text().splitlines())
        if lines > FILE_LINES:
            violations.append((name, f"has {lines} lines; at most {FILE_LINES}"))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES:
                    violations.append((name, f"{node.name} has {size} lines; at most {FUNCTION_LINES}"))
    report(violations)


HEAVY = ("transformers", "diffusers", "lightning", "torchao", "timm", "matplotlib", "jsonargparse", "peft", "xformers")


def test_import_mmskip_loads_none_of_the_libraries_it_serves():
    code = f"import sys, mmskip; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [] or "mmskip/__init__.py" in KNOWN, (
        "import mmskip loads these; import them where they are used"
    )
