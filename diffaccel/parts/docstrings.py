"""What docstrings in Google style say of a part and its keys."""

import inspect
import re
from typing import Any

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|References|Example|Examples|Note):")
ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`|``(.+?)``")
ENTRY = re.compile(r"    \*{0,2}(\w+)(?: \([^)]*\))?: (.*)")


def sections(documented: Any) -> dict[str, list[str]]:
    """Split a docstring into its sections.

    Args:
        documented: A class, function or module.

    Returns:
        Heading -> its lines; ``""`` -> the text before the first heading.
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
    """A role or code of reStructuredText, as a terminal shows it."""
    return f"`{role[1] or role[2]}`"


def first_line(documented: Any) -> str:
    """Return the first line of a docstring; empty without one."""
    return next(iter(sections(documented)[""]), "")


def first_paragraph(documented: Any) -> str:
    """Return a docstring up to the first empty line, in one line."""
    return " ".join("\n".join(sections(documented)[""]).split("\n\n")[0].split())


def references(documented: Any) -> list[str]:
    """Return the lines of a docstring's references; those of its module if it has none of its own."""
    own = sections(documented)
    module = inspect.getmodule(documented)
    if "References" not in own and module is not None:
        own = sections(module)
    return [line[4:] for line in own.get("References", []) if line]


def entries(documented: Any, *headings: str) -> dict[str, str]:
    """Return the entries of a docstring's sections, each in one line: name -> text."""
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
    """Return what a part's docstring, and those of the classes above it, say of its keys."""
    found: dict[str, str] = {}
    for one in reversed(inspect.getmro(factory)) if inspect.isclass(factory) else [factory]:
        found |= entries(one, "Args", "Attributes")
    return found
