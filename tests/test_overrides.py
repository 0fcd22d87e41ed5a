"""The command line's words: which are settings, what a value is, what a file may not refer to."""

import json
import os
from pathlib import Path

import pytest

from diffaccel import experiment
from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS, FLAGS, KEYS, Config, load, parse_overrides, to_yaml
from diffaccel.errors import UsageError
from diffaccel.parts.overrides import as_given, one_experiment, scalar, sort_words

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]


# Which words are settings


@pytest.mark.parametrize(
    ("line", "others", "settings"),
    [
        ("nfe=5 digits/edm n=3", ["digits/edm"], ["nfe=5", "n=3"]),
        ("--nfe=5 --n 3 digits/edm", ["digits/edm"], ["nfe=5", "n=3"]),
        ("--dry-run digits/edm", ["digits/edm"], ["dry_run=true"]),
        ("--dry-run no digits/edm", ["digits/edm"], ["dry_run=no"]),
        ("digits/edm --again", ["digits/edm"], ["again=true"]),
        ("--again --n 3", [], ["again=true", "n=3"]),
        ("--solver.denoise seed=1", [], ["solver.denoise=true", "seed=1"]),
        ("-n 3 --training.lr -1", [], ["n=3", "training.lr=-1"]),
        ("configs/lr=0.1/edm.yaml seed=1", ["configs/lr=0.1/edm.yaml"], ["seed=1"]),
        ("--data.path /x/lr=0.1/a.npz", [], ["data.path=/x/lr=0.1/a.npz"]),
        ("out=a=b", [], ["out=a=b"]),
    ],
)
def test_settings_are_told_from_other_words(line: str, others: list[str], settings: list[str]):
    assert sort_words(line.split(), {"dry_run", "again"}) == (others, settings)


def test_a_file_whose_name_begins_like_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "edm.yaml").write_text("method: diffusion\ndata: toy\nshape: [2, 1, 1]\n")
    monkeypatch.chdir(tmp_path)
    assert sort_words(["lr=0.1/edm.yaml", "n=3"]) == (["lr=0.1/edm.yaml"], ["n=3"])
    assert load("lr=0.1/edm.yaml").method_name == "diffusion"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("toy/edm n = 5", "write n=VALUE, without spaces"),
        ("n = 5", "'=': write key=value without spaces"),
        ("toy/edm n= 5", "settings are key=value, without spaces"),
        ("toy/edm dry_run", "write dry_run=true"),
        ("toy/edm digits/edm", "give one experiment"),
        ("toy/edm --", "give one experiment"),
        ("toy/edm experiment=digits/edm", "give the experiment without a key"),
        ("toy/edm solver..eta=1", "solver..eta=1"),
        ("toy/edm tradeoff.densities.x=a", "'x' is not a number"),
    ],
)
def test_a_stray_word_is_one_line_with_the_right_form(line: str, named: str, capsys: Printed):
    assert main(["bench", *line.replace("n = 5", "n = 5").split(" ")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert named in printed or "without spaces" in printed


def test_a_switch_of_a_part_takes_no_other_word():
    """W&B's agent leaves out the value of a flag that is true, and a part's switch is one too."""
    words = ["--solver.denoise", "digits/edm", "--n=3", "--by_nfe.5.prior.carry", "--keep-features", "no", "--limit"]
    assert one_experiment([*words, "7"], KEYS, FLAGS) == (
        *("digits/edm", ["solver.denoise=true", "n=3", "by_nfe.5.prior.carry=true", "keep_features=no", "limit=7"]),
    )


AGENT = {
    "seed": 3,
    "nfe": [5, 10],
    "solver": {"name": "heun", "denoise": True, "grid": {"name": "karras", "rho": 1e-05}},
    "prior.restart_every": None,
    "keep_features": False,
    "again": True,
    "limit": None,
    "by_nfe": None,
    "precision": "32-true",
}


@pytest.mark.parametrize("form", ["args", "args_no_hyphens", "args_no_equals", "args_no_boolean_flags"])
def test_words_as_an_agent_of_wandb_writes_them(form: str):
    agent = pytest.importorskip("wandb.sdk.launch.sweeps.utils").create_sweep_command_args
    words = agent({"args": {key: {"value": value} for key, value in AGENT.items()}})[form]
    name, settings = one_experiment([*words, "digits/dlg"], KEYS, FLAGS)
    assert name == "digits/dlg"
    config = load(name, settings)
    assert (config.seed, config.nfe, config.limit, config.by_nfe, config.again) == (3, [5.0, 10.0], None, {}, True)
    assert config.keep_features == (form == "args_no_boolean_flags"), "that form leaves false out"
    assert config.solver["denoise"] is True and config.solver["grid"] == {"name": "karras", "rho": 1e-05}
    assert config.prior["restart_every"] is None


def test_verbs_on_files_take_the_same_words(tmp_path: Path, capsys: Printed):
    assert main(["bench", "--method=edm", "--data", "toy", "n=40", "--logger=none", f"--out={tmp_path / 'a'}"]) == 0
    for out in (["--out", str(tmp_path / "1")], [f"--out={tmp_path / '2'}"], [f"out={tmp_path / '3'}"]):
        assert main(["compare", *out, str(tmp_path / "a")]) == 0
    assert all((tmp_path / name / "index.html").is_file() for name in "123")
    weights = tmp_path / "w.safetensors"
    source = str(EXPERIMENTS / "digits" / "weights" / "edm.safetensors")
    for again in ([], ["--again"], ["--again=True"]):
        capsys.readouterr()
        main(["convert", *again, source, str(weights)])
        assert "no key" not in capsys.readouterr().err


def test_the_experiment_may_come_after_its_settings(capsys: Printed):
    assert main(["bench", "nfe=5", "--dry-run", "toy/edm", "n=50"]) == 0
    assert "5" in capsys.readouterr().out


# What a value is


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-3", -3), ("1_000", 1000), ("010", 10), ("1e3", 1000.0), ("2.5", 2.5), (".5", 0.5), ("5.", 5.0),
        ("true", True), ("Yes", True), ("off", False), ("null", None), ("~", None), ("", None), ("none", "none"),
        ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1__0", "1__0"), ("a: b #1", "a: b #1"), ("0x10", "0x10"),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object):
    found = scalar(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: b #1.pth",
        "2024",
        "1e3",
        "on",
        "[x]",
        "{x}",
        "*a",
        "a,b",
        "'a'",
        '"a"',
        "-a",
        "\u00fc.pth",
        "a=b",
        "&a",
        "!a",
    ],
)
@pytest.mark.parametrize(
    "key",
    ["checkpoint", "out", "data.path", "prior.init", "by_nfe.5.prior.checkpoint", "tradeoff.densities.0.2", "resume"],
)
def test_a_path_is_the_word_itself(key: str, text: str):
    branch = parse_overrides([f"{key}={text}"])
    while isinstance(branch, dict):
        (branch,) = branch.values()
    assert branch == text


def test_homes_and_empty_paths():
    home = os.path.expanduser("~")
    tree = parse_overrides(["out=~/a b", "checkpoint=", "init=null", 'data={name: npz, path: "~/x.npz"}'])
    assert tree["out"] == f"{home}/a b" and tree["checkpoint"] is None and tree["init"] is None
    assert tree["data"]["path"] == f"{home}/x.npz"


def test_names_are_text():
    tree = parse_overrides(["logger=none", "data.label=1e3", 'precision="bf16"', "precision=32"])
    assert tree == {"logger": "none", "data": {"label": "1e3"}, "precision": "32"}


def test_keys_that_hold_dots_or_numbers():
    tree = parse_overrides(["tradeoff.densities.0.2=a", "search.space.solver.max_order=[2,3]", "by_nfe.5.solver=heun"])
    assert tree == {
        "tradeoff": {"densities": {0.2: "a"}},
        "search": {"space": {"solver.max_order": [2, 3]}},
        "by_nfe": {5: {"solver": {"name": "heun"}}},
    }


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("nfe=5,10", "nfe", [5.0, 10.0]), ("nfe=5 10", "nfe", [5.0, 10.0]), ("nfe=5,", "nfe", [5.0]),
        ("n=1e3", "n", 1000), ("limit=None", "limit", None), ("limit=none", "limit", None), ("limit=5.0", "limit", 5),
        ("precision=32", "precision", "32-true"), ("precision=16", "precision", "16-mixed"),
        ("precision=bf16", "precision", "bf16-mixed"), ("precision=64", "precision", "64-true"),
        ("shape=2,1,1", "shape", [2, 1, 1]), ("keep_images=yes", "keep_images", True), ("compile=1", "compile", True),
    ],
)  # fmt: skip
def test_values_as_people_write_them(word: str, key: str, value: object):
    assert getattr(load("toy/edm", [word]), key) == value


def test_numbers_of_parts_too():
    config = load("digits/dlg", ["images=2e6", "chains=1e2", "network.widths=8,16", "prior.chain_steps=none"])
    assert config.training.images == 2_000_000 and type(config.training.images) is int
    method = experiment.build_method(config, load=False)
    assert method.prior.chains == 100 and type(method.prior.chains) is int and method.prior.chain_steps is None  # type: ignore[union-attr]


def test_precision_in_a_file_may_be_a_number(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("method: diffusion\ndata: toy\nshape: [2, 1, 1]\nprecision: 32\nlimit: None\n")
    config = load(str(tmp_path / "a.yaml"))
    assert config.precision == "32-true" and config.limit is None


# References to the environment


FILES = [
    "data: {name: npz, path: '${oc.env:SECRET}/x.npz'}",
    "out: ${oc.env:SECRET}",
    "out: ${oc.decode:${oc.env:SECRET}}",
    "out: a\\${oc.env:SECRET}",
    "out: ${oc.create:${oc.env:SECRET}}",
    "out: ${seed}",
    "by_nfe: {5: {prior: {name: '${oc.env:SECRET}'}}}",
    "search: {space: {solver.name: [heun, '${oc.env:SECRET}']}}",
    "base: ${oc.env:SECRET}.yaml",
]


@pytest.mark.parametrize("line", FILES)
@pytest.mark.parametrize("based", [False, True])
def test_a_file_refers_to_nothing(line: str, based: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET", "hidden")
    rest = "method: diffusion\nshape: [2, 1, 1]\n" + ("" if line.startswith("data") else "data: toy\n")
    (tmp_path / "own.yaml").write_text(f"{rest}{line}\n")
    (tmp_path / "over.yaml").write_text("base: own.yaml\n")
    with pytest.raises(UsageError) as error:
        load(str(tmp_path / ("over.yaml" if based else "own.yaml")))
    message = str(error.value)
    assert "own.yaml" in message and line.split(":")[0] in message and "hidden" not in message


def test_a_part_of_another_name_replaces_a_files_references(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        "method: diffusion\nshape: [2, 1, 1]\ndata: {name: npz, path: '${oc.env:NOWHERE}/x'}\n"
    )
    assert load(str(tmp_path / "a.yaml"), ["data=toy"]).data == {"name": "toy"}
    with pytest.raises(UsageError, match="data.path"):
        load(str(tmp_path / "a.yaml"), ["data=npz"])


def test_a_part_resolves_nothing():
    from diffaccel.solver import SOLVERS

    with pytest.raises(UsageError, match="HOME"):
        SOLVERS.build({"name": "ddim", "eta": "${oc.env:HOME}"})


def test_what_a_run_writes_keeps_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PLACE", str(tmp_path / "hidden"))
    monkeypatch.setenv("ETA", "0.5")
    monkeypatch.setenv("TITLE", "toy mixture (hidden)")
    words = ["init=${oc.env:PLACE}/w.pth", "data.label=${oc.env:TITLE}", "solver=ddim", "solver.eta=${oc.env:ETA}"]
    out = tmp_path / "out"
    assert main(["bench", "toy/edm", "n=20", "nfe=4", "logger=csv", f"out={out}", *words]) == 0
    written = (out / "config.yaml").read_text()
    for reference in ("${oc.env:PLACE}/w.pth", "${oc.env:TITLE}", "${oc.env:ETA}"):
        assert reference in written
    for file in out.rglob("*"):
        assert not file.is_file() or b"hidden" not in file.read_bytes(), file
    point = json.loads((out / "points.jsonl").read_text())
    assert point["settings"]["solver"]["eta"] == "${oc.env:ETA}"

    other = tmp_path / "other"
    assert (
        main(["bench", "toy/edm", "n=20", "nfe=4", "logger=none", f"out={other}", "solver=ddim", "solver.eta=0.5"]) == 0
    )
    again = json.loads((other / "points.jsonl").read_text())
    assert point["images_sha256"] == again["images_sha256"], "the run uses the value"


def test_the_run_uses_the_value_and_a_file_written_by_it_needs_the_words_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PLACE", "/somewhere")
    config = load("toy/edm", ["checkpoint=${oc.env:PLACE}/a.pth", "floor=${oc.env:NOWHERE,/b}.npz"])
    assert config.checkpoint == "/somewhere/a.pth" and config.floor == "/b.npz"
    assert as_given(config.checkpoint) == "${oc.env:PLACE}/a.pth"
    (tmp_path / "config.yaml").write_text(to_yaml(config, tmp_path))
    with pytest.raises(UsageError, match="set floor= on the command line|set checkpoint= on the command line"):
        load(str(tmp_path / "config.yaml"))
    again = load(str(tmp_path / "config.yaml"), ["checkpoint=${oc.env:PLACE}/a.pth", "floor=${oc.env:NOWHERE,/b}.npz"])
    assert (again.checkpoint, again.floor) == (config.checkpoint, config.floor)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("checkpoint=${oc.env:UNSET}", "UNSET is not set"),
        ("checkpoint=${seed}", "only ${oc.env:NAME}"),
        ("checkpoint=${oc.decode:${oc.env:NESTED}}", "only ${oc.env:NAME}"),
        ("checkpoint=${oc.env:NESTED}", "NESTED contains a reference itself"),
        ("seed=${oc.env:SEED}", "only paths and names"),
    ],
)
def test_references_that_are_refused(word: str, named: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SEED", "3")
    monkeypatch.setenv("NESTED", "${oc.env:SEED}")
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(UsageError) as error:
        load("toy/edm", [word])
    assert named in str(error.value)


def test_no_budget_is_written_as_null(tmp_path: Path):
    config = load("toy/edm", ["nfe=null", "solver=rk45"])
    assert "nfe: null" in to_yaml(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config, tmp_path))
    assert load(str(tmp_path / "config.yaml")).nfe == config.nfe
    assert isinstance(config, Config)


def test_a_file_that_holds_itself(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("search: {space: &a {x: *a}}\n")
    with pytest.raises(UsageError):
        load(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_text("n: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UsageError, match="not valid YAML"):
        load(str(tmp_path / "b.yaml"))
