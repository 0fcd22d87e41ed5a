"""Time of a short bench apart from sampling: start and imports, building, scoring, metrics, drawing, logging.

    python -m benchmarks.startup [REPEATS] [key=value ...]      (further settings of the bench, such as logger=none)

A bench of 200 images at five evaluations runs in a process of its own, from whose start to whose end everything counts.
The limit applies to the wall time of two idle cores. Where other programs run, compare processor times, which include
those of W&B's process.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START, REST, SAMPLING = "start and imports", "rest", "sampling"
PARTS = (START, "building", SAMPLING, "scoring", "metrics", "drawing", "logging", REST)
COMMAND = ("bench", "cifar10_small/edm", "nfe=5", "n=200")
LIMIT = 9.0


class Clock:
    """Wall and processor time by part; each moment counts for the innermost part only.

    Args:
        started: Time at which the process was started, in seconds since the epoch.
    """

    def __init__(self, started: float) -> None:
        self.parts = {name: [0.0, 0.0] for name in PARTS}
        self.part, self._last = START, (started, 0.0)

    def turn(self, part: str) -> str:
        """Begin a part, and return the part before it."""
        now = (time.time(), time.process_time())
        for i in range(2):
            self.parts[self.part][i] += now[i] - self._last[i]
        before, self.part, self._last = self.part, part, now
        return before

    @contextmanager
    def within(self, part: str, after: str | None = None) -> Iterator[None]:
        """Count a ``with`` block for a part, and what follows for ``after``, by default the part before."""
        before = self.turn(part)
        try:
            yield
        finally:
            self.turn(after or before)

    def watch(self, owner: Any, name: str, part: str, after: str | None = None) -> None:
        """Count all calls of a function of ``owner``, a module or class, for a part."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            with self.within(part, after):
                return function(*arguments, **options)

        setattr(owner, name, watched)

    def watch_each(self, owner: Any, name: str, part: str) -> None:
        """Count the production of each item of a generator for a part, but not the use of the item."""
        function: Callable[..., Iterator[Any]] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
            items, end = function(*arguments, **options), object()
            while True:
                with self.within(part):
                    item = next(items, end)
                if item is end:
                    return
                yield item

        setattr(owner, name, watched)


def measured(started: float, file: Path, words: list[str]) -> int:
    """Run a command in this process, and write the times of its parts to a file."""
    clock = Clock(started)
    from diffaccel.__main__ import main
    from diffaccel.evaluation import evaluator, judges, production
    from diffaccel.run import loggers
    from diffaccel.sampling import Sampler
    from diffaccel.verbs import bench

    clock.watch(bench, "planned", "building", after=REST)
    clock.watch(bench.experiment, "build_evaluator", "building")
    clock.watch_each(Sampler, "batches", SAMPLING)
    clock.watch(production, "_features", "scoring")
    clock.watch(judges, "measure", "metrics")
    for name in ("draw_samples", "draw_curve"):
        clock.watch(evaluator, name, "drawing")
    clock.watch(evaluator, "log_curve", "logging")
    for name in ("build_loggers", "close_wandb"):
        clock.watch(loggers, name, "logging")
    sys.argv = ["diffaccel", *words]
    status = main()  # as the command
    clock.turn(REST)
    file.write_text(json.dumps(clock.parts))
    return status


def run(words: list[str]) -> dict[str, list[float]]:
    """Run the command in a new process, and return wall and processor time by part."""
    with tempfile.TemporaryDirectory() as folder:
        file, before, started = Path(folder, "parts.json"), _processor_time(), time.time()
        arguments = [str(started), str(file), *COMMAND, f"out={folder}/out", *words]
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # as the command sets it
        subprocess.run([sys.executable, "-m", __spec__.name, "measure", *arguments], env=environment, check=True)
        wall, processor = time.time() - started, _processor_time() - before
        parts: dict[str, list[float]] = json.loads(file.read_text())
    for i, total in enumerate((wall, processor)):  # the end of the process, and the processor time of its children
        parts[REST][i] += total - sum(times[i] for times in parts.values())
    return parts


def _processor_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(*words: str) -> None:
    """Measure, and print medians over the repeats."""
    from rich.console import Console
    from rich.table import Table

    repeats = next((int(word) for word in words if word.isdigit()), 3)
    runs = [run([word for word in words if "=" in word]) for _ in range(repeats)]
    table = Table("", title=f"{' '.join(COMMAND)}, seconds", title_justify="left", box=None, header_style="bold")
    for column in ("wall", "processor", "at most"):
        table.add_column(column, justify="right")

    def row(name: str, values: Callable[[dict[str, list[float]], int], float], limit: float | None = None) -> None:
        wall, processor = (statistics.median(values(parts, i) for parts in runs) for i in range(2))
        most = "" if limit is None else f"[{'green' if wall <= limit else 'red'}]{limit:.2f}[/]"
        table.add_row(name, f"{wall:.2f}", f"{processor:.2f}", most)

    for name in PARTS:
        row(name, lambda parts, i, name=name: parts[name][i])  # type: ignore[misc]
    apart = [name for name in PARTS if name != SAMPLING]
    row("total without sampling", lambda parts, i: sum(parts[name][i] for name in apart), LIMIT)
    Console(width=100).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        sys.exit(measured(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    main(*sys.argv[1:])
