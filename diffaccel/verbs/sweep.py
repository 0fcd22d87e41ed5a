"""``sweep``: the runs of a W&B sweep file on this machine, without W&B's server.

Each run is a ``diffaccel bench`` in a process of its own. Runs that differ in budget and seed only share a folder, as
the points of a curve do, and are carried out one after the other.
"""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from joblib import cpu_count

from diffaccel import experiment
from diffaccel.config import FLAGS, KEYS, Config, load, parse_overrides
from diffaccel.config.sweep import Sweep, read_sweep
from diffaccel.errors import UsageError
from diffaccel.parts.overrides import ALIASES, one_experiment
from diffaccel.parts.trees import merge
from diffaccel.report import frechet_key, read_points
from diffaccel.report.points import Point, normalised
from diffaccel.run.loggers import UNRELATED
from diffaccel.run.machine import settle
from diffaccel.run.parent import VARIABLE
from diffaccel.storage import occupied
from diffaccel.text.terminal import number, print_lines, say

VERB = "bench"
LONGEST = 40
"""Maximum number of characters of the readable part of a folder's name."""


@dataclass
class Run:
    """A run of a sweep.

    Attributes:
        number: Number of the run, from 1 on.
        values: Values that vary between the runs.
        config: Configuration, with the output folder.
        words: Words of its command.
        points: Points, once they are measured.
    """

    number: int
    values: dict[str, Any]
    config: Config
    words: list[str]
    points: list[Point] = field(default_factory=list)


def sweep(
    source: str | Path,
    settings: Sequence[str] = (),
    processes: int = 1,
    count: int | None = None,
    out: str | None = None,
) -> list[Point]:
    """Measure the points of all runs of a sweep, except for those that are in OUT, and print them.

    Args:
        source: Sweep file, or name of a sweep under experiments/sweeps.
        settings: ``key=value`` words for every run, in place of the sweep's parameters of the same names.
        processes: Number of simultaneous runs.
        count: Maximum number of runs; by default the file's ``run_cap``.
        out: Output folder, which will contain a folder for each curve; runs/sweeps/NAME by default.

    Returns:
        Points, in the order of the runs; for a dry run, the commands are printed and no points are returned.

    Raises:
        UsageError: The file is not a sweep of ``bench``, a configuration is invalid, or runs failed.
    """
    if processes < 1 or (count is not None and count < 1):
        raise UsageError("processes and count are positive whole numbers")
    found = read_sweep(source)
    if found.method == "bayes":
        say(f"{found.name}: settings are drawn at random; Bayesian search requires W&B's server: use `wandb agent`")
    folder = Path(out).expanduser() if out else Path("runs", "sweeps", found.name)
    runs = plan(found, settings, folder, count)
    if any(run.config.dry_run for run in runs):
        print_lines(*(shlex.join(["diffaccel", *run.words]) for run in runs))
        return []
    table = _Table(runs)
    with occupied(folder):
        left = [run for run in runs if not _finished(run)]
        say(f"{found.name}: {len(runs)} runs, of which {len(runs) - len(left)} were measured before, in {folder}")
        table.head()
        for run in runs:
            if run.points:
                table.add(run)
        failed = _Runner(found.name, processes, table.add).carry_out(left)
    table.foot(folder)
    if failed:
        raise UsageError(f"{len(failed)} of {len(runs)} runs failed (runs {', '.join(map(str, sorted(failed)))})")
    return [point for run in runs for point in run.points]


def plan(found: Sweep, settings: Sequence[str], folder: Path, count: int | None = None) -> list[Run]:
    """Load the configurations of all runs.

    Raises:
        UsageError: The sweep is not one of ``bench``, a configuration is invalid, or a value of a run has no effect.
    """
    if found.command[0] != VERB:
        raise UsageError(f"{found.name}: only sweeps of {VERB} run here, not of {found.command[0]}: use `wandb agent`")
    keys = (word.partition("=")[0] for word in settings)
    found = found.without({ALIASES.get(key, key) for key in keys})
    drawn = found.runs(count)
    varying = [key for key in found.parameters if len({str(values[key]) for values in drawn}) > 1]
    runs: list[Run] = []
    for number_, values in enumerate(drawn, start=1):
        name, own = one_experiment(found.words(values)[1:], KEYS, FLAGS)
        shown = {key: values[key] for key in varying}
        own = [*own, *settings]
        try:
            config = load(name, own)
            _check_shown(shown, own)
        except UsageError as error:
            where = ", ".join(f"{key}={value}" for key, value in shown.items())
            raise UsageError(f"{found.name}, run {number_} ({where}): {error}") from None
        config.out = str(folder / _folder_name(config, shown, [name or "", *own]))
        words = [*([name] if name else []), *own, f"out={config.out}"]
        runs.append(Run(number_, shown, config, [VERB, *words]))
    return runs


def _check_shown(shown: Mapping[str, Any], words: Sequence[str]) -> None:
    """Check that the values under which a run is shown are in effect.

    Raises:
        UsageError: Another setting of the run replaces such a value, or a part of it.
    """
    given, written = parse_overrides(words), {word.partition("=")[0] for word in words}
    for key, value in shown.items():
        # A placeholder may leave out what is false.
        if key in written and merge(given, parse_overrides([f"{key}={value}"])) != given:
            raise UsageError(
                f"another setting of the run replaces {key}={value}, or a part of it: set {key}=, which all runs share"
            )


def _folder_name(config: Config, shown: Mapping[str, Any], words: Sequence[str]) -> str:
    """Name of the folder of a curve: its experiment and parts, and a hash of all settings but budget and seed."""
    parts = [value for key, value in shown.items() if isinstance(value, str) and key not in ("data", "method")]
    stem = re.sub("[^A-Za-z0-9_-]+", "_", "-".join([config.data_name, Path(config.experiment).stem, *parts]))
    kept = [word for word in words if re.split("[.=]", word)[0] not in (*UNRELATED, "seed")]
    return f"{stem[:LONGEST]}-{hashlib.sha256(chr(10).join(kept).encode()).hexdigest()[:8]}"


# Points


def _finished(run: Run) -> bool:
    """Whether the points of a run are in its folder; they are then kept in ``run.points``."""
    config = run.config
    if config.again or not (config.folder / "points.jsonl").is_file():
        return False
    try:
        settle(config)
        evaluator = experiment.build_evaluator(config, experiment.build_frozen(config))
        known = evaluator.known()
    except UsageError:
        return False  # the run prints the reason
    run.points = [*known] if len(known) == len(config.nfe) else []
    return bool(run.points)


def _measured(run: Run) -> list[Point]:
    """Points that a run has left in its folder: of each budget, the last one with its seed and number of images."""
    config, found = run.config, {}
    for point in map(normalised, read_points(config.folder / "points.jsonl")):
        if (point["seed"], point["n"]) == (config.seed, config.n):
            found[point["nfe_budget"]] = point
    budgets = [None if budget == float("inf") else budget for budget in config.nfe]
    return [found[budget] for budget in budgets if budget in found]


# Processes


class _Runner:
    """Processes of the runs of a sweep.

    Args:
        name: Name of the sweep, which is the default group of the runs in W&B.
        processes: Number of simultaneous runs.
        report: Function that is called with each run that has ended, and its error.
    """

    def __init__(self, name: str, processes: int, report: Callable[[Run, str], None]) -> None:
        self.processes, self.report = processes, report
        self.failed: list[int] = []
        self._lock, self._stopped = threading.Lock(), False
        self._started: set[subprocess.Popen[str]] = set()
        self._environment = {**os.environ, VARIABLE: str(os.getpid())}
        self._environment.setdefault("WANDB_RUN_GROUP", f"sweep {name}")
        if processes > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_count() // processes)))

    def carry_out(self, runs: Iterable[Run]) -> list[int]:
        """Carry out runs, and return the numbers of those that failed; an interrupt ends all."""
        groups: dict[Path, list[Run]] = {}
        for run in runs:
            groups.setdefault(run.config.folder, []).append(run)
        with ThreadPoolExecutor(self.processes) as pool:
            try:
                for future in as_completed([pool.submit(self._one_by_one, group) for group in groups.values()]):
                    future.result()
            except BaseException:
                self._stop()
                raise
        return self.failed

    def _one_by_one(self, runs: Sequence[Run]) -> None:
        for run in runs:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    [sys.executable, "-m", "diffaccel", *run.words],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    text=True, errors="replace", env=self._environment,
                    start_new_session=True,  # an interrupt of the terminal reaches this process only, which ends them
                )  # fmt: skip
                self._started.add(process)
            _, said = process.communicate()
            with self._lock:
                self._started.discard(process)
                if self._stopped:
                    return
                if process.returncode == 0:
                    run.points = _measured(run)
                else:
                    self.failed.append(run.number)
                self.report(run, "" if process.returncode == 0 else said or f"status {process.returncode}")

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._started:
                process.terminate()


# Table


class _Table:
    """Table of the runs on the terminal, which grows as they end.

    Args:
        runs: All runs.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        keys = list(dict.fromkeys(key for run in runs for key in run.values))
        self.heads = ["run", *keys, "evaluations", "distance", "se", "s/image"]
        self.keys = keys
        self.widths = [
            max(len(head), *(len(_text(run.values.get(head, ""))) for run in runs), 0 if head in keys else 8)
            for head in self.heads
        ]

    def head(self) -> None:
        """Print the heads of the columns."""
        self._print(self.heads)

    def add(self, run: Run, error: str = "") -> None:
        """Print the points of a run, or the end of its error message."""
        own = [str(run.number), *(_text(run.values.get(key, "")) for key in self.keys)]
        for point in run.points:
            name = frechet_key([point])
            distances = (point["metrics"].get(key) for key in (name, f"{name}_se"))
            self._print([*own, *map(number, (point["nfe"], *distances)), number(point["seconds_per_image"], 3)])
        if error:
            self._print([*own, "failed"])
            say(error.strip() if "Traceback" in error else error.strip().splitlines()[-1])
        elif not run.points:
            self._print([*own, "no point"])

    def foot(self, folder: Path) -> None:
        """Print the lowest distance, and where the points are."""
        pairs = [(run, point) for run in self.runs for point in run.points]
        for name in sorted({frechet_key([point]) for _, point in pairs}):
            found = [(value, run) for run, point in pairs if (value := point["metrics"].get(name)) is not None]
            if found:
                value, run = min(found, key=lambda pair: pair[0])
                settings = ", ".join(f"{key}={_text(value)}" for key, value in run.values.items())
                print_lines(f"lowest {name}: {number(value)} in run {run.number} ({settings})")
        print_lines(f"points are in the folders in {folder}, which `diffaccel compare` reads")

    def _print(self, cells: Sequence[str]) -> None:
        padded = (cell.rjust(width) for cell, width in zip(cells, self.widths, strict=False))
        print_lines("  ".join(padded))
        sys.stdout.flush()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
