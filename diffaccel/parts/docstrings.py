"""Parsing of docstrings in Google style, for descriptions of parts and their keys."""

import inspect
import re
from typing import Any

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|References|Example|Examples|Note):")
ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``(.+?)``")
ENTRY = re.compile(r"    \*{0,2}(\w+)(?: \([^)]*\))?: (.*)")


def sections(documented: Any) -> dict[str, list[str]]:
    """Split a docstring into its sections.

    Args:
        documented: Class, function or module.

    Returns:
        Heading -> lines of the section; ``""`` -> lines before the first heading.
    """
    found: dict[str, list[str]] = {"": []}
    now = ""
    for line in inspect.cleandoc(ROLE.sub(_plain, documented.__doc__ or "")).splitlines():
        if heading := SECTION.fullmatch(line):
            now = heading[1]
            found[now] = []
        else:
            found[now].append(line)
    return found


def _plain(role: re.Match[str]) -> str:
    """Convert a role or code in reStructuredText to plain text."""
    return f"`{role[1] or role[2]}`"


def first_line(documented: Any) -> str:
    """Return the first line of a docstring; empty without one."""
    return next(iter(sections(documented)[""]), "")


def first_paragraph(documented: Any) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return " ".join("\n".join(sections(documented)[""]).split("\n\n")[0].split())


def references(documented: Any) -> list[str]:
    """Return the lines of the references in a docstring, or else in the docstring of its module."""
    own = sections(documented)
    module = inspect.getmodule(documented)
    if "References" not in own and module is not None:
        own = sections(module)
    return [line[4:] for line in own.get("References", []) if line]


def entries(documented: Any, *headings: str) -> dict[str, str]:
    """Return the entries of sections of a docstring: name -> text in one line."""
    found: dict[str, str] = {}
    own = sections(documented)
    for line in (line for heading in headings for line in own.get(heading, [])):
        if entry := ENTRY.fullmatch(line):
            name = entry[1]
            found[name] = entry[2]
        elif found and line.startswith("     "):
            found[name] += f" {line.strip()}"
    return found


def documented_keys(factory: Any) -> dict[str, str]:
    """Return the descriptions of a part's keys in its docstring and those of its base classes."""
    found: dict[str, str] = {}
    for one in reversed(inspect.getmro(factory)) if inspect.isclass(factory) else [factory]:
        found |= entries(one, "Args", "Attributes")
    return found
