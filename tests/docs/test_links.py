"""Links between the texts lead somewhere, and the README leads to every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.text import ROOT, TEXTS, read

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: Path) -> set[str]:
    """Return the names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_links_lead_somewhere(text: Path) -> None:
    for link in LINK.findall(read(text)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / text.parent / path).resolve() if path else ROOT / text
        assert target.exists(), f"{text}: {link}"
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT)), f"{text}: {link}"


def test_the_readme_leads_to_every_page() -> None:
    linked = set(LINK.findall(read(Path("README.md"))))
    pages = {str(text) for text in TEXTS if text.parent.name == "docs"}
    assert pages <= linked
