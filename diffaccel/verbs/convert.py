"""``convert``: checkpoints of other codebases as safetensors."""

from pathlib import Path
from typing import Any

from diffaccel import pretrained
from diffaccel.errors import UsageError
from diffaccel.parts.overrides import paths_and_options, scalar
from diffaccel.run.targets import check_new
from diffaccel.text.terminal import print_lines

HELP = """\
convert SRC DST
foreign checkpoint to safetensors; --inspect SRC describes it

SRC is a score_sde .pth, an EDM .pkl, a folder of diffusers, or a file of diffaccel. Code in a file is never run. DST is
a new .safetensors file.

Keys:
  --inspect                describe SRC; write nothing
  weights=ema              averaged (ema) or last (raw) weights, of a file with both
  size=32                  size of the images in pixels, if the file does not contain it
  sigma_max=50             highest noise level of a VE network in units of its data, if the file does not contain it
  again=true               replace DST
"""


def convert(words: list[str]) -> None:
    """Convert a checkpoint of another codebase to safetensors or, with ``--inspect``, describe it."""
    paths, options = paths_and_options(words, pretrained.OPTIONS, "convert", flags=["inspect", "again"])
    inspects, again = (scalar(options.pop(flag, "no")) is True for flag in ("inspect", "again"))
    if len(paths) != (1 if inspects else 2):
        raise UsageError("convert requires a checkpoint and a new .safetensors file, or --inspect and a checkpoint")
    if not inspects:
        check_new([Path(paths[1])], again)
    typed: dict[str, Any] = {}
    for key, value in options.items():
        try:
            typed[key] = pretrained.OPTIONS[key](value)
        except ValueError:
            raise UsageError(f"{key}={value} is not a number") from None
    source = Path(paths[0])
    if inspects:
        print_lines(*pretrained.inspect(source, **typed).splitlines())
        return
    found = pretrained.convert(source, Path(paths[1]), **typed)
    print_lines(*pretrained.describe(found).splitlines())
    print_lines(f"{paths[1]}: set checkpoint= to this file in any experiment with images of shape {found.shape}")
