"""The terminal shows text of files and never acts on it."""

import io
import re
from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table

from diffaccel.__main__ import main
from diffaccel.errors import UsageError
from diffaccel.pretrained import Pretrained, describe
from diffaccel.report.table import print_points
from diffaccel.text import terminal
from diffaccel.text.escape import csv_cell, markdown_cell, printable
from diffaccel.text.terminal import PlainConsole, description_column, duration, print_lines, say, track

HOSTILE = "[red]a[/red] \x1b[31mb\x1b]0;title\x07 \r\u202ec\u2066\u200b :smile: \ud800 \x9b1m"
SHOWN = "[red]a[/red] \\x1b[31mb\\x1b]0;title\\x07 \\r\\u202ec\\u2066\\u200b :smile: \\ud800 \\x9b1m"


def test_invisible_characters_are_escaped():
    assert printable(HOSTILE) == SHOWN
    assert printable("ä ± 中 \\x1b") == "ä ± 中 \\x1b"
    assert printable("a\nb\tc\u2028\udcff \xe9") == "a\\nb\\tc\\u2028\\udcff \xe9"


@pytest.mark.parametrize("styled", [False, True])
def test_a_console_prints_text_and_tables_as_they_are(styled: bool):
    file = io.StringIO()
    console = PlainConsole(file=file, width=200, force_terminal=styled, color_system=None)
    console.print(HOSTILE, style="red")
    table = Table("[bold]head", box=None)
    table.add_row(HOSTILE)
    console.print(table)
    first, head, row = file.getvalue().splitlines()
    assert first == SHOWN and row.strip() == SHOWN and head.strip() == "[bold]head"


def test_all_that_is_printed_goes_through_the_terminal_module():
    own = Path(terminal.__file__)
    for file in own.parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        found = re.findall(r"(?<![\w.])print\(|\bConsole\(|\bTextColumn\(|progress import track", text)
        assert file == own or not found, f"{file}: {found}"


def test_lines_are_one_each(capsys: pytest.CaptureFixture[str]):
    print_lines("a\nb", HOSTILE)
    say("a\nb\x1b")
    printed = capsys.readouterr()
    assert printed.out == f"a\\nb\n{SHOWN}\n" and printed.err == "a\\nb\\x1b\n"


def test_a_bar_shows_its_description_as_it_is(monkeypatch: pytest.MonkeyPatch):
    file = io.StringIO()
    monkeypatch.setattr(
        terminal, "PlainConsole", lambda stderr: PlainConsole(file=file, width=200, force_terminal=True)
    )
    assert list(track(range(3), "[/red] [x]\x07", 3)) == [0, 1, 2]
    assert "[/red] [x]\\x07" in file.getvalue() and "\x07" not in file.getvalue()
    progress = Progress(description_column())
    progress.add_task("[/bold]")
    assert progress.get_renderable()


def test_an_error_that_quotes_a_file_is_one_inert_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "edm.yaml"
    file.write_text('base: "gone\\e[31m\\n[red]x.yaml"\n')
    assert main(["bench", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed and "gone\\x1b[31m\\n[red]x.yaml" in printed


def test_points_that_lack_something_are_printed(capsys: pytest.CaptureFixture[str]):
    points = [
        {},
        {"nfe": "5", "metrics": None},
        {"nfe": 5, "nfe_budget": 6, "metrics": {"fd_[b]": 1.5, "fd_[b]_floor": 1}},
    ]
    print_points(points, "fd_[b]", Path("out\x1b"))
    printed = capsys.readouterr().out
    assert " fd_[b] " in printed and "1.5" in printed and "out\\x1b" in printed and "rounded down" in printed


@pytest.mark.parametrize(
    ("text", "cell"),
    [("=1", "'=1"), ("+a", "'+a"), ("-2", "-2"), ("-.5e-3", "-.5e-3"), ("@", "'@"), ("-1-1", "'-1-1"), ("a=", "a="),
     ("\t=1", "\\t=1"), ("", ""), ("-inf", "'-inf")],
)  # fmt: skip
def test_csv_cells_are_no_formulas(text: str, cell: str):
    assert csv_cell(text) == cell


@pytest.mark.parametrize(
    ("text", "cell"),
    [("a|b", "a\\|b"), ("a\\|b", "a\\\\\\|b"), ("a\nb", "a\\\\nb"), ("<b>&", "&lt;b&gt;&amp;"),
     ("edm_best", "edm_best"),     ("_a_", "\\_a\\_"), ("[x](y)", "\\[x\\](y)"), ("$1`*", "\\$1\\`\\*")],
)  # fmt: skip
def test_markdown_cells_are_text(text: str, cell: str):
    assert markdown_cell(text) == cell


def test_a_usage_error_keeps_its_words():
    assert printable(str(UsageError("nfe=-1: give one or more positive budgets"))).startswith("nfe=-1")


def test_what_a_checkpoint_says_of_itself_is_shown_in_one_line_each(capsys: pytest.CaptureFixture[str]):
    part = {"name": "x\n\x1b[31m[red]", "key\x07": "\u202e"}
    print_lines(
        *describe(Pretrained((1, 8, 8), part, part, part, {}, {"format": "\x1b]0;t\x07\nforged  line"})).splitlines()
    )
    printed = capsys.readouterr().out
    assert printed.count("\n") == 7 and "\x1b" not in printed and "\\x1b]0;t\\x07\\nforged  line" in printed


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0123, "0.0123 s"), (119, "119 s"), (120, "2 min"), (3599, "60 min"), (5400, "1.5 h"), (172800, "2 days")],
)
def test_durations_have_a_readable_unit(seconds: float, said: str):
    assert duration(seconds) == said
