"""Command line of ``compare``. The words are checked before the plots' library is imported."""

import shlex
from pathlib import Path

from diffaccel.errors import UsageError
from diffaccel.parts.overrides import paths_and_options
from diffaccel.storage import check_target
from diffaccel.text.terminal import PlainConsole, print_lines

OPTIONS = ("out", "reference", "judge", "label", "x")
"""Options of the command."""
HELP = """\
compare DIR DIR ... [out=runs/compare]
compare points of several runs, paired by their noise

DIR is a folder with points.jsonl in it or below it, such as runs/digits/edm or runs/digits. Points of the same budget,
seed and number of images are paired with those of the first folder, and their difference is shown with its standard
error. The page, index.html, contains all points, settings and samples, and works offline.

Keys:
  out=DIR                  folder of index.html, curve.png, strip.png, compare.csv and table.md; runs/compare by default
  label=NAME,NAME          a name for each source, in order; an empty one is made from the settings
  x=nfe|seconds|gflops|nfe_equivalent  cost on the horizontal axis; gflops for networks of different sizes
  judge=inception          judge whose metrics are shown; by default a published one
  reference=FILE           statistics of the points' reference, if the folders' config.yaml does not lead to them
"""


def compare_command(words: list[str]) -> None:
    """Print a comparison of the points of several runs, and write a page.

    Raises:
        UsageError: See :func:`diffaccel.verbs.compare.compare`.
    """
    for path in paths_and_options(words, OPTIONS, "compare")[0]:
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist: give folders of runs, such as runs/digits/edm")
    from diffaccel.verbs import compare as comparison  # takes a second

    sources, options = paths_and_options(words, OPTIONS, "compare")
    out = Path(options.get("out") or "runs/compare").expanduser()
    comparison.check_out(out)
    check_target(out / "index.html")
    names = options["label"].split(",") if options.get("label") else []
    found = comparison.compare_all(
        sources,
        options.get("reference"),
        PlainConsole(stderr=True, soft_wrap=True).print,
        options.get("judge"),
        [name.strip() for name in names],
        options.get("x") or "nfe",
        shlex.join(["diffaccel", "compare", *words]),
    )
    files = comparison.write(found.rows, out, *found[1:])
    comparison.show(found.rows)
    print_lines(f"{', '.join(reversed(files))} are in {out}")
