"""Tables of the documentation, from measured points.

    python docs/tables.py                         # all tables, as Markdown
    python docs/tables.py cifar10_small           # one table
    python docs/tables.py --write README.md       # replace the tables between the marks of a file
    python docs/tables.py --check README.md       # exit status 1 if a table in the file is not that of the points

A file marks the place of a table by ``<!-- points: NAME -->`` and ``<!-- end -->``, and that of the model cards of a
data set by ``<!-- cards: DATA -->`` and ``<!-- end -->``. tables.yaml contains the tables: a row is a bench, and its
cells are the points under experiments/*/results with the settings of this bench, so that no figure is typed.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from diffaccel.config import Config, load
from diffaccel.errors import UsageError
from diffaccel.report.cards import markdown as cards_table
from diffaccel.report.cards import read_cards
from diffaccel.report.files import frechet_key, read_points
from diffaccel.report.judges import judges_of, seen_by
from diffaccel.report.measured import same_settings
from diffaccel.report.points import FORMER_NOISE, normalised

DOCS = Path(__file__).parent
EXPERIMENTS = DOCS.parent / "experiments"
DAGGER = "†"
MARKED = re.compile(r"(<!-- (points|cards): (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

METRICS = {
    "fd": ("`{key}`, the Frechet distance", 1),
    "kid": ("Kernel distance × 1000 by `{judge}`", 1000),
    "recall": ("Recall by `{judge}`", 1),
    "coverage": ("Coverage by `{judge}`", 1),
}
"""Metric of a table -> its description and the factor of its values."""


@dataclass(frozen=True)
class Row:
    """A row: the points of one bench.

    Attributes:
        bench: Experiment, without its data set, and settings, as on the command line.
        cells: Cells before those of the budgets, in Markdown.
        given: Further settings, which several rows share.
    """

    bench: str
    cells: tuple[str, ...]
    given: str = ""

    @property
    def experiment(self) -> str:
        """Name of the experiment without its data set."""
        return self.bench.split()[0]

    @property
    def words(self) -> list[str]:
        """Settings on the command line."""
        return shlex.split(f"{self.bench} {self.given}")[1:]


@dataclass(frozen=True)
class Table:
    """A table, as tables.yaml has it.

    Attributes:
        name: Name of the table.
        data: Data set, a folder of experiments/.
        judge: Extractor that scored the images.
        heads: Heads of the columns before those of the budgets.
        budgets: Budgets, one column each.
        rows: Rows.
        metric: Key of METRICS.
        also: Further metrics, in brackets.
        common: Settings of all rows; ``n`` and ``seed`` select the points.
    """

    name: str
    data: str
    judge: str
    heads: tuple[str, ...]
    budgets: tuple[float, ...]
    rows: tuple[Row, ...]
    metric: str = "fd"
    also: tuple[str, ...] = ()
    common: str = "n=5000 seed=900001"

    def setting(self, key: str) -> int:
        """Return a number among the common settings."""
        return int(dict(word.split("=") for word in self.common.split())[key])

    @cached_property
    def found(self) -> list[tuple[Row, dict[float, dict[str, Any]]]]:
        """Rows that have points by the judge, with the newest point of each budget.

        Raises:
            UsageError: No row has any.
        """
        rows = [(row, cells) for row in self.rows if (cells := self._cells(row))]
        if not rows:
            raise UsageError(f"table {self.name}: no point of {self.data} by {self.judge} matches a row of tables.yaml")
        return rows

    def missing(self) -> list[str]:
        """Return the names of rows without a point by the judge: the first cell, with the last if others share it."""
        found, names = [row for row, _ in self.found], [row.cells[0] for row in self.rows]
        missing = [row for row in self.rows if row not in found]
        return [name if names.count(name := row.cells[0]) == 1 else f"{name} {row.cells[-1]}" for row in missing]

    def _cells(self, row: Row) -> dict[float, dict[str, Any]]:
        common = {"experiment": row.experiment, "n": self.setting("n"), "seed": self.setting("seed")}
        points = [point for point in points_of(self.data, self.judge) if common.items() <= point.items()]
        cells = {}
        for budget in self.budgets:
            own = [point for point in points if point["nfe_budget"] == budget and self._measures(row, point)]
            if own:
                cells[budget] = sorted(own, key=newness)[-1]
        return cells

    def _measures(self, row: Row, point: Mapping[str, Any]) -> bool:
        """Whether the row's command would measure a point of its experiment with the settings of this point."""
        config = _loaded(EXPERIMENTS / self.data / f"{row.experiment}.yaml", tuple(row.words))
        return same_settings(point, config.at(point["nfe_budget"]))


def newness(point: Mapping[str, Any]) -> tuple[bool, list[int]]:
    """Sort key of a point's age: its noise, then its version."""
    version = str((point.get("versions") or {}).get("diffaccel", "0"))
    return point["noise"] != FORMER_NOISE, [int(part) for part in re.findall(r"\d+", version)[:3]]


@cache
def points_of(data: str, judge: str) -> tuple[dict[str, Any], ...]:
    """Return the points of a data set as a judge sees them, normalised."""
    found = []
    for file in sorted((EXPERIMENTS / data / "results").rglob("points.jsonl")):
        last = file.parent.name
        known = (EXPERIMENTS / data / f"{last}.yaml").is_file()  # version 0.1 did not write the experiment
        for point in (normalised(seen_by(one, judge)) for one in read_points(file) if judge in judges_of(one)):
            named = str(point["experiment"] or "").rpartition("/")[2]
            point["experiment"] = named or (last if known else str(point["method"]))
            found.append(point)
    return tuple(found)


@cache
def _loaded(file: Path, words: tuple[str, ...]) -> Config:
    return load(str(file), words, trains=False)


@cache
def tables() -> dict[str, Table]:
    """Read tables.yaml."""
    found = {}
    for name, node in yaml.safe_load((DOCS / "tables.yaml").read_text()).items():
        rows = tuple(Row(**{**row, "cells": tuple(row["cells"])}) for row in node.pop("rows"))
        lists = {key: tuple(node[key]) for key in ("heads", "budgets", "also") if key in node}
        found[name] = Table(name=name, rows=rows, **{**node, **lists})
    return found


def named(name: str) -> Table:
    """Return a table.

    Raises:
        UsageError: There is no such table.
    """
    if name not in tables():
        raise UsageError(f"no table is called {name!r}: tables.yaml has {', '.join(tables())}")
    return tables()[name]


def value_of(point: Mapping[str, Any], name: str) -> tuple[float, float | None]:
    """Return a metric of a normalised point, and its standard error."""
    key = frechet_key([point]) if name == "fd" else name
    factor = METRICS[name][1]
    value, error = point["metrics"][key], point["metrics"].get(f"{key}_se")
    return factor * value, None if error is None else factor * error


def cell(point: Mapping[str, Any], table: Table) -> str:
    """Write a point as a cell: value ± standard error, further metrics, evaluations below the budget, and a dagger."""
    text = _written(*value_of(point, table.metric))
    if table.also:
        text += f" ({', '.join(f'{value_of(point, one)[0]:.2f}' for one in table.also)})"
    if point["nfe"] < point["nfe_budget"] - 1e-9:
        text += f" [{point['nfe']:g}]"
    if point["chains"] and (effective := point["metrics"].get("effective_n")) is not None:
        repeats = point["metrics"].get("near_repeats")
        text += f" {{{effective:.0f}" + ("}" if repeats is None else f", {repeats:.2f}}}")
    return text + (DAGGER if point["noise"] == FORMER_NOISE else "")


def _written(value: float, error: float | None) -> str:
    if error is None:
        return f"{value:.3g}"
    digits = 2 if error < 0.095 or value < 10 else 1 if error < 9.5 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def markdown(table: Table) -> str:
    """Render a table with a line on what it shows."""
    found = table.found
    lines = [
        "| " + " | ".join([*table.heads, *(f"NFE {budget:g}" for budget in table.budgets)]) + " |",
        "|" + "---|" * len(table.heads) + "---:|" * len(table.budgets),
    ]
    for row, cells in found:
        values = [cell(cells[budget], table) if budget in cells else "" for budget in table.budgets]
        lines.append("| " + " | ".join([*row.cells, *values]) + " |")
    return "\n".join([*lines, "", note(table)]) + "\n"


def metric(table: Table) -> str:
    """Describe the metric of a table, with the number of images and the seed."""
    first = next(iter(table.found[0][1].values()))
    what = METRICS[table.metric][0].format(key=frechet_key([first]), judge=table.judge)
    return f"{what}, ± one standard error, of {first['n']:,} images (seed {first['seed']})"


def note(table: Table) -> str:
    """Describe what a table shows: metric, number of images, floor, precision, version and noise."""
    points = [point for _, cells in table.found for point in cells.values()]
    first = points[0]
    parts = [metric(table)]
    floor = f"{frechet_key([first])}_floor" if table.metric == "fd" else f"{table.metric}_floor"
    value = first["metrics"].get(floor, first["metrics"].get(f"{table.metric}_real"))
    if value is not None:
        count = (first["floor"] or {}).get("n") if table.metric == "fd" else None  # of others, fewer
        real = f"{count:,} held-out images" if count else "held-out images"
        parts.append(f"floor ({real}): {METRICS[table.metric][1] * value:.3g}")
    if table.also:
        real = ", ".join(f"{first['metrics'][f'{one}_real']:.2f}" for one in table.also)
        parts.append(f"in parentheses {' and '.join(table.also)} (held-out images: {real})")
    if any(point["nfe"] < point["nfe_budget"] - 1e-9 for point in points):
        parts.append("in square brackets the evaluations spent, where the budget can't be met exactly")
    if any(point["chains"] and point["metrics"].get("effective_n") is not None for point in points):
        parts.append("in braces, for chains, the effective number of images and the fraction of near repeats")
    parts.append("/".join(sorted({str(point["precision"]) for point in points})))
    versions = sorted({str((point.get("versions") or {}).get("diffaccel", "?")) for point in points})
    text = "; ".join([*parts, f"diffaccel {', '.join(versions)}"]) + "."
    if any(point["noise"] == FORMER_NOISE for point in points):
        text += f" {DAGGER} Measured by version 0.1, which drew other noise for the same seed."
    if missing := table.missing():
        text += f" Not measured by `{table.judge}`: {'; '.join(missing)}."
    return text


def commands(table: Table) -> str:
    """Return the commands that measure a table, with loops over benches that differ in solver or method only."""
    budgets = ",".join(f"{budget:g}" for budget in table.budgets)
    shared = [f"nfe={budgets}", *shlex.split(table.common)]
    plain = [row.experiment for row in table.rows if not row.words]
    solvers: dict[str, list[str]] = {}
    others = []
    for row in table.rows:
        if len(row.words) == 1 and row.words[0].startswith("solver="):
            solvers.setdefault(row.experiment, []).append(row.words[0].partition("=")[2])
        elif row.words:
            words = shlex.join([f"{table.data}/{row.experiment}", *row.words])
            others.append(f"diffaccel bench {words} " + '"${COMMON[@]}"')
    lines = [f"COMMON=({' '.join(shared)})"]
    lines += _loop("method", list(dict.fromkeys(plain)), f'diffaccel bench {table.data}/$method "${{COMMON[@]}}"')
    for experiment, names in solvers.items():
        line = f'diffaccel bench {table.data}/{experiment} solver=$solver "${{COMMON[@]}}"'
        lines += _loop("solver", names, line)
    return "\n".join([*lines, *others]) + "\n"


def _loop(variable: str, values: Sequence[str], line: str) -> list[str]:
    if len(values) < 2:
        return [line.replace(f"${variable}", value) for value in values]
    return [f"for {variable} in {' '.join(values)}", f"do {line}; done"]


def written(text: str) -> str:
    """Replace the tables between the marks of a text.

    Raises:
        UsageError: A mark names no table.
    """
    makers = {"points": lambda name: markdown(named(name)), "cards": cards}
    return MARKED.sub(lambda found: f"{found[1]}{makers[found[2]](found[3])}{found[5]}", text)


def cards(data: str) -> str:
    """Render the model cards of a data set's weights, except those without averaging."""
    return cards_table([card for card in read_cards(data) if not card.path.stem.endswith("_raw")]) + "\n"


def main(arguments: Iterable[str] | None = None) -> int:
    """Print tables, or write them into a file or check those of a file; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="names of tables in docs/tables.yaml; all by default")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the tables between the marks of a file")
    parser.add_argument("--check", type=Path, metavar="FILE", help="check the tables between the marks of a file")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        if options.write or options.check:
            file = options.write or options.check
            old = file.read_text()
            new = written(old)
            if options.write:
                file.write_text(new)
            elif old != new:
                print(f"{file}: a table is not that of the points: python docs/tables.py --write {file}")
                return 1
        else:
            for name in options.names or tables():
                print(f"## {name}\n\n{markdown(named(name))}\n```bash\n{commands(named(name))}```\n")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
