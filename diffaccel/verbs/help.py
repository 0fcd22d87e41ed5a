"""Help texts: the overview of all commands, and the help of one.

The module of a command has a literal ``HELP``. The first line contains the usage without the word ``diffaccel``, the
second one a summary. The rest is shown by ``diffaccel help VERB`` only, and may contain a section ``Keys:`` with a line
``  key=value   description`` per key. The texts are read without importing the modules, which takes seconds.
"""

import ast
import re
from collections.abc import Collection
from importlib.util import find_spec
from typing import NamedTuple

from diffaccel.errors import UsageError, suggest
from diffaccel.verbs import VERBS, Verb

WORDS = ("help", "-h", "--help")
KEY = re.compile(r"(?:^|(?<=[ \[]))(?:--)?([a-z]\w*)(?:\.[\w.]+)?=|--(\w+)")
"""A key in the left column of a help text."""

INTRODUCTION = "diffaccel: compare methods for few-step sampling on your data, at your budget"

EXPERIMENT = """\
EXPERIMENT is a YAML file or <data>/<method> under experiments/: digits/dlg, digits/edm, toy/dlg ...
(`diffaccel bench method=dlg data=digits nfe=10` is the same as `diffaccel bench digits/dlg nfe=10`).
`diffaccel list experiments` lists them."""

COMMON = """\
Keys of every command on an experiment:
  checkpoint=FILE          weights of the denoiser
  solver=ipndm             another part by name (solver, prior, process ...)
  solver.grid.ratio_min=0.01  a key of a part; `diffaccel explain solver ipndm` lists the keys of a part
  batch_size=100           images per sampling batch
  threads=2                CPU threads per process; by default all usable cores
  devices=2 accelerator=gpu  number of processes, and their devices
  precision=auto           bf16-mixed if the device has bf16 units, else 32-true; or a precision of Lightning
  limit=64                 use only so many images of the data, chosen at random
  out=DIR                  output folder; runs/<data>/<method> by default
  again=true               make results in OUT again
`diffaccel list keys` lists all keys with their defaults."""

FREQUENT = """\
Keys may be set on the command line; frequently used keys:
  nfe=10 or nfe=5,10       maximum network evaluations per image, including burn-in; one point each
  n=5000 seed=0            images per point, and seed of their noise
  solver=ipndm             another part by name (solver, prior, process ...)
  checkpoint=FILE          weights of the denoiser; init=FILE: initial weights in a fit
  out=DIR                  runs/<data>/<method> by default
  dry_run=true             print the plan and its cost; measure nothing

`diffaccel help bench` describes a command with its keys; so does `diffaccel bench --help`.
`diffaccel list` lists what there is: experiments, keys, and parts."""


class Text(NamedTuple):
    """Help of a command.

    Attributes:
        usage: Words after ``diffaccel``.
        summary: What the command does, in one line.
        body: Further lines.
    """

    usage: str
    summary: str
    body: str


def text_of(verb: Verb) -> Text:
    """Read the help text of a command from the source of its module.

    Raises:
        ValueError: The module has no literal ``HELP``.
    """
    spec = find_spec(verb.path)
    source = getattr(spec and spec.loader, "get_source", lambda name: None)(verb.path)
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == verb.help for target in node.targets):
            usage, summary, *rest = str(ast.literal_eval(node.value)).strip().split("\n", 2)
            return Text(usage, summary, "".join(rest).strip("\n"))
    raise ValueError(f"{verb.path} has no literal {verb.help}")


def overview() -> str:
    """Return the help of ``diffaccel`` itself: usage and summary of each command, and the most frequent keys."""
    texts = [text_of(verb) for verb in VERBS.values()]
    width = max(len(text.usage) for text in texts)
    lines = [f"  diffaccel {text.usage:<{width}}  {text.summary}" for text in texts]
    return "\n".join([INTRODUCTION, "", *lines, "", EXPERIMENT, "", FREQUENT])


def help_of(name: str) -> str:
    """Return the help of a command.

    Raises:
        UsageError: There is no such command.
    """
    verb, text = find(name), text_of(VERBS[name])
    parts = [f"diffaccel {text.usage}", text.summary, *([text.body] if text.body else [])]
    return "\n\n".join([*parts, *([EXPERIMENT, COMMON] if verb.on_experiment else [])])


def find(name: str) -> Verb:
    """Return a command.

    Raises:
        UsageError: There is no such command.
    """
    if name not in VERBS:
        raise UsageError(f"no command is called {name!r}{suggest(name, VERBS)} (see `diffaccel help`)")
    return VERBS[name]


def keys_of(verb: Verb) -> set[str]:
    """Return the top-level keys in the section ``Keys:`` of a command's help."""
    _, _, section = f"\n{text_of(verb).body}".partition("\nKeys:\n")
    left = (line[2:].partition("  ")[0] for line in section.split("\n\n")[0].splitlines() if line.startswith("  "))
    return {first or second for column in left for first, second in KEY.findall(column)}


def wanted(words: Collection[str]) -> str | None:
    """Return the help that a command line requests: ``""`` for the overview, a command's name, or None."""
    first, *rest = [*words, ""]
    if not words or first in WORDS:
        return rest[0] if rest and rest[0] not in WORDS else ""
    if first in VERBS and (rest[0] in WORDS or {"-h", "--help"} & set(rest)):
        return first
    return None
