"""Parsing of settings on the command line into a tree of values.

A value is a number, true or false, null, a ``[list]`` or ``{mapping}`` in YAML, or text. The value of a key of a path
or name is always text. ``${oc.env:NAME}`` is the value of an environment variable; the run uses the value, and output
files contain the reference. Files can't contain such references, because a file from another person must not read the
environment.
"""

import dataclasses
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Container, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # OmegaConf's parser

from diffaccel.errors import UsageError, suggest
from diffaccel.parts.trees import leaves, merge, renames

KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
INTEGER = re.compile(r"[-+]?\d+(_\d+)*")
NUMBER = re.compile(r"[-+]?((\d+(_\d+)*\.?\d*|\.\d+)(e[-+]?\d+)?|\.?inf|\.?nan)", re.IGNORECASE)
VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,\s*([^{}]*?)\s*)?\}")
WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
    "null": None,
    "~": None,
    "": None,
}

ALIASES = {
    "caption": "condition.caption",
    "chains": "prior.chains",
    "guidance": "solver.guidance",
    "guidance_interval": "solver.guidance_interval",
    "images": "training.images",
}
"""Short keys of the command line."""

OPEN: dict[str, Callable[[str], Any]] = {"search.space": str, "tradeoff.densities": float}
"""Mappings with arbitrary keys, which may contain dots -> type of the keys."""


class FromEnvironment(str):
    """Text in which environment variables have been replaced by their values.

    Attributes:
        given: Original text with references, which :func:`as_given` returns.
    """

    given: str


def as_given(tree: Any) -> Any:
    """Copy a tree of settings, with references to the environment instead of values."""
    return _replaced(tree, lambda text: text.given)


def as_plain(tree: Any) -> Any:
    """Copy a tree of settings, with values of references as plain text, which OmegaConf requires."""
    return _replaced(tree, str)


def _replaced(tree: Any, change: Callable[[FromEnvironment], str]) -> Any:
    if isinstance(tree, FromEnvironment):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: _replaced(value, change) for key, value in tree.items()}
    return [_replaced(value, change) for value in tree] if isinstance(tree, list | tuple) else tree


def refuse_references(tree: Mapping[str, Any], where: object, given: Mapping[str, Any] | None = None) -> None:
    """Check that a file has no ``${...}``, except under keys that the command line sets.

    Raises:
        UsageError: The file contains a reference.
    """
    for keys, value in leaves(tree):
        if isinstance(value, str) and "${" in value and not _sets(given or {}, tree, keys):
            key = ".".join(map(str, keys))
            raise UsageError(
                f"{where}: {key}={value!r}: a file can't contain references: write the value, or set {key}= on the "
                "command line"
            )


def keep_references(config: Any, tree: Mapping[str, Any]) -> None:
    """Restore texts with references, which OmegaConf converts to plain text.

    Raises:
        UsageError: A key that is not text has a reference.
    """
    for keys, value in leaves(tree):
        if not isinstance(value, FromEnvironment):
            continue
        *above, last = keys
        place: Any = config
        for key in above:
            place = getattr(place, key) if dataclasses.is_dataclass(place) else place[key]
        old = getattr(place, last) if dataclasses.is_dataclass(place) else place[last]
        if not isinstance(old, str):
            name = ".".join(map(str, keys))
            raise UsageError(f"{name}={value.given}: only paths and names may be ${{oc.env:...}}: use {name}=$VARIABLE")
        if dataclasses.is_dataclass(place):
            setattr(place, last, value)
        else:
            place[last] = value


def _sets(given: Any, tree: Any, keys: tuple[Any, ...]) -> bool:
    """Whether a setting replaces the value at ``keys`` of a file's tree, or a branch or part that contains it."""
    for key in keys:
        if not isinstance(given, Mapping) or renames(tree, given):
            return True
        if key not in given:
            return False
        given, tree = given[key], tree[key]
    return True


def sort_words(
    words: Collection[str], flags: Container[str] = (), is_file: Callable[[str], bool] = os.path.exists
) -> tuple[list[str], list[str]]:
    """Separate settings from other words.

    Args:
        words: Words of the command line; ``--key=value``, ``--key value`` and, for flags, ``--key`` are also settings.
        flags: Keys that do not require a value after ``--``.
        is_file: Function that tests whether a word that looks like a setting is a path.

    Returns:
        Other words, and settings as ``key=value``.

    Raises:
        UsageError: There are spaces around a ``=``.
    """
    others: list[str] = []
    settings: list[str] = []
    rest = deque(words)
    while rest:
        word = rest.popleft()
        if word.startswith("="):
            raise UsageError(f"{word!r}: write key=value without spaces")
        key, equals, value = word.partition("=")
        key = key.lstrip("-").replace("-", "_") if word.startswith("-") else key
        if not KEY.fullmatch(key) or not (equals or word.startswith("-")) or (equals and is_file(word)):
            others.append(word)
        elif equals:
            settings.append(f"{key}={value}")
        else:
            settings.append(f"{key}={_next_value(key in flags, rest)}")
    return others, settings


def _next_value(flag: bool, rest: "deque[str]") -> str:
    """Remove and return the value of ``--key`` from the following words; ``true`` without a value."""
    follows = rest[0] if rest else ""
    is_setting = follows.startswith("--") or KEY.fullmatch(follows.partition("=")[0]) and "=" in follows
    if not rest or is_setting or (flag and not isinstance(WORDS.get(follows.lower()), bool)):
        return "true"
    return rest.popleft()


def split_names(text: str) -> list[str]:
    """Split the value of a key of several names: ``a,b``, ``a b``, ``[a, b]`` or ``['a', 'b']``."""
    return [_unquoted(word) for word in text.strip("[] ").replace(",", " ").split()]


def one_experiment(
    words: Collection[str], keys: Collection[str], flags: Container[str]
) -> tuple[str | None, list[str]]:
    """Separate the experiment of a command from its settings.

    Args:
        words: Words of the command line.
        keys: Keys of the schema.
        flags: Keys that do not require a value after ``--``.

    Returns:
        Experiment, None if none is given, and settings.

    Raises:
        UsageError: A word is a key without a value, or there are several experiments.
    """
    others, settings = sort_words(words, flags, lambda word: word.endswith((".yaml", ".yml")) and os.path.isfile(word))
    for word in others:
        if word in keys:
            value = "true" if word in flags else "VALUE"
            raise UsageError(f"{word!r} is a key: write {word}={value}, without spaces")
    if len(others) > 1:
        named = " and ".join(map(repr, others))
        raise UsageError(f"give one experiment, not {named}; settings are key=value, without spaces")
    return (others[0] if others else None), settings


def paths_and_options(
    words: Collection[str], known: Collection[str], verb: str, flags: Collection[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Separate the paths of a command on files from its options, which are text.

    Raises:
        UsageError: An option is unknown.
    """
    paths, settings = sort_words(words, flags)
    options = dict(word.split("=", 1) for word in settings)
    if unknown := sorted(options.keys() - {*known, *flags}):
        raise UsageError(f"{verb} has no key {unknown[0]!r}{suggest(unknown[0], known)}")
    return [os.path.expanduser(path) for path in paths], options


def parse(
    words: Collection[str], holds_path: Callable[[str], bool], holds_text: Callable[[str, str], bool]
) -> dict[str, Any]:
    """Read ``key=value`` words.

    Args:
        words: Settings, as for :func:`sort_words`.
        holds_path: Function that tests whether the value of a key is a path, in which only a leading ``~`` is expanded.
        holds_text: Function that tests whether the value of a key, its second argument, is text.

    Returns:
        Tree of all settings; later words override earlier ones.

    Raises:
        UsageError: A word has no ``=``, a value is not YAML, or an environment variable is not set.
    """
    others, settings = sort_words(words, is_file=lambda word: False)
    if others:
        raise UsageError(f"{others[0]!r} is not a setting: write key=value")
    tree: dict[str, Any] = {}
    for word in settings:
        key, _, text = word.partition("=")
        key = ALIASES.get(key, key)
        if key == "experiment":
            raise UsageError(f"{word!r}: give the experiment without a key, as in `diffaccel bench digits/dlg`")
        value: Any
        if holds_path(key):
            value = None if text in ("", "null", "none", "None") else os.path.expanduser(text)
        elif holds_text(key, text):
            value = _unquoted(text) or None
        else:
            value = _value(word, text)
        branch = _resolved(word, value)
        for name in reversed(_names(key)):
            branch = {name: branch}
        tree = merge(tree, branch)
    return tree


def _names(key: str) -> list[Any]:
    for prefix, kind in OPEN.items():
        if key.startswith(f"{prefix}."):
            last = key[len(prefix) + 1 :]
            try:
                return [*prefix.split("."), kind(last)]
            except ValueError:
                raise UsageError(f"{key}: {last!r} is not a number") from None
    names = key.split(".")
    return [int(name) if i == 1 and names[0] == "by_nfe" and name.isdecimal() else name for i, name in enumerate(names)]


def _value(word: str, text: str) -> Any:
    if text == "None":  # as W&B's agent writes null
        return None
    if text[:1] not in tuple("[{\"'"):
        return scalar(text)
    try:
        parsed = OmegaConf.create(f"value: {text}")
    except (YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"{word!r}: {str(error).splitlines()[0]}") from None
    assert isinstance(parsed, DictConfig)
    plain = OmegaConf.to_container(parsed)
    assert isinstance(plain, dict)
    return plain["value"]


def scalar(text: str) -> Any:
    """Convert text to a number, true, false or null; anything else remains text."""
    text = text.strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if INTEGER.fullmatch(text) and len(text) < 400:  # Python does not convert longer ones
        return int(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if NUMBER.fullmatch(text) else text


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _resolved(word: str, value: Any) -> Any:
    """Replace references to the environment by :class:`FromEnvironment`, including those in mappings and lists."""
    if isinstance(value, dict):
        return {key: _resolved(word, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(word, item) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def look_up(found: re.Match[str]) -> str:
        name, default = found.groups()
        text = os.environ.get(name, default)
        if text is None:
            raise UsageError(f"{word!r}: the environment variable {name} is not set")
        if "${" in text:
            raise UsageError(
                f"{word!r}: the environment variable {name} contains a reference itself: set it to a plain value"
            )
        return text

    if "${" in VARIABLE.sub("", value):
        raise UsageError(f"{word!r}: only ${{oc.env:NAME}} and ${{oc.env:NAME,DEFAULT}} are resolved")
    resolved = FromEnvironment(VARIABLE.sub(look_up, value))
    resolved.given = value
    return resolved
