"""Checks of the names on a command line that need no PyTorch, so that a typo is reported in a fraction of a second.

Only what is certainly wrong is reported here; everything else is checked again when it is read or built.
"""

import os
import re
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points

from diffaccel.config import EXPERIMENTS, KEYS, PARTS, Config, experiment_names, find
from diffaccel.errors import UsageError, suggest
from diffaccel.parts.catalogue import CATALOGUE, names_of
from diffaccel.parts.overrides import ALIASES, sort_words
from diffaccel.verbs import Verb
from diffaccel.verbs.help import keys_of

SECTIONS = {item.name: item.type for item in fields(Config) if is_dataclass(item.type)}
NAME = re.compile(r"[a-z]\w*")


def check_own_keys(verb: Verb, words: list[str]) -> None:
    """Check the keys of a command that is not on an experiment: those in its help, and those of experiments if allowed.

    Raises:
        UsageError: A key is unknown.
    """
    own = keys_of(verb)
    allowed = own | (KEYS if verb.settings else set())
    for word in sort_words(words, {*own})[1]:
        key = word.partition("=")[0].partition(".")[0]
        if key not in allowed:
            remedy = suggest(key, allowed)
            raise UsageError(f"{verb.name} has no key {key!r}{remedy if '?' in remedy else suggest(key, own)}")


def check_names(experiment: str | None, settings: list[str]) -> tuple[str | None, list[str]]:
    """Check the names of experiment, keys and parts.

    Args:
        experiment: Experiment; None for ``method=`` and ``data=`` in the settings.
        settings: ``key=value`` words.

    Returns:
        Experiment and settings. A data set with ``method=NAME`` is an experiment: ``digits method=dlg``.

    Raises:
        UsageError: A name is unknown, or the experiment and ``method=`` contradict each other.
    """
    pairs = [(key, value) for key, _, value in (word.partition("=") for word in settings)]
    for key, value in pairs:
        _check_key(ALIASES.get(key, key))
        _check_part(key, value)
    if experiment is None:
        return experiment, settings
    method = next((value for key, value in reversed(pairs) if key == "method"), None)
    if method and (EXPERIMENTS / experiment).is_dir() and not os.path.isfile(experiment):
        experiment, settings = f"{experiment}/{method}", [word for word in settings if not word.startswith("method=")]
    elif method and not {key.partition(".")[0] for key, _ in pairs} & {"prior", "network"}:
        other = f"{experiment.rpartition('/')[0]}/{method}"
        if other == experiment:
            settings = [word for word in settings if not word.startswith("method=")]
        elif other in experiment_names():
            # With the parts of the experiment, the points would have the name of a method that made none of them.
            raise UsageError(f"{experiment} and method={method} are two experiments: give {other}, without method=")
    find(experiment)
    return experiment, settings


def _check_key(key: str) -> None:
    top, *below = key.split(".")
    if top not in KEYS:
        raise UsageError(f"no key is called {top!r}{suggest(top, KEYS)}")
    if below and top in SECTIONS and below[0] not in (known := [item.name for item in fields(SECTIONS[top])]):
        raise UsageError(f"no key is called {top}.{below[0]}{suggest(below[0], known)}")


def _check_part(key: str, value: str) -> None:
    """Check the name of a part that is given as ``solver=heun``, ``solver.name=heun`` or ``solver.grid=karras``."""
    top, *below = key.removesuffix(".name").split(".")
    if top not in PARTS or len(below) > 1 or "torch" in sys.modules:
        return  # with PyTorch, further parts may be registered, and the check takes no time
    group = below[0] if below else top
    nested = bool(below) and group in CATALOGUE and group not in PARTS
    if not NAME.fullmatch(value) or value in ("null", "none") or not (not below or nested):
        return
    if key in ("method", "data"):
        return  # halves of the name of an experiment
    if any(_has_plugins(one) for one in {top, group}) or value in (known := names_of(group)):
        return
    raise UsageError(f"no {group} is called {value!r}{suggest(value, known)}")


def _has_plugins(group: str) -> bool:
    return any(entry_points(group=name) for name in (f"diffaccel.{group}s", f"diffaccel.{group}es"))
