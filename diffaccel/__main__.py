"""The command line: ``diffaccel VERB [EXPERIMENT] key=value ...``."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from diffaccel.errors import SharedError, UsageError, suggest
from diffaccel.storage import FULL, check_target
from diffaccel.text.escape import printable
from diffaccel.text.terminal import PlainConsole, print_lines
from diffaccel.verbs.run import VERBS
from diffaccel.verbs.run import run as run_verb

HELP = """\
diffaccel: which way of sampling in few steps is best, on your data, at your budget?

  diffaccel bench EXPERIMENT nfe=5,10,20 n=5000     measure points of the quality-versus-NFE curve
  diffaccel fit EXPERIMENT [resume=auto]            train; leaves weights and the curve
  diffaccel search EXPERIMENT nfe=5,10 seed=7       find the best prior and solver for each budget, in search.trials
  diffaccel tradeoff EXPERIMENT                     small T: the bound and the distance for each start time
  diffaccel compare DIR DIR ... [out=runs/compare]  put points of several runs side by side, paired by their noise
  diffaccel convert SRC DST                         foreign checkpoint to safetensors; --inspect SRC says what it is
  diffaccel sample EXPERIMENT nfe=10 n=64           write the images that bench measures (format=png or npz)
  diffaccel reference EXPERIMENT                    write statistics of the data, which bench compares with
  diffaccel list GROUP                              list the parts of a group (solver, prior ...); alone, the groups
  diffaccel explain GROUP NAME                      a part's keys, defaults and sources (explain solver heun)

EXPERIMENT is a YAML file or <data>/<method> under experiments/: digits/dlg, digits/edm, toy/dlg ...
(`diffaccel bench method=dlg data=digits nfe=10` is the same as `diffaccel bench digits/dlg nfe=10`).

Keys may be set on the command line; the frequent ones:
  nfe=10 or nfe=5,10       most network evaluations per image, burn-in included; one point each
  n=5000 seed=0            images per point, and their noise
  solver=ipndm             another part by name (solver, prior, process ...)
  solver.grid.ratio_min=0.01  a key of a part
  chains=100               chains of a Langevin-Gibbs prior
  checkpoint=FILE          weights of the denoiser; init=FILE: those that a fit begins it with
  batch_size= threads= devices= accelerator=
  precision=auto           bf16-mixed where the device has bf16 units, else 32-true; or one of Lightning's
  images=1000000 limit=64  training length; use only the first images of the data
  logger=wandb|csv|tensorboard|none  W&B writes offline unless wandb_mode=online (or WANDB_MODE)
  out=DIR                  runs/<data>/<method> by default
  dry_run=true             print the plan and its cost; measure nothing
"""

console = PlainConsole(stderr=True, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is imported: threads that wait actively slow a run tenfold where something else takes a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not words or words[0] in ("help", "-h", "--help"):
        print_lines(*HELP.splitlines())
        return 0
    if words[0] in ("version", "--version"):
        from diffaccel.version import __version__

        print_lines(f"diffaccel {__version__}")
        return 0
    verb = words.pop(0)
    if verb in PATH_VERBS and not {"-h", "--help", "help"} & set(words):
        return _guarded(lambda: PATH_VERBS[verb](words))
    if verb in (*VERBS, *PATH_VERBS) and (words[:1] == ["help"] or {"-h", "--help"} & set(words)):
        print_lines(*HELP.splitlines())
        return 0

    def run() -> None:
        if verb not in VERBS:
            raise UsageError(
                f"no command is called {verb!r}{suggest(verb, [*VERBS, *PATH_VERBS])} (see `diffaccel help`)"
            )
        from diffaccel.config import FLAGS, KEYS
        from diffaccel.parts.overrides import one_experiment

        run_verb(verb, *one_experiment(words, KEYS, FLAGS))

    return _guarded(run)


def _guarded(run: Callable[[], None]) -> int:
    """Run, and turn what a user can mend, or did, into one line and an exit status."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # A scheduler's SIGTERM is a Ctrl-C: Lightning alone notes it and, but in training, goes on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except SharedError as error:
        from lightning.pytorch.utilities import rank_zero_only  # late, as all that takes seconds to import

        rank_zero_only(console.print)(printable(f"diffaccel: {error}"), style="red")
        return 2
    except UsageError as error:
        console.print(printable(f"diffaccel: {error}"), style="red")
        return 2
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        where = "the output" if error.filename is None else error.filename
        console.print(printable(f"diffaccel: {where}: {error.strerror}"), style="red")
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        console.print(
            "diffaccel: interrupted; what was finished is kept (bench, sample and search go on from it, "
            "fit with resume=auto)"
        )
        return 130
    return 0


def compare(words: list[str]) -> None:
    """Print the points of several runs side by side, and write a page of them."""
    from diffaccel.parts.overrides import paths_and_options
    from diffaccel.verbs import compare as comparison

    sources, options = paths_and_options(words, ["out", "reference"], "compare")
    out = Path(options.get("out") or "runs/compare").expanduser()
    comparison.check_out(out)
    check_target(out / "index.html")
    rows = comparison.compare(sources, options.get("reference"), console.print)
    comparison.write(rows, out)
    comparison.show(rows)
    print_lines(f"index.html, curve.png, compare.csv and table.md are in {out}")


def convert(words: list[str]) -> None:
    """Write a checkpoint of another program as safetensors, or describe it."""
    from diffaccel.verbs.convert import convert

    convert(words)


def list_parts(words: list[str]) -> None:
    """Print the groups of parts, or the parts of one."""
    from diffaccel.verbs.listing import show_list

    show_list(words)


def explain(words: list[str]) -> None:
    """Print what a part is, its keys and its references."""
    from diffaccel.verbs.listing import show_explanation

    show_explanation(words)


PATH_VERBS: dict[str, Callable[[list[str]], None]] = {
    "compare": compare,
    "convert": convert,
    "list": list_parts,
    "explain": explain,
}
"""Commands that take no experiment."""

if __name__ == "__main__":
    sys.exit(main())
