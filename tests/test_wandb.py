"""W&B as its users expect: the files of offline runs are read back."""

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_evaluator import wandb_records
from test_logging import SCHEDULE, fit

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.denoiser import MixtureDenoiser
from diffaccel.report import read_points
from diffaccel.report.ledger import Ledger
from diffaccel.run.loggers import _curve

pytestmark = pytest.mark.usefixtures("undrawn")
ROOT = Path(__file__).parent.parent


@dataclass
class WandbFile:
    """What the file of an offline run contains.

    Attributes:
        run: Record of the run, with its name, tags and group.
        rows: Rows of the history.
        axes: Metric, or pattern of metrics -> metric of its horizontal axis.
        summary: Values at the end of the run.
        tables: Rows of the last table, by column.
    """

    run: Any
    rows: list[dict[str, Any]]
    axes: dict[str, str]
    summary: dict[str, Any]
    tables: list[dict[str, Any]]

    @property
    def curve(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "curve/nfe" in row]


def values_of(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_files(out: Path) -> list[WandbFile]:
    """Read the offline runs of a folder, in the order in which they were started."""
    found = []
    for file in sorted(out.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_ctime_ns):
        kinds: dict[str, list[Any]] = {}
        for record in wandb_records(file):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        summary: dict[str, Any] = {}
        for record in kinds.get("summary", []):
            summary |= values_of(record.update)
        tables = sorted(file.parent.glob("files/media/table/points_*.json"), key=lambda path: path.stat().st_ctime_ns)
        table = json.loads(tables[-1].read_text()) if tables else {"columns": [], "data": []}
        found.append(
            WandbFile(
                kinds["run"][0],
                [values_of(record.item) for record in kinds.get("history", [])],
                {record.name or record.glob_name: record.step_metric for record in kinds.get("metric", [])},
                summary,
                [dict(zip(table["columns"], row, strict=True)) for row in table["data"]],
            )
        )
    return found


def bench(out: Path, *words: str) -> int:
    return main(["bench", "toy/edm", "n=60", "threads=1", "logger=wandb", *words, f"out={out}"])


# Axes, summary, table


@pytest.mark.parametrize("verb", ["bench", "fit"])
def test_every_figure_of_the_curve_has_the_nfe_as_its_axis(verb: str, tmp_path: Path):
    """A fit's logger defines ``trainer/global_step`` for all metrics, by a pattern."""
    done = bench(tmp_path, "nfe=5,10") if verb == "bench" else fit(tmp_path, "logger=wandb")
    assert done == 0
    (file,) = wandb_files(tmp_path)
    figures = {name for row in file.curve for name in row if name.startswith("curve/")} - {"curve/nfe"}
    assert len(figures) > 5
    for name in figures:
        assert file.axes[name] == "curve/nfe", name
    assert not [name for name in file.axes if "*" in name and name.startswith("curve")], "patterns are ambiguous"
    assert all("trainer/global_step" not in row for row in file.curve)
    assert [row["curve/nfe"] for row in file.curve] == [
        point["nfe"] for point in read_points(tmp_path / "points.jsonl")
    ]


def test_the_summary_has_a_plain_value_for_each_budget_and_the_lowest(tmp_path: Path):
    assert bench(tmp_path, "nfe=5,10") == 0
    (file,) = wandb_files(tmp_path)
    distances = [point["metrics"]["fd_identity"] for point in read_points(tmp_path / "points.jsonl")]
    found = [file.summary[f"fd_identity{end}"] for end in ("/nfe_005", "/nfe_010", "")]
    assert found == pytest.approx([*distances, min(distances)])
    assert not [name for name in file.summary if name.startswith("curve/")], "the last row's would mean nothing"
    assert any("fd_identity" in row for row in file.rows), "the optimiser of a sweep reads the history"


def test_the_lowest_distance_of_a_training_is_kept(tmp_path: Path):
    assert fit(tmp_path, *SCHEDULE, "logger=wandb") == 0
    (file,) = wandb_files(tmp_path)
    name = "eval/nfe_005/fd_digits"
    rows = [row[name] for row in file.rows if name in row]
    assert len(rows) == 4 and file.axes[name] == "trainer/global_step"
    assert file.summary[name] == pytest.approx({"min": min(rows), "last": rows[-1]})


def test_the_table_has_the_settings(tmp_path: Path):
    words = ["solver={name: dpmpp2m, grid: {name: listed, fractions: [0, 0.5, 0.8, 1]}}", "nfe=3"]
    assert bench(tmp_path, *words) == 0
    (file,) = wandb_files(tmp_path)
    (row,) = file.tables
    (point,) = read_points(tmp_path / "points.jsonl")
    assert row["solver.grid.name"] == "listed" and json.loads(row["solver.grid.fractions"]) == [0, 0.5, 0.8, 1]
    for key in ("method", "prior", "solver", "nfe", "n", "seed", "images_sha256", "key"):
        assert row[key] == point[key]
    assert row["fd_identity"] == pytest.approx(point["metrics"]["fd_identity"])


# What the environment says


IN_A_NEW_PROCESS = """\
from diffaccel.__main__ import main
assert main(["bench", "toy/edm", "n=60", "nfe=5", "threads=1", "out={out}/bench"]) == 0
assert main(["fit", "digits/edm", *{tiny}, "images=64", "reference=", "out={out}/fit"]) == 0
"""
TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16"]


def test_name_tags_group_and_project_are_the_environment_s(tmp_path: Path):
    """W&B reads some of them itself, when a process starts."""
    own = {"PROJECT": "p", "ENTITY": "e", "TAGS": "a,b", "RUN_GROUP": "g", "JOB_TYPE": "j", "NOTES": "some notes"}
    environment = {**os.environ, **{f"WANDB_{name}": value for name, value in own.items()}}
    names = {"bench": "toy/edm gaussian dpmpp2m NFE 5 seed 0", "fit": "digits/edm gaussian dpmpp2m NFE 10 seed 0"}
    script = IN_A_NEW_PROCESS.format(out=tmp_path, tiny=TINY)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment, capture_output=True)
    for verb, name in names.items():
        (file,) = wandb_files(tmp_path / verb)
        run = file.run
        found = (run.project, run.entity, list(run.tags), run.run_group, run.job_type, run.notes)
        assert found == ("p", "e", ["a", "b"], "g", "j", "some notes")
        assert run.display_name == name


def test_a_run_of_an_agent_belongs_to_its_sweep(tmp_path: Path):
    """The environment and the file of parameters are those that ``wandb agent`` makes for a run."""
    parameters = tmp_path / "config-r1.yaml"
    values = {"method": "edm", "data": "toy", "nfe": 5, "n": 60}
    parameters.write_text(json.dumps({"wandb_version": 1, **{key: {"value": value} for key, value in values.items()}}))
    own = {"WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    words = [f"--{key}={value}" for key, value in values.items()]
    command = [sys.executable, "-m", "diffaccel", "bench", *words, f"out={tmp_path}"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, **own}, capture_output=True)
    (file,) = wandb_files(tmp_path)
    assert (file.run.run_id, file.run.sweep_id) == ("r1", "s1")
    (point,) = read_points(tmp_path / "points.jsonl")
    assert file.summary["fd_identity"] == pytest.approx(point["metrics"]["fd_identity"])
    config = values_of(file.run.config.update)
    assert (config["method"], config["nfe"]) == ("edm", 5), "the sweep's own values are those of its plots"


# A point is logged once


def logged(out: Path) -> list[float]:
    return [row["curve/nfe"] for file in wandb_files(out) for row in file.curve]


def test_a_bench_that_is_repeated_logs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench(tmp_path, "nfe=5,10") == 0
    capsys.readouterr()
    assert bench(tmp_path, "nfe=5,10") == 0
    (file,) = wandb_files(tmp_path)
    assert f"W&B run {file.run.run_id} has these points" in capsys.readouterr().err
    assert [row["curve/nfe"] for row in file.curve] == [5, 10]


def test_another_budget_joins_the_run_of_its_curve(tmp_path: Path):
    assert bench(tmp_path, "nfe=5,10") == 0
    assert bench(tmp_path, "nfe=5,10,20") == 0
    first, second = wandb_files(tmp_path)
    assert first.run.run_id == second.run.run_id
    assert second.run.display_name == "toy/edm gaussian dpmpp2m NFE 5,10,20 seed 0"
    assert logged(tmp_path) == [5, 10, 20]
    assert {"fd_identity/nfe_005", "fd_identity/nfe_020"} <= second.summary.keys() and len(second.tables) == 3
    assert bench(tmp_path, "nfe=5", "solver=heun") == 0
    assert wandb_files(tmp_path)[-1].run.run_id != first.run.run_id, "another curve is another run"
    assert bench(tmp_path, "nfe=5", "again=true") == 0
    assert len({file.run.run_id for file in wandb_files(tmp_path)}) == 3, "a new measurement is a new run"


def test_summary_and_table_of_a_joined_run_have_all_of_its_points(tmp_path: Path):
    assert bench(tmp_path, "nfe=10") == 0 and bench(tmp_path, "nfe=3", "solver=heun") == 0
    assert bench(tmp_path, "nfe=5") == 0
    points = {point["nfe"]: point["metrics"]["fd_identity"] for point in read_points(tmp_path / "points.jsonl")}
    first, _, joined = wandb_files(tmp_path)
    assert joined.run.run_id == first.run.run_id and logged(tmp_path) == [10, 3, 5]
    found = [joined.summary[f"fd_identity{end}"] for end in ("/nfe_010", "/nfe_005", "")]
    assert found == pytest.approx([points[10], points[5], min(points[10], points[5])]) and points[10] < points[5]
    assert [row["nfe"] for row in joined.tables] == [10, 5], "the third is of another curve"


def test_the_curve_of_other_weights_at_the_same_path_is_another_run(tmp_path: Path):
    mine, copy = tmp_path / "mine.safetensors", tmp_path / "copy.safetensors"
    shutil.copy(ROOT / "experiments/digits/weights/edm.safetensors", mine)
    shutil.copy(mine, copy)
    out = tmp_path / "out"
    common = ["bench", "digits/edm", "n=60", "threads=1", f"out={out}"]
    assert main([*common, f"checkpoint={mine}", "nfe=5"]) == main([*common, f"checkpoint={copy}", "nfe=6"]) == 0
    with safe_open(mine, "pt") as file:
        header = file.metadata()
    save_file({name: 0.99 * tensor for name, tensor in load_file(mine).items()}, mine, header)
    assert main([*common, f"checkpoint={mine}", "nfe=5"]) == 0
    first, same, refitted = (file.run.run_id for file in wandb_files(out))
    assert first == same != refitted


NAMED = [
    ("digits/edm", "checkpoint={file}"),
    ("digits/dlg", "posterior.checkpoint={file}"),
    ("digits/small_t", "prior.checkpoint={file}"),
    ("digits/small_t", "by_nfe={{3: {{prior: {{checkpoint: {file}}}}}}}"),
    ("celebahq256/edm_latent", "latents.checkpoint={file}"),
    ("digits/edm", "extractor.path={file}"),
    ("digits/edm", "reference={file}"),
]


@pytest.mark.parametrize(("experiment", "word"), NAMED, ids=[word for _, word in NAMED])
def test_a_curve_is_identified_by_the_content_of_its_files(experiment: str, word: str, tmp_path: Path):
    def curve(name: str, content: bytes) -> str:
        file = tmp_path / name
        file.write_bytes(content)
        return _curve(load(experiment, [word.format(file=file)], trains=False))

    assert curve("here", b"a") == curve("there", b"a") != curve("here", b"b")


def test_a_run_that_the_user_names_gets_measured_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As under an agent, whose sweep needs the result of each of its runs."""
    assert bench(tmp_path, "nfe=5") == 0
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    for _ in range(2):
        assert bench(tmp_path, "nfe=5") == 0
    *_, last = wandb_files(tmp_path)
    assert last.run.run_id == "mine" and "fd_identity" in last.summary
    assert logged(tmp_path) == [5, 5] and len(wandb_files(tmp_path)) == 2


def test_points_that_were_not_logged_yet_are(tmp_path: Path):
    assert bench(tmp_path, "nfe=5", "logger=none") == 0
    assert bench(tmp_path, "nfe=5") == 0
    assert logged(tmp_path) == [5]


def test_after_an_interrupt_the_rest_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    forward, calls = MixtureDenoiser.forward, [0]

    def interrupted(self: MixtureDenoiser, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    monkeypatch.setattr(MixtureDenoiser, "forward", interrupted)
    assert bench(tmp_path, "nfe=5,10") == 130
    assert logged(tmp_path) == [5]
    assert bench(tmp_path, "nfe=5,10") == 0
    assert logged(tmp_path) == [5, 10]
    assert len({file.run.run_id for file in wandb_files(tmp_path)}) == 1


def test_a_finished_fit_that_is_resumed_logs_its_points_once(tmp_path: Path):
    assert fit(tmp_path, "logger=wandb") == 0
    assert fit(tmp_path, "logger=wandb", "resume=auto") == 0
    assert logged(tmp_path) == [3, 5]
    weights = f"checkpoint={tmp_path / 'ema.safetensors'}"
    assert main(["bench", "digits/edm", *TINY, weights, "n=60", "nfe=3", f"out={tmp_path}"]) == 0
    run, bench_run = wandb_files(tmp_path)[0].run.run_id, wandb_files(tmp_path)[-1].run.run_id
    assert run != bench_run and (tmp_path / "wandb_run_id").read_text() == run, "a bench leaves the run of the fit"


def test_a_ledger_survives_a_torn_line(tmp_path: Path):
    ledger, point = Ledger(tmp_path), {"key": "a", "nfe": 5.0, "metrics": {"fd": float("nan")}}
    ledger.start("run", "curve", [5.0])
    with ledger.path.open("a") as file:
        file.write('{"run": "ru')
    ledger.add("run", [point])
    ledger.start("run", "curve", [5.0, float("inf")])
    assert ledger.budgets("run") == [5, float("inf")] and ledger.budgets("other") == []
    assert ledger.run_of("curve") == "run" and ledger.run_of("other") is None
    assert not ledger.missing("run", [{**point, "metrics": {"fd": None}}]), "as points.jsonl has it"
    assert len(ledger.missing("other", [point])) == 1


def test_two_processes_are_one_run(tmp_path: Path):
    words = [
        "toy/edm",
        "n=60",
        "nfe=4",
        "devices=2",
        "accelerator=cpu",
        "threads=1",
        "batch_size=10",
        f"out={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "diffaccel", "bench", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (point,) = read_points(tmp_path / "points.jsonl")
    assert point["world_size"] == 2
    (file,) = wandb_files(tmp_path)
    assert [row["curve/nfe"] for row in file.curve] == [4]


def test_csv_has_the_same_rows(tmp_path: Path):
    assert bench(tmp_path / "wandb", "nfe=5,10") == 0 and bench(tmp_path / "csv", "nfe=5,10", "logger=csv") == 0
    with next(tmp_path.glob("csv/csv/version_0/metrics.csv")).open() as stream:
        table = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    (file,) = wandb_files(tmp_path / "wandb")
    assert [row["curve/fd_identity"] for row in file.curve] == pytest.approx(
        [row["curve/fd_identity"] for row in table]
    )
