"""Pairs of points under common noise, and the differences of their distances by each judge.

Two points are a pair if their budget, number of images, seed, noise, reference, extractor and number of samples of a
condition are equal. Image i of both then comes from the same noise, so that the difference of the distances has a
smaller error than each distance.

The error follows from the distances without each block of images, which points contain. For points of older versions,
and of numbers of chains that divide the images into other blocks, it is computed from the features in the folders of
the runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffaccel.errors import UsageError
from diffaccel.jackknife import Frechet, partition
from diffaccel.report.judges import common_judges, features_of, seen_by
from diffaccel.report.points import normalised
from diffaccel.report.rows import Row, key_of, pair_of, parts_of, samples_of
from diffaccel.report.sources import Note

if TYPE_CHECKING:
    from torch import Tensor

    from diffaccel.metrics import Moments


class Pairs:
    """Pairing of rows under common noise.

    Args:
        rows: All rows, in whose folders the references are looked up.
        reference: File of the shown judge's reference; None to look it up.
        note: Function called with a message about anything that is not shown.
    """

    def __init__(self, rows: Sequence[Row], reference: str | None, note: Note) -> None:
        self.rows, self.file, self.note = rows, reference, note
        self.shown = rows[0].point["extractor"]["name"] if rows else None
        self._moments: dict[str | None, Moments | None] = {}
        self._unknown = 0  # differences of pairs by the shown judge that neither points nor features give

    def paired(self, first: Mapping[tuple[Any, ...], Row]) -> list[Row]:
        """Return the rows with their differences to the rows in ``first``, by :func:`key_of`.

        Raises:
            UsageError: The given reference is not that of the points.
        """
        if self.file is not None and self.rows:
            self._reference(self.rows[0])  # a wrong file is an error, even if the points suffice
        found = [self._paired(row, first.get(key_of(row.point))) for row in self.rows]
        if self._unknown:
            what = "1 difference is" if self._unknown == 1 else f"{self._unknown} differences are"
            self.note(
                f"{what} not shown, because the points have no distances of the same blocks "
                "of images and not all features: bench them again with numbers of chains that are equal or multiples "
                "of ten, or with keep_features=true"
            )
        return found

    def _paired(self, row: Row, first: Row | None) -> Row:
        if first is None or first is row:
            return row
        difference = self._difference(row, first)
        if difference is None:
            return row
        others = {}
        for judge in common_judges([row.point, first.point]):
            if judge != self.shown:
                seen = [replace(one, point=normalised(seen_by(one.point, judge))) for one in (row, first)]
                if (found := self._difference(*seen)) is not None:
                    others[judge] = found
        return replace(row, difference=difference, others=others)

    def _difference(self, row: Row, first: Row) -> Frechet | None:
        """Difference by the extractor at the top of both points; None if it can't be computed."""
        if (pair := pair_of(row.point)) is None or pair != pair_of(first.point):
            return None
        if partition(row.point["chains"]) == partition(first.point["chains"]):
            own, others = parts_of(row.point), parts_of(first.point)
            if own is not None and others is not None and own.alike(others):
                return own.less(others).extrapolated()
        return self._by_features(row, first)

    def _by_features(self, row: Row, first: Row) -> Frechet | None:
        """Difference from the features in the folders of both points; None, with a message, if it can't be computed."""
        known = all(one.point["key"] and one.point["key"].isalnum() for one in (row, first))
        files = [one.folder / "features" / features_of(one.point) for one in (row, first)] if known else []
        if not known or not all(file.is_file() for file in files):
            self._unknown += row.point["extractor"]["name"] == self.shown
            return None
        moments = self._reference(row)
        if moments is None:
            return None
        import torch  # imported here, because points usually suffice

        from diffaccel.evaluation.scores import blocks_of
        from diffaccel.metrics import paired_difference

        try:
            own, others = map(_features, files)
        except UsageError as error:
            self.note(f"{error}; until then its differences are not shown")
            return None
        if own.shape != others.shape or len(own) < row.point["n"]:  # only the features of the first images are kept
            self._unknown += row.point["extractor"]["name"] == self.shown
            return None
        # Images of the same chain, in either row, must be in the same block; gcd(c, 0) is c.
        chains = math.gcd(row.point["chains"] or 0, first.point["chains"] or 0)
        block = blocks_of(torch.arange(len(own)), chains or None, samples_of(row.point))
        return paired_difference(own, others, block, moments)

    def _reference(self, row: Row) -> "Moments | None":
        """Moments of the reference; None, with a single message for the shown judge, if there is no reference."""
        sha256, judge = row.point["reference"]["sha256"], str(row.point["extractor"]["name"])
        if sha256 not in self._moments:
            self._moments[sha256] = self._sought(row, sha256, judge)
        return self._moments[sha256]

    def _sought(self, row: Row, sha256: str | None, judge: str) -> "Moments | None":
        if self.file is not None and judge == self.shown:
            return _moments(Path(self.file).expanduser(), sha256)
        found = None
        for folder in dict.fromkeys(one.folder for one in (row, *self.rows)):
            try:
                return _named_reference(folder, sha256)
            except UsageError as error:
                found = found or error
        what = "differences" if judge == self.shown else f"differences by {judge}"
        where = "set reference= to the reference of the points" if judge == self.shown else "bench them again"
        self.note(f"{what} are not shown: {found}; {where}")
        return None


def _features(path: Path) -> "Tensor":
    import torch

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise UsageError(f"{path} is damaged ({error!r:.80}): remove it, or bench with again=true") from None


def _named_reference(folder: Path, sha256: str | None) -> "Moments":
    """Return the moments of a reference in a run's configuration, which may have one for each of several judges.

    Raises:
        UsageError: There is no configuration, or it has no such reference, for example after a fit without evaluation.
    """
    from diffaccel.config import read

    config = folder / "config.yaml"
    if not config.is_file():
        raise UsageError(f"{config} does not exist")
    named = read(config).get("reference")
    files = list(named.values()) if isinstance(named, Mapping) else [named]
    found = None
    for file in files:
        try:
            if isinstance(file, str):
                return _moments(Path(file), sha256)
        except UsageError as error:
            found = found or error
    raise found or UsageError(f"{config} has no reference")


def _moments(path: Path, sha256: str | None) -> "Moments":
    """Read the moments of a reference and check its hash.

    Raises:
        UsageError: The file is missing or damaged, or its hash differs.
    """
    from diffaccel.metrics.reference import read_reference

    reference = read_reference(path)
    if reference.sha256 != sha256:
        raise UsageError(f"{path} is not the reference of the points")
    return reference.moments
