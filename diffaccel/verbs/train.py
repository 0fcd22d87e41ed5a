"""``train``: the missing fits of a folder of experiments, one after the other, each in a process of its own."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from diffaccel.config import FLAGS
from diffaccel.errors import UsageError
from diffaccel.experiment.order import AUTOENCODER, EXTRACTOR, Fit, of_steps, plan
from diffaccel.parts.overrides import sort_words, split_names
from diffaccel.run.parent import VARIABLE
from diffaccel.storage import check_target, occupied, write_whole
from diffaccel.text.terminal import print_lines, say

HELP = """\
train FOLDER [methods=edm,dlg]
run the missing fits of a folder of experiments, in order

Each fit runs after those whose weights it needs, in a process of its own, and resumes from its training state: the same
command continues after an interrupt. Further keys are settings of every fit.

Keys:
  methods=edm,dlg          experiments to train, with those that they need; by default all of the folder
  images=1000000           training images of each fit
  out=DIR                  output folders of the fits; runs/<data> by default
  place=true               copy weights to the files that the experiments name, where these don't exist
  dry_run=true             print the fits without running them
"""
OPTIONS = ("methods", "out", "place", "dry_run")
"""Keys of the command itself; other keys are settings of every fit."""
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")


def train(
    data: str,
    settings: Sequence[str] = (),
    methods: Sequence[str] | None = None,
    out: str | None = None,
    place: bool = False,
    dry_run: bool = False,
    run: Callable[[Sequence[str]], int] | None = None,
) -> list[Fit]:
    """Run the fits that a folder of experiments requires and that are not done, each after those that it needs.

    Every fit resumes from its training state, so that after an interrupt the same command goes on.

    Args:
        data: Folder of experiments: name under experiments/, or path.
        settings: ``key=value`` words for every fit.
        methods: Experiments to train, with those that they need; None for all of the folder.
        out: Folder of the output folders of the fits; runs/<data> by default.
        place: Whether to copy weights to the files that the experiments name, where these don't exist.
        dry_run: Whether to print the fits without running them.
        run: Function that runs ``diffaccel`` with words and returns its exit status; by default in a new process.

    Returns:
        All fits, as they were before.

    Raises:
        UsageError: A fit failed; or see :func:`~diffaccel.experiment.order.plan`.
    """
    fits = plan(data, None if out is None else Path(out).expanduser(), methods, settings)
    missing = [fit for fit in fits if not fit.done]
    for fit in fits:
        state = "done" if fit.done else "resumes" if fit.begun else "new"
        print_lines(f"{fit.experiment}: {state}{_after(fit)}")
    asked = [word for word in settings if word.startswith(("images=", "training.images="))]
    for file, seen in (one for fit in fits for one in fit.fewer if asked):
        say(f"{file}: fitted on {seen:,} images, fewer than {asked[-1]}, and kept: move it away to train further")
    if not fits:
        say(f"{data}: its experiments name no weights that a fit makes")
    commands = [["fit", fit.experiment, *_settings(fit, settings), *fit.words()] for fit in missing]
    if dry_run:
        print_lines(*(shlex.join(["diffaccel", *words]) for words in commands))
        return fits
    if place:
        for one in (made for fit in fits for made in fit.makes if not made.named.exists()):
            check_target(one.named)
    for number, (fit, words) in enumerate(zip(missing, commands, strict=True), start=1):
        say(f"fit {number} of {len(missing)}: {shlex.join(['diffaccel', *words])}")
        if status := (run or _in_process)(words):
            if status < 0 or status == 130:
                raise KeyboardInterrupt
            raise UsageError(
                f"the fit of {fit.experiment} failed (status {status}): see its message above; the same command goes on"
            )
    _finish(fits, place)
    return fits


def _settings(fit: Fit, settings: Sequence[str]) -> list[str]:
    """Words of all fits that a fit has a use for."""
    made = {one.key for one in fit.makes}
    if EXTRACTOR in made:  # in epochs, on one device
        return [word for word in settings if not of_steps(word) and _key(word) not in ("devices", "num_nodes")]
    if AUTOENCODER in made:
        return [word for word in settings if _key(word) not in ("training.evaluate_every", "training.keep_best")]
    return list(settings)


def _key(word: str) -> str:
    return word.partition("=")[0]


def _after(fit: Fit) -> str:
    makers = sorted({one.left.parent.name for one in fit.needs})
    return f" (after {', '.join(makers)})" if makers else ""


def _in_process(words: Sequence[str]) -> int:
    """Run a command in a new process, whose end frees the device's memory, and which ends with this one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "diffaccel", *words],
        env={**os.environ, VARIABLE: str(os.getpid())},
        start_new_session=True,  # an interrupt of the terminal reaches this process only, which ends the other one once
    )
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()  # until it has written its state
        raise


def _finish(fits: Sequence[Fit], place: bool) -> None:
    """Place the weights, or say how to use them."""
    elsewhere = [made for fit in fits for made in fit.makes if made.elsewhere]
    if place:
        for made in elsewhere:
            with occupied(made.named.parent):
                write_whole(made.named, made.left.read_bytes())
            say(f"{made.left} was copied to {made.named}")
    elif elsewhere:
        say("weights that are not where the experiments name them (place=true copies them there):")
        print_lines(*(f"{made.left} for {made.named}" for made in elsewhere))


# Command line


def _switch(key: str, value: str) -> bool:
    if value.lower() not in (*TRUE, *FALSE):
        raise UsageError(f"{key}={value}: give true or false")
    return value.lower() in TRUE


def train_command(words: list[str]) -> list[Fit]:
    """Run ``train`` from the words of a command line: a folder, options, and settings of all fits.

    Raises:
        UsageError: There is not exactly one folder, or an option is neither true nor false.
    """
    folders, settings = sort_words(words, FLAGS)
    if len(folders) != 1:
        raise UsageError("train requires a folder of experiments: diffaccel train cifar10_mid")
    pairs = [word.split("=", 1) for word in settings]
    options: dict[str, str] = {key: value for key, value in pairs if key in OPTIONS}
    place, dry_run = (_switch(key, options.get(key, "false")) for key in ("place", "dry_run"))
    methods = split_names(options.get("methods", ""))
    others = [f"{key}={value}" for key, value in pairs if key not in OPTIONS]
    return train(folders[0], others, methods or None, options.get("out"), place, dry_run)
