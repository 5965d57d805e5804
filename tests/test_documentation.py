from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from medfl_ray.config.strategies import STRATEGIES

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
REFERENCE = DOCS / "reference"


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(DOCS)) for page in PAGES])
def test_a_page_links_to_what_the_site_has(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    for link in links:
        target = (page.parent / link).resolve()
        assert target.is_relative_to(DOCS), f"{link} leaves the documentation: the site does not have it"
        assert target.exists() or target.is_relative_to(REFERENCE), link


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The generator of the reference, which also writes the table of the strategies' traits."""
    spec = importlib.util.spec_from_file_location("gen_reference", DOCS / "gen_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def strategy_rows(first_columns: str) -> list[tuple[list[str], list[str]]]:
    """Return the names and the other cells of every row of the strategies' table with these first columns."""
    _, found, table = (DOCS / "strategies.md").read_text(encoding="utf-8").partition(f"| {first_columns} |")
    assert found, f"docs/strategies.md has no table whose columns begin with {first_columns}"
    lines = table.partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(re.findall(r"`(\w+)`", row[0]), row[1:]) for row in rows]


def test_the_table_of_traits_is_up_to_date(generator: ModuleType) -> None:
    page = (DOCS / "strategies.md").read_text(encoding="utf-8")
    written = page.partition(generator.TABLE_BEGINS)[2].partition(generator.TABLE_ENDS)[0]
    assert written.strip() == generator.traits_table().strip(), "run `make reference` and commit the result"
    assert "| `qfedavg` | no | no | no | no | yes | no |" in written


@pytest.mark.parametrize("first_columns", ["`strategy` | what it changes", "`strategy` | trains"])
def test_every_strategy_has_one_row_in_each_table(first_columns: str) -> None:
    names = [name for row in strategy_rows(first_columns) for name in row[0]]
    assert sorted(names) == sorted(STRATEGIES)


def test_what_a_hospital_keeps_and_what_privacy_refuses_are_documented_as_they_are() -> None:
    for names, (_, _, keeps, private) in strategy_rows("`strategy` | trains"):
        for name in names:
            assert bool(keeps) == STRATEGIES[name].stateful, f"{name}: what it keeps for the next round"
            verdict = "sound" if STRATEGIES[name].patient_dp_ok else "refused"
            assert private.startswith(verdict), f"{name}: patient-level DP"
