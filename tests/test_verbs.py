"""The table of commands: help texts, names that are checked without PyTorch, and readers that stop reading."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffaccel import UsageError, api, pretrained
from diffaccel.__main__ import main
from diffaccel.config import KEYS
from diffaccel.parts.catalogue import CATALOGUE, names_of, registry_of
from diffaccel.verbs import VERBS, Verb
from diffaccel.verbs.advising import OPTIONS as ADVISE_OPTIONS
from diffaccel.verbs.asked import KEYS as SCORE_KEYS
from diffaccel.verbs.comparison import OPTIONS
from diffaccel.verbs.curve import OWN as CURVE_KEYS
from diffaccel.verbs.exporting import OWN as EXPORT_OPTIONS
from diffaccel.verbs.help import COMMON, FREQUENT, KEY, keys_of, overview, text_of, wanted
from diffaccel.verbs.names import check_names
from diffaccel.verbs.new import OPTIONS as NEW_OPTIONS
from diffaccel.verbs.sweeping import OPTIONS as SWEEP_OPTIONS
from diffaccel.verbs.train import OPTIONS as TRAIN_OPTIONS

ROOT = Path(__file__).parent.parent
OWN = {
    "advise": {*ADVISE_OPTIONS},
    "export": {*EXPORT_OPTIONS, "nfe"},
    "compare": {*OPTIONS},
    "convert": {*pretrained.OPTIONS, "inspect", "again"},
    "score": {*SCORE_KEYS},
    "sweep": {*SWEEP_OPTIONS},
    "new": {*NEW_OPTIONS},
    "curve": {*CURVE_KEYS, "nfe", "n", "seed", "images", "dry_run"},
    "train": {*TRAIN_OPTIONS, "images"},
    "list": {"format"},
}
"""Command that is not on an experiment -> its keys."""


def run(*words: str, then: str = "", program: str = "-m diffaccel") -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} {program} {' '.join(words)}{then}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("name", VERBS)
def test_every_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]):
    texts = []
    for words in (["help", name], [name, "--help"], [name, "-h"], [name, "help"], [name, "something", "--help"]):
        assert main(words) == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        assert printed.err == ""
    assert len(set(texts)) == 1 and texts[0].startswith(f"diffaccel {name}") and "Keys" in texts[0] or name in texts[0]
    assert max(map(len, texts[0].splitlines())) <= 120
    assert sum(f"diffaccel {name} " in line for line in overview().splitlines() if line.startswith("  ")) == 1


@pytest.mark.parametrize("name", VERBS)
def test_the_keys_in_a_help_text_exist_and_are_all_keys(name: str):
    verb, keys = VERBS[name], keys_of(VERBS[name])
    if verb.on_experiment:
        assert keys and keys <= KEYS
    else:
        assert keys == OWN.get(name, set())


def test_the_overview_fits_a_terminal():
    assert max(map(len, overview().splitlines())) <= 120


def test_the_keys_in_the_common_texts_exist():
    for text in (COMMON, FREQUENT):
        left = [line[2:].partition("  ")[0] for line in text.splitlines() if line.startswith("  ")]
        assert {first or second for column in left for first, second in KEY.findall(column)} <= KEYS


def test_help_of_a_mistyped_command(capsys: pytest.CaptureFixture[str]):
    assert main(["help", "bnech"]) == 2
    assert "no command is called 'bnech'; did you mean 'bench'?" in capsys.readouterr().err
    assert wanted(["compare", "help.d"]) is None and wanted(["bench", "digits/edm"]) is None


def test_a_command_without_help_is_refused():
    with pytest.raises(ValueError, match="no literal HELP"):
        text_of(Verb("names"))


@pytest.mark.parametrize("group", CATALOGUE)
def test_names_of_parts_in_the_source_are_those_of_the_registry(group: str):
    registry = registry_of(group)
    assert names_of(group) == {name for name in registry if registry.plugin_of(name) is None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bnech", "no command is called 'bnech'; did you mean 'bench'?"),
        ("bench digits/emd", "'digits/emd'"),
        ("bench digits/edm nef=5", "no key is called 'nef'; did you mean 'nfe'?"),
        ("bench digits/edm --nef 5", "no key is called 'nef'; did you mean 'nfe'?"),
        ("bench digits/edm training.lrr=1", "no key is called training.lrr; did you mean 'lr'?"),
        ("bench digits/edm solver=huen", "no solver is called 'huen'; did you mean 'heun'?"),
        ("bench digits/edm solver.name=huen", "no solver is called 'huen'; did you mean 'heun'?"),
        ("bench digits/edm solver.grid=karas", "no grid is called 'karas'; did you mean 'karras'?"),
        ("score images digits jugdes=inception", "score has no key 'jugdes'; did you mean 'judges'?"),
        ("compare runs jugde=inception", "compare has no key 'jugde'; did you mean 'judge'?"),
        ("compare nowhere", "nowhere does not exist"),
        ("convert a b wieghts=ema", "convert has no key 'wieghts'; did you mean 'weights'?"),
        ("sweep solvres", "did you mean 'solvers'?"),
        ("list solvr", "did you mean 'solver'?"),
    ],
)
def test_a_typo_is_reported_without_importing_pytorch(words: str, said: str):
    program = """-c 'import sys; from diffaccel.__main__ import main; status = main(); \
        sys.exit(status if "torch" not in sys.modules else 77)'"""
    done = run(words, program=program)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_the_method_before_and_after_the_data():
    expected = ("digits/dlg", ["nfe=5"])
    assert check_names("digits", ["method=dlg", "nfe=5"]) == check_names("digits", ["nfe=5", "method=dlg"]) == expected
    assert check_names(None, ["method=dlg", "data=digits"]) == (None, ["method=dlg", "data=digits"])
    assert check_names("digits/dlg", ["method=dlg", "nfe=5"]) == expected
    with pytest.raises(UsageError, match="'digits/dgl' is neither a file"):
        check_names("digits", ["method=dgl"])


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "edm", "--data", "toy"],
        ["--data=toy", "--method=edm"],
        ["toy", "--method", "edm"],
        ["--method", "edm", "toy"],
        ["--method", "edm", "toy/edm"],
    ],
)
def test_every_way_to_name_an_experiment(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *words, "--dry-run", "n=10"]) == 0
    assert capsys.readouterr().out.startswith("toy/edm: edm,")


def test_a_method_is_no_label_for_the_parts_of_another(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "toy/edm", "method=dlg", "dry_run=true"]) == 2
    assert "toy/edm and method=dlg are two experiments: give toy/dlg" in capsys.readouterr().err
    with pytest.raises(UsageError, match="two experiments"):
        api.bench("toy/edm", method="dlg")
    assert check_names("digits/edm", ["method=tdpm", "prior=implicit"])[0] == "digits/edm", "with parts of its own"


@pytest.mark.parametrize("words", ["help", "list solver", "explain solver heun", "bnech 2>&1"])
def test_a_reader_that_stops_reading_is_no_error(words: str):
    """The reader has ended before anything is written; status 141 is what a shell reports after SIGPIPE."""
    done = run(words, then=" | true")
    assert done.stderr == "" and done.stdout == ""
    program = f"""-c 'import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.dup2(write, 2)
import diffaccel.__main__ as cli; sys.exit(cli.main("{words.removesuffix(" 2>&1")}".split()))'"""
    assert run(program=program).returncode == 141
