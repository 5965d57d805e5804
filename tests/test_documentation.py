from __future__ import annotations

import re
from pathlib import Path

import pytest

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
