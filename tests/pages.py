"""Pages of the documentation, their blocks and their links, for the tests that run and follow them.

A fenced block in bash or sh is run in a fresh folder, and one in python in the page's own namespace. The line
``<!-- not-run: REASON -->`` above a block exempts it: its commands are only read (see test_advice.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if DOCS / "_build" not in page.parents)]
"""Pages whose blocks are run."""

MARK = re.compile(r"<!-- not-run: (.*) -->")
SHELL = ("bash", "sh")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        page: File that contains it.
        line: Line of the fence.
        language: Word after the fence.
        code: Content.
        reason: Why the block is not run; None for one that is.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None


def fences(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order; the language of a directive is in braces."""
    found: list[Block] = []
    lines = page.read_text().splitlines(keepends=True)
    opened, mark = None, None
    for number, line in enumerate(lines, start=1):
        if opened is None and (match := re.match(r"(`{3,})(\S*)", line)):
            opened = (match[1], match[2], number, mark)
        elif opened is not None and line.rstrip() == opened[0]:
            found.append(Block(page, opened[2], opened[1], "".join(lines[opened[2] : number - 1]), opened[3]))
            opened = None
        if opened is None:
            mark = match[1] if (match := MARK.match(line)) else None
    assert opened is None, f"{page.name}: the fence of line {opened[2]} is not closed" if opened else ""
    return found


def blocks(page: Path, *languages: str) -> list[Block]:
    """Blocks of a page in these languages, in order."""
    return [block for block in fences(page) if block.language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks, HTML comments and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"<!--.*?-->", "", unfenced(page), flags=re.S))


def unfenced(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "", page.read_text(), flags=re.M | re.S)


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page."""
    text = re.sub(r"\n(?!\n)", " ", prose(page))
    return [target.strip("<>") for target in re.findall(r"\]\(([^()\s]+|<[^>]+>)\)", text)]


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub and MyST make of the headings of a page, and explicit ones."""
    text = unfenced(page)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {_slug(head) for head in heads} | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


def _slug(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-")


def named_files(page: Path) -> Iterator[str]:
    """Paths to files of the repository that a page has in backquotes."""
    text = unfenced(page)
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"(?:docs|experiments|tests|benchmarks|diffaccel)/[\w./-]*\w+|[\w./-]+/\w+\.py", span):
            yield span
