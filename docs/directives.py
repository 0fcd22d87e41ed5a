"""Directives of the documentation: tables and curves of points, the parts, and what ``import diffaccel`` offers."""

import inspect
from pathlib import Path
from typing import Any

import figures
import tables
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

import diffaccel
from diffaccel.errors import UsageError
from diffaccel.parts.catalogue import CATALOGUE, DESCRIPTIONS, registry_of
from diffaccel.verbs.listing import Explanation, explain, list_parts

DOCS = Path(__file__).parent
EXTRA = DOCS / "_generated" / "extra"
"""Files that are copied into the site as they are."""


class Points(SphinxDirective):
    """``{points} NAME``: a table of measured points, and the commands that measure it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Render the table."""
        table = _table(self.arguments[0])
        self.env.note_dependency(str(tables.DOCS / "tables.yaml"))
        for file in (tables.EXPERIMENTS / table.data / "results").rglob("points.jsonl"):
            self.env.note_dependency(str(file))
        text = f"{tables.markdown(table)}\nMeasured by:\n\n```bash\n{tables.commands(table)}```\n"
        return self.parse_text_to_nodes(text)


class Curve(SphinxDirective):
    """``{curve} NAME``: the curve of a table's rows, drawn from its points."""

    required_arguments = 1
    option_spec = {"rows": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Draw the curve and return the figure."""
        table = _table(self.arguments[0])
        rows = [row.strip() for row in self.options.get("rows", "").split(";") if row.strip()]
        number = self.env.new_serialno("curve")
        name = f"{self.env.docname.replace('/', '_')}_{number}"
        file = figures.curve(table, rows, DOCS / "_generated" / f"{name}.png")
        caption = f"Points of the table `{table.name}`: {tables.metric(table)}"
        up = "../" * (self.env.docname.count("/"))
        return self.parse_text_to_nodes(
            f"```{{figure}} {up}_generated/{file.name}\n:alt: {table.name}\n\n{caption}\n```\n"
        )


class Strip(SphinxDirective):
    """``{strip}``: samples of digits by every method and budget, from the same noise."""

    def run(self) -> list[nodes.Node]:
        """Sample, draw and return the figure."""
        file = figures.strip(DOCS / "_generated" / "strip.png")
        up = "../" * (self.env.docname.count("/"))
        caption = f"{figures.STRIP_TITLE} Drawn by `python docs/figures.py`."
        return self.parse_text_to_nodes(
            f"```{{figure}} {up}_generated/{file.name}\n:alt: samples of digits\n\n{caption}\n```\n"
        )


class Page(SphinxDirective):
    """``{page} EXPERIMENTS``: the interactive page of the shipped points of a data set, and a link to it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the page, and return the link."""
        name = self.arguments[0]
        for file in (tables.EXPERIMENTS / name / "results").rglob("points.jsonl"):
            self.env.note_dependency(str(file))
        folder = f"compare_{name}"
        figures.page(name, EXTRA / folder)
        up = "../" * self.env.docname.count("/")
        link = nodes.reference("", f"Open the interactive page of {name}", refuri=f"{up}{folder}/index.html")
        return [nodes.paragraph("", "", link)]


class Parts(SphinxDirective):
    """``{parts}``: all groups with their parts, as ``diffaccel list`` and ``diffaccel explain`` print them."""

    def run(self) -> list[nodes.Node]:
        """Render a section for each group."""
        return self.parse_text_to_nodes("\n".join(map(_group, CATALOGUE)), allow_section_headings=True)


class Offered(SphinxDirective):
    """``{offered} KIND``: documentation of the names in ``diffaccel.__all__`` of a kind."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Render the docstrings."""
        lines = []
        for name in offered()[self.arguments[0]]:
            value = getattr(diffaccel, name)
            what = "autoexception" if _is_error(value) else "autoclass" if inspect.isclass(value) else "autofunction"
            lines += [f".. {what}:: diffaccel.{name}", *(["   :members:"] if what == "autoclass" else []), ""]
        block = "\n".join(lines)
        return self.parse_text_to_nodes(f"```{{eval-rst}}\n{block}\n```\n")


def offered() -> dict[str, list[str]]:
    """Return the names in ``__all__`` by kind: ``sampling``, ``commands``, ``errors``."""
    found: dict[str, list[str]] = {"sampling": [], "commands": [], "errors": []}
    for name in diffaccel.__all__:
        value = getattr(diffaccel, name)
        if name.startswith("__"):
            continue
        command = getattr(value, "__module__", "") == "diffaccel.api" and name != "load"
        found["errors" if _is_error(value) else "commands" if command else "sampling"].append(name)
    return found


def _is_error(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Exception)


def _table(name: str) -> tables.Table:
    try:
        return tables.named(name)
    except UsageError as error:
        raise ExtensionError(str(error)) from error


def _group(group: str) -> str:
    described = [explain(group, one.name) for one in list_parts(group)]
    lines = [f"## {group}", "", f"{DESCRIPTIONS[group].capitalize()}. Entry points: `{registry_of(group).group}`.", ""]
    return "\n".join([*lines, *map(_part, described)])


def _part(part: Explanation) -> str:
    lines = [f"(part-{part.group}-{part.name})=", f"### {part.group} `{part.name}`", "", part.what, ""]
    if part.keys:
        lines += ["| key | type | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {_escaped(key.type)} | {f'`{key.default}`' if key.default else '(required)'} | "
            f"{_escaped(key.what)} |"
            for key in part.keys
        ]
    if part.references:
        lines += ["", "References: " + " ".join(part.references)]
    if part.experiments:
        lines += ["", "Experiments: " + ", ".join(f"`{name}`" for name in part.experiments)]
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives."""
    EXTRA.mkdir(parents=True, exist_ok=True)
    for directive in (Points, Curve, Strip, Page, Parts, Offered):
        app.add_directive(directive.__name__.lower(), directive)
    return {"parallel_read_safe": False}
