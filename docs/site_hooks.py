"""What MkDocs cannot do from `mkdocs.yml` alone: the list of methods in the menu, and links from pages to files of the
repository outside `docs/` (pictures, results, recipes)."""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))

import tables  # noqa: E402

LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_FILES: dict[str, Path] = {}


def on_config(config: Any) -> Any:
    """Fill the entry `Methods: methods` of the menu."""
    pages: list[Any] = [{"Overview": "methods/index.md"}]
    pages += [{method.title: method.page} for method in tables.methods()]
    config["nav"] = [{"Methods": pages} if entry == {"Methods": "methods"} else entry for entry in config["nav"]]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING and CHANGELOG as pages, a page for each method that has none, and the files of the repository
    that pages link to."""
    for method in tables.methods():
        if files.get_file_from_path(method.page) is None:
            files.append(File.generated(config, method.page, content=tables.generated_page(method)))
    for name, page in PAGES.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    _FILES.clear()
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        folder = (ROOT / "docs" / page.src_uri).parent
        for match in LINK.finditer(page.content_string):
            path = Path(posixpath.normpath(posixpath.join(folder.as_posix(), match[2])))
            if path.is_file() and ROOT in path.parents and DOCS not in path.parents and path.name not in PAGES:
                _FILES[f"files/{path.relative_to(ROOT).as_posix()}"] = path
    for uri, path in _FILES.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links out of `docs/` into links inside the site."""
    here = posixpath.dirname(page.file.src_uri)
    at_root = page.file.src_uri in PAGES.values() and not (DOCS / page.file.src_uri).exists()

    def turn(match: re.Match[str]) -> str:
        target = match[2]
        if ":" in target:
            return match[0]
        inside = posixpath.normpath(posixpath.join("" if at_root else f"docs/{here}", target))
        if inside in PAGES:
            uri = PAGES[inside]
        elif f"files/{inside}" in _FILES:
            uri = f"files/{inside}"
        elif at_root and inside.startswith("docs/"):
            uri = inside.removeprefix("docs/")
        else:
            return match[0]
        return f"{match[1]}{posixpath.relpath(uri, here or '.')}{match[3]}"

    return LINK.sub(turn, markdown)
