"""Model cards: a table of weights from the headers of their files, with distances from points of their experiments."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffaccel.config import EXPERIMENTS, Config, experiment_names, load
from diffaccel.errors import UsageError, suggest
from diffaccel.noise import GENERATOR
from diffaccel.report.files import read_points
from diffaccel.report.judges import judges_of, seen_by
from diffaccel.report.measured import same_settings
from diffaccel.report.points import DERIVED, Point, normalised
from diffaccel.text.terminal import human, number
from diffaccel.weights import open_weights
from diffaccel.weights.files import count_parameters

BUDGETS = (5.0, 10.0)
"""Budgets of the distances."""
HEADS = (
    *("file", "kind", "experiment", "data", "images", "hours", "device", "parameters", "size", "SHA-256", "figure"),
    "command",
)
REST = "..."
"""Text for settings of a fit that a header does not contain."""


class Distance(NamedTuple):
    """Distance of a point.

    Attributes:
        value: Distance.
        se: Standard error; None if unknown.
        n: Number of images.
        seed: Seed of the images.
    """

    value: float
    se: float | None
    n: int
    seed: int


@dataclass(frozen=True)
class Card:
    """Description of a weights file.

    Attributes:
        path: File.
        header: Header of the file.
        sha256: Hash of the file.
        size: Size in bytes.
        parameters: Number of parameters.
        distances: Metric -> budget -> distance of the experiment's own settings with these weights.
    """

    path: Path
    header: Mapping[str, Any]
    sha256: str
    size: int
    parameters: int
    kind: str | None = None
    distances: Mapping[str, Mapping[float, Distance]] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """Command of the fit; without its settings for files up to version 0.2, whose headers lack them."""
        experiment = self.header.get("experiment")
        return str(self.header.get("command") or (f"diffaccel fit {experiment} {REST}" if experiment else ""))

    def cells(self, metric: str | None, n: int | None = None) -> list[str]:
        """Return the cells of the card's row.

        Args:
            metric: Metric of the distances.
            n: Number of images that the table states; distances of another number state theirs.
        """
        header = self.header
        images, hours = header.get("images_seen"), header.get("hours")
        return [
            self.path.name,
            self.kind or "",
            Path(str(header.get("experiment") or header.get("name") or "")).stem,
            str(header.get("data") or ""),
            "" if images is None else f"{images:,}",
            "" if hours is None else f"{hours:.2g}",
            str(header.get("device") or ""),
            f"{self.parameters:,}",
            human(self.size, "B"),
            self.sha256[:12],
            self._figure(metric, n),
            self.command,
        ]

    def _figure(self, metric: str | None, n: int | None) -> str:
        if "accuracy" in self.header:
            return f"test accuracy {self.header['accuracy']:.2%}"
        found = self.distances.get(metric or "", {})
        texts = []
        for budget in BUDGETS if found else ():
            one = found.get(budget)
            error = "" if one is None or one.se is None else f" ± {one.se:.2g}"
            images = "" if one is None or one.n == n else f" (n={one.n:,})"
            texts.append("-" if one is None else f"{number(one.value, 3)}{error}{images}")
        return ", ".join(texts)


def read_cards(data: str | None = None) -> list[Card]:
    """Read the cards of the weights in a folder, or of all shipped weights.

    Args:
        data: Folder of experiments (name under experiments/, or path) with a folder ``weights``, or folder of weights,
            for example the output of a fit; None for all of experiments/.

    Raises:
        UsageError: There are no weights, or a file is damaged.
    """
    if data is None:
        return [card for folder in sorted(EXPERIMENTS.iterdir()) if _files(folder) for card in _cards(folder)]
    for folder in (Path(data).expanduser(), EXPERIMENTS / data):
        if folder.is_dir() and _files(folder):
            return list(_cards(folder))
    known = sorted(folder.name for folder in EXPERIMENTS.iterdir() if _files(folder))
    raise UsageError(f"{data!r} is neither a folder with weights nor under {EXPERIMENTS}{suggest(data, known)}")


def _files(folder: Path) -> list[Path]:
    """Weights files of a folder of experiments, or of a folder of weights."""
    return sorted(folder.glob("weights/*.safetensors")) or sorted(folder.glob("*.safetensors"))


def _cards(folder: Path) -> Iterator[Card]:
    files = sorted(folder.glob("results/**/points.jsonl"))
    points = [normalised(point) for file in files for point in read_points(file)]
    shipped = set(experiment_names())
    for path in _files(folder):
        weights = open_weights(path)
        experiment = weights.header.get("experiment")
        config = load(experiment) if points and experiment in shipped else None
        found = {} if config is None else _distances(path, weights.kind, config, points)
        yield Card(
            path, weights.header, weights.sha256, path.stat().st_size, count_parameters(path), weights.kind, found
        )


# Distances


def _distances(
    path: Path, kind: str | None, config: Config, points: Sequence[Point]
) -> dict[str, dict[float, Distance]]:
    """Distances of the settings of the experiment that made weights, if its points were measured with them."""
    part = {"denoiser": {"checkpoint": config.checkpoint}, "classifier": config.posterior}
    named = part.get(str(kind), config.prior).get("checkpoint")
    if not named or Path(named).resolve() != path.resolve() or not config.checkpoint:
        return {}
    hashes = _hashes(Path(config.checkpoint))
    found: dict[str, dict[float, Distance]] = {}
    # The first point of a budget counts: of the most images, the lowest seed, and the present noise.
    for point in sorted(points, key=lambda one: (-(one["n"] or 0), one["seed"] or 0, one["noise"] != GENERATOR)):
        budget, denoiser = point["nfe_budget"], point["checkpoint"] or {}
        if point["experiment"] != config.experiment or budget not in BUDGETS or denoiser.get("sha256") not in hashes:
            continue
        if not same_settings(point, config.at(budget)):
            continue
        for judge in judges_of(point):
            for metric, one in _frechet(normalised(seen_by(point, judge))):
                found.setdefault(metric, {}).setdefault(budget, one)
    return found


def _hashes(path: Path) -> set[str]:
    """Hashes that points have for a file: its own, and that before its header was rewritten."""
    weights = open_weights(path)
    return {weights.sha256, *([weights.header["header_of"]] if "header_of" in weights.header else [])}


def _frechet(point: Point) -> Iterator[tuple[str, Distance]]:
    metrics = point["metrics"]
    for name, value in metrics.items():
        if name.startswith(("fd_", "fid")) and not name.endswith(DERIVED) and value is not None:
            yield name, Distance(value, metrics.get(f"{name}_se"), point["n"], point["seed"])


# Tables


def chosen_metric(cards: Sequence[Card]) -> str | None:
    """Return the metric in which the most distances are known; None if none is."""
    counts: dict[str, int] = {}
    for card in cards:
        for metric, found in card.distances.items():
            counts[metric] = counts.get(metric, 0) + len(found)
    return max(counts, key=lambda metric: counts[metric], default=None)


def rows(cards: Sequence[Card]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the heads and rows of a table of cards, without empty columns, and its notes."""
    metric = chosen_metric(cards)
    counts = Counter(one.n for one in _shown(cards, metric))
    n = max(counts, key=lambda n: counts[n], default=None)
    table = [card.cells(metric, n) for card in cards]
    kept = [index for index in range(len(HEADS)) if any(row[index] for row in table)]
    return [HEADS[i] for i in kept], [[row[i] for i in kept] for row in table], _notes(cards, metric, n)


def _shown(cards: Sequence[Card], metric: str | None) -> list[Distance]:
    return [one for card in cards for one in card.distances.get(metric or "", {}).values()]


def _notes(cards: Sequence[Card], metric: str | None, n: int | None) -> list[str]:
    notes = []
    if metric is not None and n is not None:
        shown = _shown(cards, metric)
        others = " unless n is given" if {one.n for one in shown} != {n} else ""
        seeds = " or ".join(str(seed) for seed in sorted({one.seed for one in shown}))
        budgets = " and ".join(f"{budget:g}" for budget in BUDGETS)
        notes.append(
            f"figure: {metric} ± one standard error at NFE {budgets}, with the settings of the experiment in the "
            f"command ({n:,} images{others}, seed {seeds})"
        )
    if any(card.command.endswith(REST) for card in cards):
        notes.append(f"{REST}: the header does not contain the settings of the fit")
    return notes


def markdown(cards: Sequence[Card]) -> str:
    """Return a table of cards in Markdown, with its notes below."""
    heads, cells, notes = rows(cards)
    code = {"file", "SHA-256", "command"}
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in cells:
        shown = (f"`{cell}`" if head in code and cell else cell for head, cell in zip(heads, row, strict=True))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in shown) + " |")
    return "\n".join([*lines, *(f"\n{note[0].upper()}{note[1:]}." for note in notes)])
