"""Configuration: what lies over what, where paths point, and that every mistake is one sentence."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from diffaccel.config import EXPERIMENTS, Config, load, parse_overrides, to_yaml
from diffaccel.data import SOURCES, ArrayImages, Source
from diffaccel.errors import UsageError
from diffaccel.parts.trees import merge
from diffaccel.solver import SOLVERS, Grid, Karras, LogSNR, Solver

BASE = """\
data: {name: toy, n: 100}
shape: [2, 1, 1]
denoiser: {name: mixture, std: 0.3, means: [[0.0, 0.0]], weights: [1.0]}
prior: {name: gaussian, ratio_star: 20.0}
solver: {name: edm_stochastic, S_churn: 20.0, grid: {name: karras, rho: 5.0}}
reference: weights/reference.npz
training: {images: 10, lr: 0.5}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A file in a folder of its own, over a base in the folder above."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "edm.yaml"
    file.write_text("base: ../base.yaml\nmethod: diffusion\ntraining: {lr: 0.25}\nfloor: floor.npz\n")
    return file


# Merging


def test_mappings_merge_key_by_key_and_lists_are_replaced():
    old = {"training": {"images": 10, "betas": [0.9, 0.99]}, "n": 5}
    new = {"training": {"betas": [0.5]}, "seed": 1}
    assert merge(old, new) == {"training": {"images": 10, "betas": [0.5]}, "n": 5, "seed": 1}
    assert old["training"] == {"images": 10, "betas": [0.9, 0.99]}, "the old tree was changed"


def test_a_part_of_another_name_drops_the_old_keys():
    old = {"solver": {"name": "edm_stochastic", "S_churn": 20.0, "grid": {"name": "karras", "rho": 5.0}}}
    assert merge(old, {"solver": "ipndm"}) == {"solver": {"name": "ipndm"}}
    assert merge(old, {"solver": {"name": "heun", "denoise": False}}) == {"solver": {"name": "heun", "denoise": False}}
    kept = merge(old, {"solver": {"name": "edm_stochastic", "S_noise": 1.0}})
    assert kept["solver"]["S_churn"] == 20.0 and kept["solver"]["S_noise"] == 1.0
    assert merge(old, {"solver": "edm_stochastic"}) == old, "the same name keeps the keys"


def test_a_part_of_a_part_follows_the_same_rule():
    old = {"solver": {"name": "heun", "denoise": False, "grid": {"name": "karras", "rho": 5.0}}}
    expected = {"name": "heun", "denoise": False, "grid": {"name": "log_snr"}}
    assert merge(old, {"solver": {"grid": {"name": "log_snr"}}}) == {"solver": expected}
    assert merge(old, {"solver": {"grid": "log_snr"}}) == {"solver": expected}, "a bare string is a name there too"
    assert merge(old, {"solver": {"grid": {"rho": 3.0}}})["solver"]["grid"] == {"name": "karras", "rho": 3.0}


def test_a_bare_string_elsewhere_stays_a_string():
    assert merge({"prior": {"name": "chain"}}, {"prior": {"select": "last"}})["prior"] == {
        "name": "chain",
        "select": "last",
    }


# Files


def test_the_last_word_wins(experiment: Path):
    config = load(str(experiment), ["training.lr=0.125"])
    assert config.training.images == 10, "base"
    assert config.training.lr == 0.125, "command line over experiment over base"
    assert load(str(experiment)).training.lr == 0.25, "experiment over base"
    assert config.training.warmup == Config().training.warmup, "the schema's default"


def test_paths_are_those_of_the_file_that_sets_them(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load(str(experiment))
    assert Path(config.reference or "") == tmp_path / "weights" / "reference.npz"
    assert Path(config.floor or "") == tmp_path / "sub" / "floor.npz"
    monkeypatch.chdir(tmp_path)
    config = load("sub/edm.yaml", ["checkpoint=here.safetensors", "data.path=images.npz"])
    assert config.checkpoint == "here.safetensors", "the command line's are relative to the working directory"
    assert config.data["path"] == "images.npz"
    assert Path(config.reference or "").resolve() == tmp_path / "weights" / "reference.npz"


def test_nested_and_absolute_and_home_paths(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "method: diffusion\nshape: [2, 1, 1]\ndata: {name: npz, path: a/b.npz, test_path: /abs/t.npz}\n"
        "posterior: {name: classifier, checkpoint: ../c.safetensors}\nextractor: {name: small, path: ~/e.safetensors}\n"
    )
    config = load(str(file))
    assert config.data["path"] == str(tmp_path / "a" / "b.npz")
    assert config.data["test_path"] == "/abs/t.npz"
    assert config.posterior["checkpoint"] == str(tmp_path.parent / "c.safetensors")
    assert config.extractor["path"] == str(Path.home() / "e.safetensors")


def test_a_written_configuration_reads_back_the_same(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = load("sub/edm.yaml", ["nfe=[5,10]", "checkpoint=c.safetensors", "solver.grid=log_snr", "floor=/abs/f.npz"])
    folder = Path("runs") / "deep"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config, folder))
    again = load("runs/deep/config.yaml")
    assert again.experiment == "runs/deep/config.yaml"
    again.experiment = config.experiment
    assert again == config


def test_names_under_experiments_are_found():
    by_name = load("toy/edm")
    assert by_name.method_name == "edm" and by_name.experiment == "toy/edm"
    assert load(None, ["method=edm", "data=toy"]) == by_name
    assert load(None, ["method=edm", "data=toy", "data.n=7"]).data == {**by_name.data, "n": 7}
    assert load(None, ["--data=toy", "--method=edm", "--nfe=5"]).nfe == [5.0], "hyphens are ignored"


# Keys of parts that others bring: their annotations say what they hold


class Shelf(Source):
    """A source with keys of its own names; ``path`` is no path here."""

    def __init__(self, place: Path, title: str = "", path: str = "", spare: Path | None = None) -> None:
        self.place, self.title, self.path, self.spare, self.label = place, title, path, spare, title

    def split(self, name: str) -> ArrayImages:  # type: ignore[override]
        raise NotImplementedError


@dataclass(frozen=True)
class Twice(Solver):
    """A solver that holds solvers: one that it builds itself, several of them, and a grid that is built for it."""

    first: Annotated[dict[str, Any], SOLVERS] = field(default_factory=lambda: {"name": "heun"})
    rest: Annotated[list[Any], SOLVERS] = field(default_factory=list)
    second: Grid = Karras()

    def step(self, denoiser: Any, x_t: Any, t: Any, s: Any, trajectory: Any) -> Any:
        raise NotImplementedError


def test_a_key_annotated_as_a_path_is_one_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SOURCES._factories, "shelf", Shelf)
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("data: {name: shelf, place: a/b}\nshape: [2, 1, 1]\nmethod: edm\n")
    own = "base: ../base.yaml\ndata: {path: as/is, spare: c}\nsolver: euler\n"  # the name is the base's
    (tmp_path / "sub" / "own.yaml").write_text(own)
    data = load(str(tmp_path / "sub" / "own.yaml"), ["data.title=1e3"]).data
    assert data["place"] == str(tmp_path / "a" / "b") and data["spare"] == str(tmp_path / "sub" / "c")
    assert (data["path"], data["title"]) == ("as/is", "1e3")
    config = load(str(tmp_path / "sub" / "own.yaml"), ["data.place=007", "data.spare=null"])
    assert (config.data["place"], config.data["spare"]) == ("007", None), "a path is text, relative to here"
    assert SOURCES.build({**data, "place": "x"}).place == Path("x")  # type: ignore[attr-defined]
    written = parse_overrides(["data=shelf", f"data.place={tmp_path}/p"])["data"]
    assert written == {"name": "shelf", "place": f"{tmp_path}/p"}


def test_a_key_annotated_as_a_part_is_one_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(SOLVERS._factories, "twice", Twice)
    (tmp_path / "a.yaml").write_text(
        "method: edm\nshape: [2, 1, 1]\ndata: toy\nsolver: {name: twice, first: euler, rest: [heun, {name: ddim}]}\n"
    )
    solver = load(str(tmp_path / "a.yaml"), ["solver.second=log_snr", "solver.first.grid=log_snr"]).solver
    assert solver == {
        "name": "twice",
        "first": {"name": "euler", "grid": {"name": "log_snr"}},
        "rest": [{"name": "heun"}, {"name": "ddim"}],
        "second": {"name": "log_snr"},
    }
    built = SOLVERS.build(solver)
    assert isinstance(built, Twice) and built.second == LogSNR() and built.first == solver["first"]
    assert load(str(tmp_path / "a.yaml"), ["solver.first=heun"]).solver["first"] == {"name": "heun"}
    for word in ("solver.first=3", "solver.rest=[3]", "solver.second={name: 3}"):
        with pytest.raises(UsageError, match=rf"^solver\.{word[7:12]}\w*"):
            load(str(tmp_path / "a.yaml"), [word])


# The command line's words


def tuned(tmp_path: Path, *words: str) -> Config:
    """An experiment whose settings depend on the budget."""
    content = """
        base: BASE
        by_nfe:
          5: {solver: {name: unipc2, analytic_first: 0.5}, prior: {ratio_star: 20}}
          10: {solver: {name: ipndm, max_order: 2}}
    """.replace("BASE", str(EXPERIMENTS / "digits" / "edm.yaml"))
    (tmp_path / "tuned.yaml").write_text(textwrap.dedent(content))
    return load(str(tmp_path / "tuned.yaml"), words)


@pytest.mark.parametrize(
    ("nfe", "solver"), [(3, "unipc2"), (5, "unipc2"), (9.5, "unipc2"), (10, "ipndm"), (50, "ipndm")]
)
def test_settings_of_a_budget_hold_from_it_on(tmp_path: Path, nfe: float, solver: str):
    config = tuned(tmp_path)
    assert config.at(nfe)["solver"]["name"] == solver
    assert config.at(nfe)["prior"] == {"name": "gaussian", **({"ratio_star": 20} if solver == "unipc2" else {})}


def test_the_command_line_has_the_last_word_over_a_budgets_settings(tmp_path: Path):
    config = tuned(tmp_path, "solver.analytic_first=1", "prior.ratio_star=40")
    assert config.at(5) == {
        "prior": {"name": "gaussian", "ratio_star": 40},
        "solver": {"name": "unipc2", "analytic_first": 1},
    }
    assert tuned(tmp_path, "solver=heun").at(5)["solver"] == {"name": "heun"}


@pytest.mark.parametrize("none", ["null", "{}"])
def test_settings_by_budget_can_be_dropped(tmp_path: Path, none: str):
    config = tuned(tmp_path, f"by_nfe={none}")
    solver = {"name": "dpmpp2m", "lower_order_final": False}
    assert config.at(5) == {"prior": {"name": "gaussian"}, "solver": solver}


@pytest.mark.parametrize(
    ("word", "named"),
    [("by_nfe=[5]", "give budgets"), ("by_nfe={a: {}}", "'a' is not a budget"), ("by_nfe={5: {n: 3}}", "by_nfe.5"),
     ("by_nfe={5: heun}", "by_nfe.5"), ("by_nfe={5: {solver: 3}}", "solver")],
)  # fmt: skip
def test_settings_of_a_budget_are_checked(tmp_path: Path, word: str, named: str):
    with pytest.raises(UsageError, match=named):
        tuned(tmp_path, word)


def test_values_are_yaml():
    tree = parse_overrides(
        ["n=10", "seed=1_000", "training.betas=[0.9,0.95]", "training.clip=null", "out=a/b", "floor="]
    )
    assert tree == {
        "n": 10,
        "seed": 1000,
        "training": {"betas": [0.9, 0.95], "clip": None},
        "out": "a/b",
        "floor": None,
    }


def test_aliases_and_later_words():
    assert parse_overrides(["chains=7", "images=9"]) == {"prior": {"chains": 7}, "training": {"images": 9}}
    assert parse_overrides(["solver=ddim", "solver.eta=1", "solver.eta=0.5"]) == {
        "solver": {"name": "ddim", "eta": 0.5}
    }
    assert parse_overrides(["solver.eta=1", "solver=heun"]) == {"solver": {"eta": 1, "name": "heun"}}


@pytest.mark.parametrize(
    ("word", "budgets"), [("nfe=10", [10.0]), ("nfe=[5,10]", [5.0, 10.0]), ("nfe=[7.5]", [7.5]), ("nfe=2.5", [2.5])]
)
def test_budgets_are_one_number_or_a_list(word: str, budgets: list[float]):
    assert load("toy/edm", [word]).nfe == budgets


# Mistakes: (words, what the one sentence must name)

MISTAKES = [
    (["slover=heun"], ["'slover'", "did you mean 'solver'"]),
    (["training.lrr=1"], ["training.lrr", "Did you mean: 'lr'"]),
    (["training.nonsense=1"], ["training.nonsense"]),
    (["n=many"], ["'n'", "many"]),
    (["training.lr=fast"], ["training.lr", "fast"]),
    (["nfe=[5,x]"], ["nfe", "x"]),
    (["nfe=abc"], ["nfe"]),
    (["nfe=0"], ["nfe", "positive"]),
    (["nfe=[]"], ["nfe=[]", "one or more"]),
    (["n=0"], ["n=0"]),
    (["batch_size=0"], ["batch_size=0"]),
    (["devices=-1"], ["devices=-1"]),
    (["threads=0"], ["threads=0"]),
    (["shape=[2,1]"], ["shape", "[channels, height, width]"]),
    (["logger=tensorbord"], ["logger='tensorbord'", "wandb, csv, tensorboard, none"]),
    (["precision=8"], ["precision"]),
    (["accelerator=tpu"], ["accelerator='tpu'", "auto, cpu, gpu"]),
    (["format=gif"], ["format='gif'", "png, npz"]),
    (["solver=[1]"], ["solver=[1]", "name"]),
    (["method="], ["method=None", "name"]),
    (["method=[1]"], ["method=[1]", "name"]),
    (["solver.grid=5"], ["solver.grid=5", "name"]),
    (["training=5"], ["training=5"]),
    (["seed"], ["'seed'", "key=value"]),
    (["=3"], ["'=3'", "key=value"]),
    (["solver={name: heun"], ["solver={name: heun"]),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=lambda value: value[0] if isinstance(value, list) else None)
def test_a_mistake_is_one_sentence_that_names_it(words: list[str], named: list[str]):
    with pytest.raises(UsageError) as error:
        load("toy/edm", words)
    assert "\n" not in str(error.value)
    for what in named:
        assert what in str(error.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("method: [edm\n", "not valid YAML"),
        ("- a\n- b\n", "does not contain a mapping"),
        ("just words\n", "no"),
        ("base: nowhere.yaml\nmethod: diffusion\n", "nowhere.yaml"),
        ("method: diffusion\nshape: [2, 1, 1]\n", "'data' is missing"),
        ("method: diffusion\nshape: [2, 1, 1]\ndata: {}\n", "'data' is missing"),
        ("data: toy\nshape: [2, 1, 1]\n", "'method' is missing"),
        ("method: diffusion\ndata: toy\n", "'shape' is missing"),
        ("method: diffusion\ndata: toy\nshape: [2, 1, 1]\nmetod: x\n", "'metod'"),
        ("method: diffusion\ndata: toy\nshape: [2, 1, 1]\nout: ${nothing}\n", "nothing"),
        ("method:\ndata: toy\nshape: [2, 1, 1]\n", "method=None"),
        ("method: {name: [edm]}\ndata: toy\nshape: [2, 1, 1]\n", "method.name"),
        ("base: own.yaml\n", "own.yaml"),
        ("", "is missing"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, content: str, named: str):
    file = tmp_path / "own.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as error:
        load(str(file))
    assert "\n" not in str(error.value)
    assert named in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01method: diffusion")
    with pytest.raises(UsageError, match="not valid YAML"):
        load(str(file))


def test_bases_in_a_circle(tmp_path: Path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {other}.yaml\n")
    with pytest.raises(UsageError, match="based on"):
        load(str(tmp_path / "a.yaml"))


def test_an_unknown_experiment_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean 'toy/edm'"):
        load("toy/emd")
    with pytest.raises(UsageError, match=r"method=NAME data=NAME"):
        load(None, ["data=toy"])


@pytest.mark.parametrize("label", ["edm", "ddpm"])
def test_a_file_of_version_0_1_keeps_its_name(label: str, tmp_path: Path):
    (tmp_path / "base.yaml").write_text(f"method: {label}\ndata: toy\nshape: [2, 1, 1]\n")
    (tmp_path / "own.yaml").write_text("base: base.yaml\n")
    config = load(str(tmp_path / "own.yaml"))
    assert config.method == {"label": label, "name": "diffusion"} and config.method_name == label
    assert "label" not in load(str(tmp_path / "own.yaml"), ["method=dlg"]).method
