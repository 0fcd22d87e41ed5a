"""Command line: ``diffaccel VERB [EXPERIMENT] key=value ...``."""

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module

from diffaccel.errors import SharedError, UsageError
from diffaccel.storage import FULL
from diffaccel.text.escape import printable
from diffaccel.text.terminal import PlainConsole, print_lines
from diffaccel.verbs import Verb
from diffaccel.verbs.help import find, help_of, overview, wanted

BROKEN_PIPE = 128 + 13
"""Exit status of a program that SIGPIPE ends, as shells report it."""

console = PlainConsole(stderr=True, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status.

    Returns:
        0 for success, 2 for invalid input, 130 for an interrupt, 141 if the reader of the output ended.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is imported. Threads that wait actively slow a run tenfold if another program uses a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def run() -> None:
        if (about := wanted(words)) is not None:
            print_lines(*(help_of(about) if about else overview()).splitlines())
        elif words[0] in ("version", "--version"):
            from diffaccel.version import __version__

            print_lines(f"diffaccel {__version__}")
        else:
            with _uncollected() if arguments is None else nullcontext():
                _carry_out(find(words[0]), words[1:])
        sys.stdout.flush()

    return _guarded(run)


def _carry_out(verb: Verb, words: list[str]) -> None:
    """Run a command, after its names are checked without PyTorch."""
    from diffaccel.verbs.names import check_own_keys

    if not verb.on_experiment:
        check_own_keys(verb, words)
        getattr(import_module(verb.path), verb.function or verb.name)(words)
        return
    from diffaccel.config import FLAGS, KEYS
    from diffaccel.parts.overrides import one_experiment
    from diffaccel.verbs.run import run

    run(verb.name, *one_experiment(words, KEYS, FLAGS))


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
        return _status(run)
    except BrokenPipeError:  # also while a message is printed
        _discard_output()
        return BROKEN_PIPE


def _status(run: Callable[[], None]) -> int:
    try:
        run()
    except SharedError as error:
        from lightning.pytorch.utilities import rank_zero_only  # imported here, because it takes seconds

        rank_zero_only(console.print)(printable(f"diffaccel: {error}"), style="red")
        return 2
    except UsageError as error:
        console.print(printable(f"diffaccel: {error}"), style="red")
        return 2
    except BrokenPipeError:
        raise
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
            "diffaccel: interrupted; finished results are kept (bench, sample, score, search, sweep, "
            "train, new and curve resume from them, fit with resume=auto)"
        )
        return 130
    return 0


def _discard_output() -> None:
    """Discard what is still buffered, which Python would otherwise write, and report, at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            with suppress(OSError, ValueError):  # a stream without a descriptor
                os.dup2(null, stream.fileno())
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
