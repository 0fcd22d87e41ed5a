"""Command line of ``export``. Names are checked before PyTorch is imported."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffaccel.config import FLAGS, KEYS
from diffaccel.errors import UsageError, suggest
from diffaccel.parts.overrides import one_experiment, scalar
from diffaccel.storage import check_target, write_whole
from diffaccel.text.terminal import print_lines, say
from diffaccel.verbs.names import check_names

HELP = """\
export EXPERIMENT nfe=5 [format=diffusers]
noise levels of a budget for diffusers, k-diffusion or ComfyUI

Prints JSON with prior, solver and noise levels of each budget. With another format, prints the list that the tool
takes; what the list does not express is written to stderr. Levels are noise-to-data ratios, which other tools call
sigmas.

Keys:
  nfe=5 or nfe=5,10        budgets, whose settings may differ
  format=json              or diffusers, k-diffusion, comfyui
  sigma_min=0.03 sigma_max=14.6  range of another model, to which the spacing of the levels is mapped
  checkpoint=FILE          the same, for the range and the parametrisation of another checkpoint
  out=FILE                 write to a file in place of the terminal
"""
FORMATS = ("json", "diffusers", "k-diffusion", "comfyui")
OWN = ("format", "sigma_min", "sigma_max", "checkpoint", "out")
"""Keys of the command itself; other keys are settings of the experiment."""


def export_command(words: list[str]) -> list[dict[str, Any]]:
    """Print or write the settings that the words of a command line name.

    Raises:
        UsageError: The input is invalid, or the setting can't be expressed in the format.
    """
    experiment, settings = one_experiment(words, {*KEYS, *OWN}, FLAGS)
    pairs = dict(word.split("=", 1) for word in settings)
    own: dict[str, Any] = {key: pairs[key] for key in OWN if key in pairs}
    if own.get("format", "json") not in FORMATS:
        raise UsageError(f"export has no format {own['format']!r}{suggest(own['format'], FORMATS)}")
    own |= {key: scalar(own[key]) for key in ("sigma_min", "sigma_max") if key in own}
    out = Path(own.pop("out")).expanduser() if "out" in own else None
    if out is not None:
        check_target(out)
    rest = [word for word in settings if word.partition("=")[0] not in OWN]
    experiment, rest = check_names(experiment, rest)
    from diffaccel.verbs.export import export  # imports PyTorch

    found = export(experiment, rest, **own)
    text = _text(found, own.get("format", "json"))
    for line in dict.fromkeys(note for one in found for note in one["notes"]):
        say(line)
    if out is None:
        print_lines(*text.splitlines())
    else:
        write_whole(out, f"{text}\n")
        say(f"{out} is written")
    return found


def _text(found: Sequence[dict[str, Any]], form: str) -> str:
    """Text of the settings: JSON, or the bare lists of tools that take nothing else, one line a budget."""
    if form == "comfyui":
        return "\n".join(one["sigmas"] for one in found)
    if form == "k-diffusion":
        return "\n".join(json.dumps(one["sigmas"]) for one in found)
    return json.dumps(found[0] if len(found) == 1 else found, indent=2)
