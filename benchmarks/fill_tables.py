"""Put the tables of benchmarks/results/ into a page of the documentation: `fill_tables.py [--check] PAGE...`.

A page says where a table goes by `<!-- table: NAME -->`, and its text up to `<!-- end of table -->` is replaced by
what benchmarks/results/NAME.md holds below its title. So no figure in a page is typed by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
PLACE = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end of table -->", re.DOTALL)
MISSING = "*This has not been measured yet.*"


def fill(page: str, results: Path) -> str:
    """Return a page with each of its tables as the results have it now."""

    def table(place: re.Match[str]) -> str:
        name = place["name"]
        file = results / f"{name}.md"
        text = _below_title(file.read_text(encoding="utf-8")) if file.is_file() else MISSING
        return f"<!-- table: {name} -->\n\n{text}\n\n<!-- end of table -->"

    return PLACE.sub(table, page)


def _below_title(text: str) -> str:
    title, _, rest = text.partition("\n")
    return (rest if title.startswith("# ") else text).strip()


def main(arguments: list[str] | None = None) -> int:
    """Fill the pages, or with --check only say which are not up to date; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page is not up to date")
    given = parser.parse_args(arguments)
    stale = []
    for page in given.pages:
        before = page.read_text(encoding="utf-8")
        after = fill(before, RESULTS)
        if after != before:
            stale.append(page)
            if not given.check:
                page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{page.name}: {'not up to date; run benchmarks/fill_tables.py' if given.check else 'filled'}")
    return 1 if given.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
