"""The tables of README and docs that follow from the registry. `python docs/tables.py --write` writes them into the
pages, between their marks; `tests/docs/test_docs_tables.py` holds the pages to them."""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mmskip
from mmskip import composition, families, registry
from mmskip.utils import moved

DOCS = Path(__file__).resolve().parent
PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")
MARK = "<!-- generated: {name} -->"
END = "<!-- end -->"

FAMILIES = {
    "decoder": "decoders",
    "vlm": "VLMs",
    "encoder_decoder": "encoder-decoders",
    "encoder": "encoders",
    "cnn": "CNNs",
    "unet": "UNets",
}
"""Headings of the families' columns; others, of plug-ins too, are headed by their names."""

ORDER = (
    "MoDConfig",
    "TokenReductionConfig",
    "EarlyExitConfig",
    "LayerPlanConfig",
    "FFNSkipConfig",
    "LACConfig",
    "LayerBitsConfig",
    "SelfSpeculationConfig",
    "SkipScaleConfig",
    "FreeUConfig",
    "StepCacheConfig",
    "LayerMaskConfig",
)
"""Of the menu; further methods follow."""


EVERYWHERE = {"LACConfig", "SelfSpeculationConfig"}
"""Methods that claim every block."""


@dataclass(frozen=True)
class Method:
    """A registered method, as the pages show it."""

    config: type

    @property
    def name(self) -> str:
        return self.config.__module__.rpartition(".")[2]

    @property
    def page(self) -> str:
        """Of the page, below docs/."""
        return f"methods/{self.name}.md"

    @property
    def title(self) -> str:
        page = DOCS / self.page
        found = re.search(r"^# (.+)$", page.read_text(encoding="utf-8"), re.M) if page.is_file() else None
        return found[1] if found else self.config.__name__.removesuffix("Config")

    def link(self, prefix: str = "") -> str:
        """Its title, with a link where the page is a file."""
        return f"[{self.title}]({prefix}{self.name}.md)" if (DOCS / self.page).is_file() else self.title

    @property
    def papers(self) -> tuple[str, ...]:
        """arXiv ids that its page and its module name, the page's first."""
        page = DOCS / self.page
        line = (
            re.search(r"^\*\*Paper:.*?\n\n", page.read_text(encoding="utf-8"), re.M | re.S) if page.is_file() else None
        )
        source = inspect.getdoc(sys.modules[self.config.__module__]) or ""
        return tuple(dict.fromkeys(PAPER.findall((line[0] if line else "") + source)))

    @property
    def families(self) -> tuple[str, ...]:
        return registry.families_of(self.config)


def methods() -> list[Method]:
    """The methods that mmskip itself registers, in the order of the pages' menu."""
    known = [config for config in registry.config_types().values() if config.__module__.startswith("mmskip.")]
    known.sort(key=lambda config: ORDER.index(config.__name__) if config.__name__ in ORDER else len(ORDER))
    return [Method(config) for config in known]


def generated_page(method: Method) -> str:
    """The page of a method that has none under docs/methods: the text of its module, and its settings."""
    text = inspect.getdoc(sys.modules[method.config.__module__]) or ""
    path = f"{method.config.__module__}.{method.config.__name__}"
    options = "{members: false, show_root_heading: false, show_root_toc_entry: false}"
    return f"# {method.title}\n\n{text}\n\n## Settings\n\n::: {path}\n    options: {options}\n"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def families_table(prefix: str = "") -> str:
    """Methods by families: which models a method serves.

    Args:
        prefix: of the links to the methods' pages.
    """
    names = [name for name in families.names() if any(name in method.families for method in methods())]
    rows = [["method", "config", *(FAMILIES.get(name, name) for name in names)]]
    for method in methods():
        marks = ["yes" if name in method.families else "" for name in names]
        rows.append([method.link(prefix), f"`{method.config.__name__}`", *marks])
    return _table(rows)


def papers_table() -> str:
    """Methods and the papers their modules name."""
    rows = [["method", "paper (arXiv)"]]
    for method in methods():
        rows.append([method.link(), ", ".join(method.papers) or "see the page"])
    return _table(rows)


def served(method: Method) -> str:
    """The families that a method serves, and the methods it composes with."""
    names = ", ".join(FAMILIES.get(name, name) for name in families.names() if name in method.families)
    found: dict[str, list[str]] = {"yes": [], "elsewhere": []}
    for other in methods():
        found.get(composed(method, other) if other != method else "", []).append(other.link())
    together = [", ".join(found["yes"])] if found["yes"] else []
    together += [f"on other sites {', '.join(found['elsewhere'])}"] if found["elsewhere"] else []
    lines = [f"**Serves:** {names}.", f"**Composes with:** {'; '.join(together) or 'no other method of its models'}."]
    return "\n\n".join(lines)


def compositions_table(family: str) -> str:
    """Pairs of the methods that serve a family."""
    shown = [method for method in methods() if family in method.families]
    rows = [["", *(method.title for method in shown)]]
    for method in shown:
        rows.append([method.title, *(composed(method, other) for other in shown)])
    return _table(rows)


def composed(one: Method, other: Method) -> str:
    if not set(one.families) & set(other.families):
        return ""
    pairs = [frozenset({a, b}) for a in one.config.ASPECTS for b in other.config.ASPECTS]
    if one == other:
        return "no" if one.config.__name__ in EVERYWHERE or "unet" in one.families else "elsewhere"
    if any(composition.WITH_ALL & pair for pair in pairs):
        return "yes"
    if any(pair in composition.APART for pair in pairs):
        return "no"
    if {one.config.__name__, other.config.__name__} & EVERYWHERE:
        return "no"
    if all(len(pair) == 2 and (pair in composition.TOGETHER or "steps" in pair) for pair in pairs):
        return "yes"
    return "elsewhere"


def settings_table() -> str:
    """Fields and values of configs that have another name today."""
    rows = [["config", "old", "new"]]
    for method in methods():
        names, values, _, retired = getattr(method.config, "_renamed", ({}, {}, None, ()))
        title = f"`{method.config.__name__}`"
        rows += [[title, f"`{old}`", f"`{new}`"] for old, new in names.items()]
        earlier = {new: old for old, new in names.items()}
        for field, choices in values.items():
            name = earlier.get(field, "kv" if "kv" in retired else field)
            taken = {old: new for old, new in choices.items() if _takes(method.config, field, new)}
            rows += [[title, f'`{name}="{old}"`', f'`{field}="{new}"`'] for old, new in taken.items()]
        if retired:
            rows.append([title, ", ".join(f"`{old}`" for old in retired), "nested, see below"])
    return _table(rows)


def _takes(config: type, field: str, value: str) -> bool:
    try:
        config(**{field: value})
    except ValueError:
        return False
    return True


def modules_table() -> str:
    """Module paths that have another name today."""
    rows = [[f"`mmskip.{old}`", f"`mmskip.{new}`"] for old, new in sorted({**moved.MOVED, **moved.FUNCTIONS}.items())]
    return _table([["old", "new"], *rows])


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "families": ("methods/index.md", families_table),
    "papers": ("methods/index.md", papers_table),
    "decoder compositions": ("methods/index.md", partial(compositions_table, "decoder")),
    "unet compositions": ("methods/index.md", partial(compositions_table, "unet")),
    "settings": ("migration.md", settings_table),
    "modules": ("migration.md", modules_table),
    "start": ("index.md", lambda: families_table("methods/")),
}
"""Name of a mark -> page and table."""


def _marks(page: str) -> dict[str, Callable[[], str]]:
    """The marks of a page, with what belongs there."""
    found = {name: make for name, (place, make) in TABLES.items() if place == page}
    for method in methods():
        if method.page == page:
            found["served"] = partial(served, method)
    return found


def pages() -> list[str]:
    """The pages with marks, below docs/."""
    own = [method.page for method in methods() if (DOCS / method.page).is_file()]
    return sorted({*(page for page, _ in TABLES.values()), *own})


def written(page: str) -> str:
    """The text of a page with its tables made anew.

    Raises:
        ValueError: a mark is missing.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    for name, make in _marks(page).items():
        start = MARK.format(name=name)
        before, found, rest = text.partition(f"{start}\n")
        _, end, after = rest.partition(END)
        if not found or not end:
            raise ValueError(f"docs/{page} has no {start} ... {END}.")
        text = f"{before}{found}\n{make()}\n\n{end}{after}"
    return text


def main() -> None:
    """Write the tables, or say which page differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages; otherwise exit 1 if one differs")
    options = parser.parse_args()
    stale = [page for page in pages() if written(page) != (DOCS / page).read_text(encoding="utf-8")]
    for page in stale:
        if options.write:
            (DOCS / page).write_text(written(page), encoding="utf-8")
        print(f"docs/{page}: {'written' if options.write else 'stale; run python docs/tables.py --write'}")
    sys.exit(0 if options.write or not stale else 1)


assert mmskip.MethodConfig  # registers all methods


if __name__ == "__main__":
    main()
