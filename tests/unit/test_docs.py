"""The pages: what README names exists, links lead somewhere, and every page can be found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from ouassister.cli.main import VERBS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
README: Final = ROOT / "README.md"
PAGES: Final = sorted([README, ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md")])
LINK: Final = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FENCED: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TABLE_ROW: Final = re.compile(r"^\|.*\|$")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Files that a page links to, with the heading; what lies on other hosts is left out."""
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" not in target:
            path, _, heading = target.partition("#")
            yield ((page.parent / path).resolve() if path else page), heading


def headings(page: Path) -> set[str]:
    """Headings as fragments: lower case, spaces as dashes, punctuation dropped."""
    lines = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


def commands(text: str) -> set[str]:
    """First words after ``ouassister`` where it is called: at the start of a line, or in code."""
    return set(re.findall(r"(?:^ {4}|`)ouassister ([a-z]+)", text, re.MULTILINE))


def test_readme_names_the_two_commands() -> None:
    targets = re.findall(r"^    make (\w+)", README.read_text(), re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_something(page: Path) -> None:
    for path, heading in links(page):
        assert path.exists(), path
        assert path.is_relative_to(ROOT), path
        if heading:
            assert heading in headings(path), f"{name(path)}#{heading}"


def test_every_page_can_be_reached_from_readme() -> None:
    seen: set[Path] = set()
    waiting = [README]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        if page.is_dir():
            waiting += page.glob("*.md")
        elif page.suffix == ".md":
            waiting += [path for path, _heading in links(page)]
    assert {name(page) for page in PAGES if page not in seen} == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_verb_exists(page: Path) -> None:
    assert commands(page.read_text()) <= set(VERBS)


def test_readme_calls_the_verbs_of_the_main_job() -> None:
    assert {"inspect", "plan", "update", "resume", "run"} <= commands(README.read_text())


def test_reference_has_a_section_for_each_verb() -> None:
    assert set(VERBS) <= headings(ROOT / "docs" / "reference" / "command-line.md")


def test_readme_states_six_principles_in_order_of_weight() -> None:
    stated = re.findall(r"^(\d)\. \*\*(.+?)\.\*\*", README.read_text(), re.MULTILINE)
    assert [number for number, _words in stated] == list("123456")
    assert [words for _number, words in stated[:3]] == ["Guest first", "Then truth", "Then speed"]


def test_readme_tree_names_what_there_is() -> None:
    _before, _heading, table = README.read_text().partition("## The tree\n")
    rows = [line.split("|")[1] for line in table.splitlines() if TABLE_ROW.match(line)]
    named: set[str] = set()
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row) or [""]
        named |= {first, *(str(Path(first).parent / other) for other in others)}
    for path in named - {""}:
        assert (ROOT / path).exists(), path
    folders = {
        name(path)
        for path in (ROOT / "src" / "ouassister").iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders <= named


def test_no_placeholder_is_left() -> None:
    left = {name(page): re.findall(r"{{.*?}}", page.read_text()) for page in PAGES}
    assert {page: found for page, found in left.items() if found} == {}


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
