"""Grouping of points into curves, and labels of the curves of a plot or table.

Points of one curve differ in budget and seed only. Settings that are tuned for each budget form one curve. Labels
consist of the settings in which the curves differ, and are unique.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffaccel.budget import nearest
from diffaccel.report.points import Point, normalised, settings_of
from diffaccel.text.escape import printable

Leaves = dict[str, str]
"""Values as text by dotted key."""

FIRST = ("tuned", "older", "solver.name", "prior.name")
"""Leaves that come first in a label, as values without keys."""
SETTINGS = ("prior.", "solver.")
FILES = ("checkpoint", "init", "path")
"""Last parts of keys of paths, which a label contains only if it would be ambiguous otherwise."""
NAME = "name of the source"
"""Leaf of the name that the user gave to a source; it has spaces, so that no setting has its key."""
TUNING = "tuning"
"""Key of the configuration of a point with the settings of each budget of its experiment, or their hash."""
DEPTH = 8
"""Maximum depth to which nested settings are compared key by key."""
LONGEST = 32
"""Maximum number of characters of a value in a label."""


class Place(NamedTuple):
    """Curve of a point.

    Attributes:
        label: Label of the curve.
        replaced: Whether the measurement is repeated later in the same folder or earlier in another folder.
    """

    label: str
    replaced: bool


@dataclass
class Curve:
    """Points of one curve.

    Attributes:
        members: Indices of the points.
        shared: Settings of every point, without budget and seed.
        common: For tuned points, settings that are equal for all budgets.
    """

    members: list[int]
    shared: Leaves
    common: Leaves = field(default_factory=dict)


def places_of(
    points: Sequence[Point], folders: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> list[Place]:
    """Group points into curves and label the curves.

    Args:
        points: Points in the order of their measurement, from any version's points.jsonl.
        folders: Folder of each point; None for a common folder.
        names: Name of each point's source, which replaces the method in labels; empty, or None, for no name. Points
            with different names are in different curves.

    Returns:
        Curve of each point.
    """
    points = [normalised(point) for point in points]
    folders = folders or [""] * len(points)
    sorter = _Sorter(points, folders, names or [""] * len(points))
    curves = sorter.curves()
    labels = _labels(curves, sorter.paths)
    found: dict[int, Place] = {}
    for curve, label in zip(curves, labels, strict=True):
        found |= {member: Place(label, member in sorter.replaced) for member in curve.members}
    return [found[number] for number in range(len(points))]


class _Sorter:
    """Grouping of points into curves.

    Args:
        points: Normalised points.
        folders: Folder of each point.
        names: Name of each point's source, or an empty string.

    Attributes:
        replaced: Indices of the points that are replaced by a repeated measurement.
        paths: Files of weights by the hash of the weights.
    """

    def __init__(self, points: Sequence[Point], folders: Sequence[str], names: Sequence[str]) -> None:
        self.points, self.folders, self.names = points, folders, names
        self.replaced: set[int] = set()
        self.paths: dict[str, str] = {}
        self.settings = [_without_weights(_leaves(point["settings"]), point) for point in points]

    def curves(self) -> list[Curve]:
        """Return the curves in the order of their first points."""
        groups: dict[Hashable, Curve] = {}
        for number in range(len(self.points)):
            shared = self._shared(number)
            key = tuple(sorted(shared.items()))
            groups.setdefault(key, Curve([], shared)).members.append(number)
        found = []
        for group in groups.values():
            for curve in self._tuned(group):
                found += self._measured_once(curve)
        return sorted(found, key=lambda curve: curve.members[0])

    def _shared(self, number: int) -> Leaves:
        """Settings of a point that are shared by all points of its curve."""
        point, settings = self.points[number], dict(self.settings[number])
        configuration = _leaves({key: value for key, value in point["configuration"].items() if key != TUNING})
        shared = {"method": _as_text(point["method"]), "noise": point["noise"], NAME: self.names[number]}
        if point["tuned"]:
            shared["tuned"], settings = "tuned for each NFE", {}
        shared |= settings | {f"weights.{name}": _as_text(known) for name, known in point["weights"].items()}
        shared |= {key: _as_text(point[key]) for key in ("n", "precision") if point[key] is not None}
        if not point["configuration"]:
            shared["older"] = "older version"
            shared |= {key: _as_text(point[key]) for key in ("experiment", "process", "data") if point[key] is not None}
            if point["key"] is None:  # weights in training, which have no hash
                shared["folder"] = self.folders[number]
        if point["checkpoint"]:
            shared["checkpoint"] = _as_text(point["checkpoint"].get("sha256"))
            self.paths.setdefault(shared["checkpoint"], _as_text(point["checkpoint"].get("path")))
        shared |= configuration
        for kind in ("extractor", "reference"):
            if point[kind]["sha256"] is not None:
                shared[kind] = point[kind]["sha256"]
        return shared

    def _tuned(self, group: Curve) -> list[Curve]:
        """Split a group of tuned points into curves with one setting per budget: points of one experiment's search.

        A later search of some of its budgets leaves the points of the others in the curve, if they are in its folder.
        """
        if "tuned" not in group.shared:
            return [group]
        groups, left = [], group.members
        for number in reversed(group.members):
            if number in left and (tuning := _tuning(self.points[number])):
                own = [other for other in left if other == number or self._continues(other, number, tuning)]
                groups.append(own)
                left = [other for other in left if other not in own]
        groups.reverse()
        if left:
            groups += self._of_unknown_search(left)
        return [Curve(members, group.shared, self._common(members)) for members in groups]

    def _continues(self, earlier: int, number: int, tuning: Mapping[int, Leaves]) -> bool:
        """Whether a point has the settings of its budget in ``tuning``, and the same tuning or folder as another."""
        point = self.points[earlier]
        if _tuning(point) != tuning and self.folders[earlier] != self.folders[number]:
            return False  # of another search, which may be compared with this one
        budget = math.inf if point["nfe_budget"] is None else point["nfe_budget"]
        return _without_weights(tuning[nearest(tuning, budget)], point) == self.settings[earlier]

    def _of_unknown_search(self, members: list[int]) -> list[list[int]]:
        """Split points of versions that did not record the settings of other budgets."""
        if not self._ambiguous(members):
            return [members]
        by_search = _split(members, lambda number: _as_text(self.points[number]["configuration"].get(TUNING)))
        parts = [part for each in by_search for part in _split(each, lambda number: self.folders[number])]
        return self._merged([part for each in parts for part in self._unambiguous(each)])

    def _ambiguous(self, members: Iterable[int]) -> bool:
        """Whether the points have several settings for a budget."""
        settings: dict[Any, Leaves] = {}
        return any(
            settings.setdefault(self.points[number]["nfe_budget"], self.settings[number]) != self.settings[number]
            for number in members
        )

    def _unambiguous(self, members: list[int]) -> list[list[int]]:
        """Split by the first key in which settings of a budget differ, solver and prior first, until none differs."""
        budgets = _split(members, lambda number: self.points[number]["nfe_budget"])
        keys = dict.fromkeys(["solver.name", "prior.name", *(key for each in members for key in self.settings[each])])
        for key in keys:
            if any(len({self.settings[number].get(key) for number in budget}) > 1 for budget in budgets):
                parts = _split(members, lambda number: self.settings[number].get(key))  # noqa: B023 (called at once)
                return [part for each in parts for part in self._unambiguous(each)]
        return [members]

    def _merged(self, groups: list[list[int]]) -> list[list[int]]:
        """Merge groups that have budgets in common, with the same settings for each (points of other seeds)."""
        kept: list[list[int]] = []
        for group in groups:
            budgets = {self.points[number]["nfe_budget"] for number in group}
            for other in kept:
                shares = any(self.points[number]["nfe_budget"] in budgets for number in other)
                if shares and not self._ambiguous([*other, *group]):
                    other += group
                    break
            else:
                kept.append(group)
        return kept

    def _common(self, members: list[int]) -> Leaves:
        first, *others = (self.settings[number] for number in members)
        return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}

    def _measured_once(self, curve: Curve) -> list[Curve]:
        """Find repeated measurements, and split a curve with several measurements for one budget and seed.

        Such measurements differ in a setting that points don't record.
        """
        at: dict[Hashable, list[int]] = defaultdict(list)
        for number in curve.members:
            at[self.points[number]["nfe_budget"], self.points[number]["seed"]].append(number)
        repeated = [self._repeated(numbers) for numbers in at.values()]
        if max(map(len, repeated)) > 1:
            if len(parts := _split(curve.members, lambda number: self.folders[number])) > 1:
                own = [Curve(part, {**curve.shared, "folder": self.folders[part[0]]}, curve.common) for part in parts]
                return [part for each in own for part in self._measured_once(each)]
            found = [same for measured in repeated for same in measured]
        else:
            found = [curve.members]
        for same in (same for measured in repeated for same in measured):
            first = [number for number in same if self.folders[number] == self.folders[same[0]]]
            self.replaced |= set(same) - {first[-1]}
        if len(found) == 1:
            return [curve]
        return [Curve(same, {**curve.shared, "measured": self._measurement(same[0])}, curve.common) for same in found]

    def _repeated(self, numbers: list[int]) -> list[list[int]]:
        """Group points of the same images, or of the same folder and key."""
        found: list[list[int]] = []
        for number in numbers:
            for same in found:
                if any(self._same(number, other) for other in same):
                    same.append(number)
                    break
            else:
                found.append([number])
        return found

    def _same(self, number: int, other: int) -> bool:
        a, b = self.points[number], self.points[other]
        same_key = self.folders[number] == self.folders[other] and a["key"] is not None and a["key"] == b["key"]
        return same_key or (a["images_sha256"] is not None and a["images_sha256"] == b["images_sha256"])

    def _measurement(self, number: int) -> str:
        point = self.points[number]
        return point["key"] or point["images_sha256"] or f"in line {number + 1}"


def _tuning(point: Point) -> dict[int, Leaves]:
    """Budgets of the experiment of a point with their settings; empty for earlier and damaged points."""
    tuning = point["configuration"].get(TUNING)
    if not isinstance(tuning, Mapping):
        return {}
    if not all(re.fullmatch("[0-9]{1,9}", budget) and isinstance(node, Mapping) for budget, node in tuning.items()):
        return {}
    return {int(budget): _leaves(settings_of(node)) for budget, node in tuning.items()}


def _without_weights(settings: Leaves, point: Point) -> Leaves:
    """Settings without the path of weights whose hash the point has, so that the place of the file does not matter."""
    return {leaf: value for leaf, value in settings.items() if leaf != "prior.checkpoint" or not point["weights"]}


def _split(numbers: Iterable[int], key: Callable[[int], Any]) -> list[list[int]]:
    parts: dict[Any, list[int]] = defaultdict(list)
    for number in numbers:
        parts[key(number)].append(number)
    return list(parts.values())


def _leaves(node: Mapping[str, Any], prefix: str = "", depth: int = DEPTH) -> Leaves:
    """Flatten nested settings to dotted keys."""
    found: Leaves = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and depth:
            found |= _leaves(value, f"{prefix}{key}.", depth - 1)
        else:
            found[f"{prefix}{key}"] = _as_text(value)
    return found


def _as_text(value: Any) -> str:
    """A value as text, with numbers in their shortest form, so that equal values have equal texts."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _labels(curves: Sequence[Curve], paths: Mapping[str, str]) -> list[str]:
    """Labels of curves: their names, and the settings in which curves of the same name, or of none, differ."""
    found: dict[int, str] = {}
    for group in _split(range(len(curves)), lambda number: curves[number].shared[NAME]):
        found |= dict(zip(group, _labels_of([curves[number] for number in group], paths), strict=True))
    return _unique([found[number] for number in range(len(curves))])


def _labels_of(curves: Sequence[Curve], paths: Mapping[str, str]) -> list[str]:
    """Labels of curves with the same name or without names, from the settings in which they differ."""
    named: list[Leaves] = [{} for _ in curves]
    leaves = dict.fromkeys(leaf for curve in curves for leaf in (*FIRST, *curve.shared))
    settings = [leaf for leaf in leaves if leaf in FIRST or leaf in ("n", "precision") or leaf.startswith(SETTINGS)]
    settings = [leaf for leaf in settings if leaf.rpartition(".")[2] not in FILES]
    for leaf in settings:
        # Only curves with the same part are compared: the keys of other parts differ in any case.
        for group in _split(range(len(curves)), lambda number, leaf=leaf: _context(curves[number], leaf)):  # type: ignore[misc]
            _name(leaf, group, [curve.shared for curve in curves], named)
    everything = [{**curve.common, **curve.shared} for curve in curves]
    rest = [leaf for leaf in dict.fromkeys(leaf for each in everything for leaf in each) if leaf not in settings]
    for leaf in [*FIRST, *(leaf for leaf in rest if leaf not in FIRST)]:
        for group in _split(range(len(curves)), lambda number: (curves[number].shared["method"], str(named[number]))):
            _name(leaf, group, everything, named)
    for curve, own in zip(curves, named, strict=True):
        if curve.shared[NAME]:
            continue
        if "tuned" in curve.shared:
            own["tuned"] = curve.shared["tuned"]
        elif not own:
            own |= {leaf: curve.shared[leaf] for leaf in FIRST if leaf in curve.shared and leaf != "older"}
    keys, several = _keys(named), len({curve.shared["method"] for curve in curves}) > 1
    return [_label(curve, own, keys, paths, several) for curve, own in zip(curves, named, strict=True)]


def _context(curve: Curve, leaf: str) -> tuple[str | None, ...]:
    """Names of the parts that contain a leaf, from the outermost; the name of a part is a leaf of the part around."""
    if leaf == "older":
        return (curve.shared["method"],)
    parts = leaf.removesuffix(".name").split(".")[:-1]
    return tuple(curve.shared.get(".".join([*parts[: depth + 1], "name"])) for depth in range(len(parts)))


def _name(leaf: str, group: Sequence[int], leaves: Sequence[Leaves], named: Sequence[Leaves]) -> None:
    """Add a leaf to the labels of a group of curves, if the curves differ in it."""
    if len({leaves[number].get(leaf) for number in group}) > 1:
        for number in group:
            if leaf in leaves[number]:
                named[number][leaf] = leaves[number][leaf]


def _keys(named: Sequence[Leaves]) -> dict[str, str]:
    """Key of each leaf in labels: for settings, the last part of the dotted key if this is unambiguous."""
    leaves = dict.fromkeys(leaf for each in named for leaf in each)
    short = {leaf: leaf.removesuffix(".name").rpartition(".")[2] for leaf in leaves if leaf.startswith(SETTINGS)}
    names = list(short.values())
    return {
        leaf: short[leaf] if leaf in short and names.count(short[leaf]) == 1 else leaf.removesuffix(".name")
        for leaf in leaves
    }


def _label(curve: Curve, named: Leaves, keys: Mapping[str, str], paths: Mapping[str, str], several: bool) -> str:
    """Label of a curve; ``several`` says whether curves of its name have different methods."""
    texts = [_short(named[leaf], paths) for leaf in FIRST if leaf in named]
    texts += [f"{keys[leaf]}={_short(value, paths)}" for leaf, value in named.items() if leaf not in FIRST]
    first = _cut(curve.shared["method"])
    if name := curve.shared[NAME]:
        first = f"{name}: {first}" if several else name
    return printable(first + (f" ({', '.join(texts)})" if texts else ""))


def _short(value: str, paths: Mapping[str, str]) -> str:
    """A value in labels: the file of weights, and hashes and long values shortened."""
    if value in paths:
        return f"{_cut(paths[value].rpartition('/')[2])} {value[:6]}"
    if re.fullmatch("[0-9a-f]{16,}", value):
        return value[:8]
    return _cut(value)


def _cut(value: str) -> str:
    digest = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 12]}...{digest[:6]}"


def _unique(labels: Sequence[str]) -> list[str]:
    """Number equal labels, which shortened hashes may give."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for label in labels:
        seen[label] += 1
        found.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return found
