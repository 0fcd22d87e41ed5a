"""``advise``: the best measured setting within a budget, with the error of the difference to the others.

A strategy is a curve of :mod:`diffaccel.report.curves`. Of each strategy, the setting with the lowest distance within
the budget counts; seeds are averaged. Two settings of the same budget are compared by their paired difference where
both have images from the same noise, otherwise with independent errors.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from diffaccel.errors import UsageError, suggest
from diffaccel.report import frechet_key
from diffaccel.report.commands import command_of, differs
from diffaccel.report.judges import common_judges, is_published, seen_by
from diffaccel.report.points import FORMER_NOISE, distance, normalised
from diffaccel.report.rows import CLEAR, Row, key_of
from diffaccel.report.sources import Note
from diffaccel.text.terminal import number
from diffaccel.verbs.advice import Advice, Candidate, Difference, average
from diffaccel.verbs.advising import check_budget
from diffaccel.verbs.compare import compare
from diffaccel.verbs.pairs import Pairs

KEYS = {"nfe": "nfe", "seconds": "seconds_per_image", "gflops": "gflops_per_image"}
"""Budget -> key of the cost in a point."""
FEW = 0.8
"""Fraction of the highest recall or coverage within the budget below which a setting's value is mentioned."""
DEPENDENT = 0.5
"""Fraction of n below which the effective number of images is mentioned."""
REPEATED = 2.0
"""Multiple of held-out images' near-repeats from which they are mentioned."""


def advise(
    sources: Sequence[str],
    nfe: float | None = None,
    seconds: float | None = None,
    gflops: float | None = None,
    judge: str | None = None,
    n: int | None = None,
    reference: str | None = None,
    note: Note = lambda said: None,
) -> Advice:
    """Find the best measured setting within a budget.

    Args:
        sources: Folders of runs, or their points.jsonl.
        nfe: Budget in evaluations per image; exactly one budget is given.
        seconds: Budget in seconds per image.
        gflops: Budget in GFLOPs per image.
        judge: Judge whose distance is minimised; by default a published one before others, then that of most points.
        n: Number of images of the points; by default that of most settings.
        reference: File of the points' reference, for paired differences.
        note: Function called with a message about anything that is not used.

    Raises:
        UsageError: There is not exactly one budget, no points, none of them within the budget, or they were scored
            differently.
    """
    kind, budget = check_budget({"nfe": nfe, "seconds": seconds, "gflops": gflops})
    rows = _comparable(compare(sources, reference, note, judge), kind, n, note)
    candidates = _candidates(rows, kind)
    within = [one for one in candidates if one.cost <= budget * (1 + 1e-9)]
    if not within:
        least = min(candidates, key=lambda one: one.cost)
        raise UsageError(
            f"no measured point costs at most {kind}={budget:g} per image: the lowest cost is {number(least.cost)} "
            f"({least.label})"
        )
    ranked = _best_of_each(within)
    best, comparer = ranked[0], _Comparer(rows, reference, note)
    others = sorted((comparer.difference(one, best) for one in ranked[1:]), key=lambda one: one.fd)
    shown = best.point["extractor"]["name"]
    warnings = [*_judges(best, ranked, shown), *_diversity(best, ranked), *_shared_burn_in(best, kind)]
    if said := differs(best.point):
        warnings.append(f"the command does not repeat {best.label} exactly: {said}")
    more = _more(candidates, best, kind, budget, comparer)
    return Advice(kind, budget, f"{shown} ({best.key})", best, others, more, command_of(best.point), warnings)


# Points


def _comparable(rows: Sequence[Row], kind: str, n: int | None, note: Note) -> list[Row]:
    """Rows of one group that can be compared: the same reference, distance, n and noise, and with a cost.

    The present noise comes before that of version 0.1, and then the group of most settings.

    Raises:
        UsageError: No row has a distance and a cost, or the requested number of images.
    """
    known = [row for row in rows if row.point[KEYS[kind]] and distance(row.point, _key(row)) is not None]
    if not known:
        raise UsageError(f"no point has both a distance and a cost in {kind}: measure some with `diffaccel bench`")
    if len(known) < len(rows):
        note(f"{len(rows) - len(known)} points without a distance or a cost in {kind} are left out")
    chosen = [row for row in known if n in (None, row.point["n"])]
    if not chosen:
        counts = sorted({str(row.point["n"]) for row in known})
        raise UsageError(f"no point has n={n} images{suggest(str(n), counts)}")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in chosen:
        groups.setdefault(_group(row, kind), []).append(row)
    group = max(groups, key=lambda one: _preference(groups[one]))
    for other, own in groups.items():
        if other != group:
            pairs = zip(GROUPED, group, other, strict=True)
            differ = "; ".join(f"{name} {str(b):.16}, not {str(a):.16}" for name, a, b in pairs if a != b)
            note(f"{len(own)} points are not comparable and left out ({differ})")
    return groups[group]


def _preference(rows: Sequence[Row]) -> tuple[bool, int]:
    """Sort key of a group: the present noise, then the number of settings."""
    return rows[0].point["noise"] != FORMER_NOISE, len({(row.label, row.point["nfe_budget"]) for row in rows})


def _key(row: Row) -> str:
    return frechet_key([row.point])


GROUPED = ("reference", "distance", "n", "noise", "device")
"""What :func:`_group` returns."""


def _group(row: Row, kind: str) -> tuple[Any, ...]:
    """What is equal for comparable points; for seconds, the device too."""
    point = row.point
    device = point["device"] if kind == "seconds" else None
    return point["reference"]["sha256"] or point["data"], _key(row), point["n"], point["noise"], device


def _candidates(rows: Sequence[Row], kind: str) -> list[Candidate]:
    """Settings, with their seeds together."""
    found: dict[tuple[str, Any], list[Row]] = {}
    for row in rows:
        found.setdefault((row.label, row.point["nfe_budget"]), []).append(row)
    return [
        Candidate(label, own, _key(own[0]), max(row.point[KEYS[kind]] for row in own))
        for (label, _), own in found.items()
    ]


def _best_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best candidate of each strategy, best first."""
    found: dict[str, Candidate] = {}
    for one in sorted(candidates, key=lambda one: (one.fd, one.cost)):
        found.setdefault(one.label, one)
    return list(found.values())


# Differences


class _Comparer:
    """Differences between candidates.

    Args:
        rows: All rows.
        reference: File of the points' reference.
        note: Function for messages.
    """

    def __init__(self, rows: Sequence[Row], reference: str | None, note: Note) -> None:
        self.rows, self.reference, self.note = rows, reference, note

    def difference(self, other: Candidate, best: Candidate) -> Difference:
        """Distance of another candidate minus that of the best, paired if all seeds are pairs."""
        first = {key_of(row.point): row for row in best.rows}
        if {key_of(row.point) for row in other.rows} == first.keys():
            said: list[str] = []
            found = [row for row in Pairs([*other.rows], self.reference, said.append).paired(first) if row.difference]
            if len(found) == len(other.rows):
                return self._paired(other, found)
        return Difference(other, other.fd - best.fd, math.hypot(other.se, best.se), paired=False)

    @staticmethod
    def _paired(other: Candidate, found: Sequence[Row]) -> Difference:
        own = [row.difference for row in found if row.difference is not None]
        judges = {
            judge: average([(float(row.others[judge].fd), float(row.others[judge].se)) for row in found])
            for judge in found[0].others
            if all(judge in row.others for row in found)
        }
        fd, se = average([(float(one.fd), float(one.se)) for one in own])
        return Difference(other, fd, se, paired=True, judges=judges)


def _more(
    candidates: Sequence[Candidate], best: Candidate, kind: str, budget: float, comparer: _Comparer
) -> Difference | None:
    """Best candidate of the lowest cost above the budget at which one is clearly better; None without one.

    Candidates of one budget in evaluations have the same cost, although some spend less than the budget.
    """
    above = [one for one in candidates if one.cost > budget * (1 + 1e-9)]
    differences = [comparer.difference(one, best) for one in above]
    better = [one for one in differences if -one.z > CLEAR]
    if not better:
        return None

    def cost(one: Difference) -> float:
        return (kind == "nfe" and one.other.point["nfe_budget"]) or one.other.cost

    least = min(map(cost, better))
    return min((one for one in better if cost(one) == least), key=lambda one: one.fd)


# Warnings


def _judges(best: Candidate, ranked: Sequence[Candidate], shown: str | None) -> Iterator[str]:
    """Warnings about judges that prefer another strategy, and about judges that were all trained for this data."""
    points = [row.point for one in ranked for row in one.rows]
    others = [judge for judge in common_judges(points) if judge != shown]
    for judge in others:
        own = sorted(((*_by(one, judge), one) for one in ranked), key=lambda found: found[0])
        (fd, se, first), mine = own[0], _by(best, judge)
        if first is best:
            continue
        gap, error = mine[0] - fd, math.hypot(mine[1], se)
        clear = error and gap / error > CLEAR
        yield (
            f"{judge} {'prefers' if clear else 'ranks first'} {first.label}: lower by {number(gap, 3)} ± "
            f"{number(error, 2)} (independent errors{'' if clear else ', a tie'})"
        )
    if shown is not None and not any(map(is_published, (shown, *others))):
        yield (
            f"only judges that were trained here scored these points ({', '.join([shown, *others])}): score them with "
            "a published one, such as judges=inception"
        )


def _by(candidate: Candidate, judge: str) -> tuple[float, float]:
    """Mean distance by a judge, and its standard error."""
    points = [normalised(seen_by(row.point, judge)) for row in candidate.rows]
    key = frechet_key(points)
    return average([(point["metrics"][key], point["metrics"].get(f"{key}_se") or math.nan) for point in points])


def _diversity(best: Candidate, ranked: Sequence[Candidate]) -> Iterator[str]:
    """Warnings about images that cover less of the data, or repeat themselves."""
    for name in ("recall", "coverage"):
        own, values = best.metric(name), [value for one in ranked if (value := one.metric(name)) is not None]
        if own is not None and own < FEW * max(values):
            yield f"{name} of {best.label} is {number(own, 3)}, of other strategies up to {number(max(values), 3)}"
    effective, n = best.metric("effective_n"), best.point["n"]
    if effective is not None and n and effective < DEPENDENT * n:
        yield f"the images of {best.label} depend on each other: {n} are worth {effective:.0f} independent ones"
    repeats, real = best.metric("near_repeats"), best.metric("near_repeats_real")
    if repeats and repeats > REPEATED * (real or 0):
        held_out = "" if real is None else f", of held-out images {real:.1%}"
        yield f"{repeats:.1%} of the images of {best.label} nearly repeat another one{held_out}"


def _shared_burn_in(best: Candidate, kind: str) -> Iterator[str]:
    """Warning about a cost per image that depends on the number of images."""
    n, chains, burn_in = best.point["n"], best.point["chains"], best.point["nfe_burn_in"]
    if chains and burn_in and kind == "nfe":
        yield (
            f"{best.label}: {burn_in:g} of {number(best.point['nfe'])} evaluations are burn-in of {chains} chains, "
            f"shared by {n} images: fewer images cost more each"
        )
