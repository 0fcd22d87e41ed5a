"""Command line of ``compare``. The words are checked before PyTorch is imported."""

from pathlib import Path

from diffaccel.errors import UsageError
from diffaccel.parts.overrides import paths_and_options
from diffaccel.storage import check_target
from diffaccel.text.terminal import PlainConsole, print_lines

HELP = """\
compare DIR DIR ... [out=runs/compare]
compare points of several runs, paired by their noise

DIR is the folder of a run, or its points.jsonl. Points of the same budget, seed and number of images are paired with
those of the first folder, and their difference is shown with its standard error.

Keys:
  out=DIR                  folder of index.html, curve.png, compare.csv and table.md; runs/compare by default
  judge=inception          judge whose metrics are shown; by default the first of the first point
  reference=FILE           statistics of the points' reference, if the folders' config.yaml does not lead to them
"""


def compare_command(words: list[str]) -> None:
    """Print a comparison of the points of several runs, and write a page.

    Raises:
        UsageError: See :func:`diffaccel.verbs.compare.compare`.
    """
    for path in paths_and_options(words, ("out", "reference", "judge"), "compare")[0]:
        if not Path(path).exists():
            raise UsageError(f"{path} does not exist: give folders of runs, such as runs/digits/edm")
    from diffaccel.verbs import compare as comparison  # imports PyTorch

    sources, options = paths_and_options(words, comparison.OPTIONS, "compare")
    out = Path(options.get("out") or "runs/compare").expanduser()
    comparison.check_out(out)
    check_target(out / "index.html")
    note = PlainConsole(stderr=True, soft_wrap=True).print
    rows = comparison.compare(sources, options.get("reference"), note, options.get("judge"))
    comparison.write(rows, out)
    comparison.show(rows)
    print_lines(f"index.html, curve.png, compare.csv and table.md are in {out}")
