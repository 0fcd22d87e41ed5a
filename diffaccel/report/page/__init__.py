"""The page of a comparison: one HTML file with everything in it.

Python writes the points as JSON; the scripts draw them with plotly.js, which is shipped beside it. Text from points
reaches the page in the JSON only, and the script puts it into text nodes. A content security policy, with the hashes of
the scripts, keeps the page from running anything else and from loading anything.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from diffaccel.jackknife import partition
from diffaccel.report.axes import COSTS, unequal_denoisers
from diffaccel.report.files import frechet_key
from diffaccel.report.floor import floor_of
from diffaccel.report.page.cards import card_of
from diffaccel.report.page.thumbnails import thumbnails
from diffaccel.report.points import Point, distance
from diffaccel.report.published import published_for
from diffaccel.report.rows import Row, pair_of, parts_of
from diffaccel.report.styles import styles_of
from diffaccel.report.tables import metrics_of, notes
from diffaccel.text.escape import printable
from diffaccel.version import __version__

SCRIPTS = ("statistics.js", "chart.js", "tables.js", "page.js")
"""Scripts of the page, which share one scope."""


class Shown(NamedTuple):
    """Rows of a judge.

    Attributes:
        judge: Name of the judge.
        rows: Rows as the judge sees them.
    """

    judge: str
    rows: Sequence[Row]


def write_page(path: Path, title: str, shown: Sequence[Shown], x: str = "nfe", command: str = "") -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        title: Title.
        shown: Rows of each judge, the first of which is shown first.
        x: Cost that is shown first.
        command: Command that makes the page.
    """
    path.write_text(page(data_of(title, shown, x, command)), encoding="utf-8")


def data_of(title: str, shown: Sequence[Shown], x: str = "nfe", command: str = "") -> dict[str, Any]:
    """Return the contents of the page as plain JSON, without control characters."""
    cards: dict[str, Any] = {}
    shown = [one for one in shown if one.rows]
    pictures, strips = thumbnails([one.rows for one in shown])
    views = [_view(one, cards) | {"strip": strip} for one, strip in zip(shown, strips, strict=True)]
    found = {
        "title": title,
        "version": __version__,
        "command": command,
        "x": x,
        "costs": [{"name": name, "key": cost.key, "label": cost.label} for name, cost in COSTS.items()],
        "views": views,
        "cards": cards,
        "pictures": pictures,
    }
    cleaned: dict[str, Any] = _printable(found)
    return cleaned


def page(data: Mapping[str, Any]) -> str:
    """Return the HTML of the page."""
    own = "\n".join(['"use strict";\n(() => {', *map(_read, SCRIPTS), "})();"])
    scripts = [_read("plotly-basic.min.js"), own]
    return Template(_read("page.html")).substitute(
        title=_escaped(str(data["title"])),
        hashes=" ".join(f"'{_sha256(script)}'" for script in scripts),
        css=_read("page.css"),
        plotly=scripts[0],
        script=scripts[1],
        data=json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"),
    )


def _read(name: str) -> str:
    return files("diffaccel.report.page").joinpath(name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    """Source expression of a script in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _view(shown: Shown, cards: dict[str, Any]) -> dict[str, Any]:
    """Curves and points of a judge; the cards of its points are added to ``cards``."""
    rows = list(shown.rows)
    points = [row.point for row in rows]
    key = frechet_key(points)
    curves: dict[str, list[Point]] = {}
    for row in rows:
        curves.setdefault(row.label, []).append(row.point)
    styles, floor = styles_of(curves), floor_of(points, key)
    return {
        "judge": shown.judge,
        "key": key,
        "metrics": [name for name in metrics_of(points, key) if name != "kid_se"],
        "floor": floor and {"label": floor.label, "value": floor.value},
        "curves": [
            {
                "label": label,
                "method": own[0]["method"],
                "colour": styles[label].colour(),
                "dark": styles[label].colour(dark=True),
                "dashes": styles[label].dashes,
                "marker": styles[label].marker,
                "tuned": own[0]["tuned"],
            }
            for label, own in curves.items()
        ],
        "points": [_point(row, key, list(curves), cards) for row in rows],
        "published": [figure._asdict() for figure in published_for(points)],
        "notes": [*notes(rows), *unequal_denoisers(points)],
    }


def _point(row: Row, key: str, labels: Sequence[str], cards: dict[str, Any]) -> dict[str, Any]:
    point = row.point
    parts = parts_of(point)
    card = card_of(row, key)
    identity = hashlib.sha256(json.dumps(card, sort_keys=True, default=str).encode()).hexdigest()[:12]
    cards[identity] = card
    values = {name: value for name, value in point["metrics"].items() if value is not None}
    return {
        "curve": labels.index(row.label),
        "card": identity,
        "budget": point["nfe_budget"],
        **{cost.key: point[cost.key] for cost in COSTS.values()},
        **{name: point[name] for name in ("n", "seed", "chains")},
        "drawn": distance(point, key) is not None,
        "metrics": values,
        # Points with the same text are a pair.
        "pair": _pair(point),
        "parts": None if parts is None else parts.record(),
        "difference": None if row.difference is None else [_finite(row.difference.fd), _finite(row.difference.se)],
    }


def _pair(point: Point) -> str | None:
    pair = pair_of(point)
    return None if pair is None else json.dumps([*pair, partition(point["chains"])])


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if abs(number) < 1e300 else None


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_printable(one) for one in value]
    return value
