"""Command line: ``diffaccel VERB [EXPERIMENT] key=value ...``."""

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from diffaccel.errors import SharedError, UsageError, suggest
from diffaccel.storage import FULL, check_target
from diffaccel.text.escape import printable
from diffaccel.text.terminal import PlainConsole, print_lines
from diffaccel.verbs.run import VERBS
from diffaccel.verbs.run import run as run_verb

HELP = """\
diffaccel: compare methods for few-step sampling on your data, at your budget

  diffaccel bench EXPERIMENT nfe=5,10,20 n=5000     measure points of the quality-versus-NFE curve
  diffaccel fit EXPERIMENT [resume=auto]            train; writes weights and the curve
  diffaccel train FOLDER [methods=edm,dlg]          run the fits of a folder of experiments that are missing, in order
  diffaccel search EXPERIMENT nfe=5,10 seed=7       find the best prior and solver for each budget, in search.trials
  diffaccel tradeoff EXPERIMENT                     likelihood bound and distance of small T for each start time
  diffaccel sweep FILE [processes=2] [count=20]     run a W&B sweep file here; the same command goes on with the rest
  diffaccel compare DIR DIR ... [out=runs/compare]  compare points of several runs, paired by their noise
  diffaccel convert SRC DST                         foreign checkpoint to safetensors; --inspect SRC describes it
  diffaccel sample EXPERIMENT nfe=10 n=64           write the images that bench measures (format=png or npz)
  diffaccel reference EXPERIMENT                    write statistics of the data for bench
  diffaccel score SOURCE EXPERIMENT [name=mine]     the metrics of bench for images of any origin: a folder, zip or npz
  diffaccel list GROUP                              list the parts of a group (solver, prior ...), or all groups
  diffaccel list weights [FOLDER] [format=markdown] the weights of a folder: training, size, hash, distances
  diffaccel explain GROUP NAME                      describe a part: keys, defaults, references (explain solver heun)

EXPERIMENT is a YAML file or <data>/<method> under experiments/: digits/dlg, digits/edm, toy/dlg ...
(`diffaccel bench method=dlg data=digits nfe=10` is the same as `diffaccel bench digits/dlg nfe=10`).

SOURCE is a folder or zip of images, an npz with images or arr_0 (N, H, W, C), or statistics (mu, sigma). In score,
EXPERIMENT may be a data set (`diffaccel score images digits`), or be omitted with reference=FILE extractor=inception,
where FILE is a file of `diffaccel reference`, statistics, or images. nfe=10 places the point on the curve.

Keys may be set on the command line; frequently used keys:
  nfe=10 or nfe=5,10       maximum network evaluations per image, including burn-in; one point each
  n=5000 seed=0            images per point, and seed of their noise
  solver=ipndm             another part by name (solver, prior, process ...)
  solver.grid.ratio_min=0.01  a key of a part
  chains=100               number of chains of a chain prior
  judges=efficientnet_lite0,mobilenetv2  extractors that score the images, in one pass
  checkpoint=FILE          weights of the denoiser; init=FILE: initial weights in a fit
  batch_size= threads= devices= accelerator=
  precision=auto           bf16-mixed if the device has bf16 units, else 32-true; or a precision of Lightning
  images=1000000 limit=64  training length; use only the first images of the data
  logger=wandb|csv|tensorboard|none  W&B writes offline unless wandb_mode=online (or WANDB_MODE)
  out=DIR                  runs/<data>/<method> by default
  dry_run=true             print the plan and its cost; measure nothing
"""

console = PlainConsole(stderr=True, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0 for success, 2 for invalid input, 130 for an interrupt."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is imported. Threads that wait actively slow a run tenfold if another program uses a core.
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
        with _uncollected() if arguments is None else nullcontext():
            from diffaccel.config import FLAGS, KEYS  # imports PyTorch
            from diffaccel.parts.overrides import one_experiment

        run_verb(verb, *one_experiment(words, KEYS, FLAGS))

    return _guarded(run)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Leave the objects of imported modules out of garbage collection, which takes a second of a short run.

    This is for a process that ends with the command: objects that exist now or at its end are not collected.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.freeze)


def _guarded(run: Callable[[], None]) -> int:
    """Run a function, and turn usage errors and interrupts into a one-line message and an exit status."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # Treat a scheduler's SIGTERM like Ctrl-C. Lightning's own handler ignores SIGTERM outside of training.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except SharedError as error:
        from lightning.pytorch.utilities import rank_zero_only  # imported here, because it takes seconds

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
            "diffaccel: interrupted; finished results are kept (bench, sample, score, search and sweep resume from "
            "them, fit with resume=auto)"
        )
        return 130
    return 0


def compare(words: list[str]) -> None:
    """Print a comparison of the points of several runs, and write a page."""
    from diffaccel.parts.overrides import paths_and_options
    from diffaccel.verbs import compare as comparison

    sources, options = paths_and_options(words, comparison.OPTIONS, "compare")
    out = Path(options.get("out") or "runs/compare").expanduser()
    comparison.check_out(out)
    check_target(out / "index.html")
    rows = comparison.compare(sources, options.get("reference"), console.print, options.get("judge"))
    comparison.write(rows, out)
    comparison.show(rows)
    print_lines(f"index.html, curve.png, compare.csv and table.md are in {out}")


def score(words: list[str]) -> None:
    """Score images of any origin, or statistics of images."""
    from diffaccel.verbs.score import read_words
    from diffaccel.verbs.score import score as run

    run(read_words(words))


def convert(words: list[str]) -> None:
    """Convert a checkpoint of another codebase to safetensors, or describe it."""
    from diffaccel.verbs.convert import convert

    convert(words)


def sweep(words: list[str]) -> None:
    """Run the benches of a sweep file."""
    from diffaccel.verbs.run import quiet
    from diffaccel.verbs.sweep import sweep_command

    quiet()
    sweep_command(words)


def train(words: list[str]) -> None:
    """Run the fits of a folder of experiments that are missing."""
    from diffaccel.verbs.run import quiet
    from diffaccel.verbs.train import train_command

    quiet()
    train_command(words)


def list_parts(words: list[str]) -> None:
    """Print the groups of parts, the parts of a group, or weights."""
    if words[:1] == ["weights"]:
        from diffaccel.verbs.weights import show_weights

        show_weights(words[1:])
        return
    from diffaccel.verbs.listing import show_list

    show_list(words)


def explain(words: list[str]) -> None:
    """Print the description of a part, with its keys and references."""
    from diffaccel.verbs.listing import show_explanation

    show_explanation(words)


PATH_VERBS: dict[str, Callable[[list[str]], None]] = {
    "compare": compare,
    "convert": convert,
    "score": score,
    "sweep": sweep,
    "train": train,
    "list": list_parts,
    "explain": explain,
}
"""Commands without an experiment."""

if __name__ == "__main__":
    sys.exit(main())
