"""Tables for README and docs, generated from the registry.

    python -m mmskip.utils.tables docs/methods.md README.md

replaces what stands between `<!-- table: NAME -->` and `<!-- end of table -->` in each file; `--check` only says which
files are out of date. Names: `methods` (methods by families), `compose` (which aspects compose).
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

FAMILIES = {
    "decoder": "decoders",
    "vlm": "VLMs",
    "encoder_decoder": "encoder-decoders",
    "encoder": "encoders",
    "cnn": "CNNs",
    "unet": "UNets",
}
"""Families of mmskip, with the heading of their column."""
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def methods_table() -> str:
    """Return the methods that come with mmskip, one per row, with the families that each serves."""
    from mmskip.registry import config_types, families_of

    rows = [["method", *FAMILIES.values()], ["---"] * (len(FAMILIES) + 1)]
    for name, config in sorted(config_types().items()):
        if config.__module__.startswith("mmskip."):
            served = families_of(config)
            summary = re.split(r"[.:]\s", f"{config.__doc__ or ''} ".replace("\n", " ").strip(), maxsplit=1)[0]
            rows.append([f"`{name}`: {summary}", *("yes" if family in served else "" for family in FAMILIES)])
    return _table(rows)


def compose_table() -> str:
    """Return which pairs of aspects share a module, or exclude each other in one stack of blocks."""
    from mmskip.composition import APART, TOGETHER, WITH_ALL

    rows = [["aspects", "on the same module", "elsewhere in the stack"], ["---"] * 3]
    rows += [[f"`{aspect}` and any other", "compose", "compose"] for aspect in sorted(WITH_ALL)]
    rows += [[_pair(pair), "compose", "compose"] for pair in sorted(TOGETHER, key=sorted)]
    rows += [[_pair(pair), "refused", "refused"] for pair in sorted(APART, key=sorted)]
    rows.append(["any other two", "refused", "compose"])
    return _table(rows)


def _pair(pair: frozenset[str]) -> str:
    first, *rest = sorted(pair)
    return f"`{first}` and `{rest[0] if rest else first}`"


def _table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


TABLES: dict[str, Callable[[], str]] = {"methods": methods_table, "compose": compose_table}


def filled(text: str) -> str:
    """Return `text` with its marked tables as they are today.

    Raises:
        ValueError: a mark names no table.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"there is no table {match[2]!r}; expected one of {', '.join(TABLES)}.")
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return _MARKED.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    """Fill the tables of files; with `--check`, return 1 if one is out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="Markdown files with marked tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    options = parser.parse_args(arguments)
    stale = [path for path in options.files if filled(path.read_text()) != path.read_text()]
    for path in stale:
        if options.check:
            print(f"{path}: a table is out of date; run python -m mmskip.utils.tables {path}")
        else:
            path.write_text(filled(path.read_text()))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
