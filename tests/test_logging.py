"""What training and benches tell the loggers, and that all loggers are told the same."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_evaluator import wandb_records

from diffaccel.__main__ import main
from diffaccel.methods import Diffusion, TrainedModule
from diffaccel.report import read_points
from diffaccel.sampling import Sampler
from diffaccel.training.ema import EMA

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = ["network.widths=[8]", "network.attention=[]", "network.embedding=16", "training.batch_size=32"]
FIT = [*TINY, "digits/edm", "images=320", "training.warmup=1", "n=60", "nfe=[3,5]", "training.log_every=1", "threads=1"]


def fit(out: Path, *words: str) -> int:
    experiment = next(word for word in FIT if word.startswith("digits/"))
    return main(["fit", experiment, *(word for word in FIT if word != experiment), *words, f"out={out}"])


def csv_rows(out: Path) -> list[dict[str, float]]:
    rows = []
    for file in sorted(out.glob("csv/version_*/metrics.csv")):
        with file.open() as stream:
            rows += [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(stream)]
    return rows


def history(out: Path) -> tuple[list[Any], list[dict[str, float]]]:
    """All of a folder's offline W&B records, and the rows among them."""
    records = [r for file in sorted(out.glob("wandb/offline-run-*/run-*.wandb")) for r in wandb_records(file)]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    return records, rows


# While training goes on

SCHEDULE = ["training.evaluate_every=100", "training.evaluate_n=40"]


def test_budgets_are_measured_on_schedule_with_the_averaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    average: dict[str, torch.Tensor] = {}
    from diffaccel.evaluation import Evaluator

    measure, update = Evaluator.measure, EMA.update

    def record(self: EMA, images: int, images_seen: int) -> None:
        update(self, images, images_seen)
        average.update({name: value.clone() for name, value in self.average.items()})

    methods: list[Diffusion] = []
    start = TrainedModule.on_fit_start

    def note(self: TrainedModule) -> None:
        start(self)
        methods.append(self)

    def spy(self: Evaluator, sampler: Sampler, budget: float, plan: Any, n: int | None = None, **named: Any) -> Any:
        (method,) = methods
        assert method.ema is not None and not method.training
        for name, value in method.denoiser.network.named_parameters():
            assert torch.equal(value, average[f"denoiser.{name}"]), "the average as of the last step"
        raw = method.ema.average  # which it holds while the average is in the network
        assert not all(torch.equal(raw[name], value) for name, value in average.items())
        seen.append((method.images_seen, n or self.n))
        return measure(self, sampler, budget, plan, n, **named)

    monkeypatch.setattr(EMA, "update", record)
    monkeypatch.setattr(TrainedModule, "on_fit_start", note)
    monkeypatch.setattr(Evaluator, "measure", spy)
    assert fit(tmp_path, *SCHEDULE, "logger=csv") == 0
    assert seen == [(images, 40) for images in (96, 192, 288, 320) for _ in "35"] + [(320, 60)] * 2
    rows = [row for row in csv_rows(tmp_path) if "eval/nfe_003/fd_digits" in row]
    assert len(rows) == 4, "the last step is measured too"
    for row in rows:
        assert row["eval/nfe_003/nfe"] == 3 and row["eval/nfe_005/nfe"] == 5
        assert {"eval/nfe_005/fd_digits", "eval/nfe_005/kid"} <= row.keys()


def test_evaluating_on_the_way_changes_no_weight(tmp_path: Path):
    assert fit(tmp_path / "with", *SCHEDULE, "logger=none") == 0
    assert fit(tmp_path / "without", "logger=none") == 0
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("with", "without")]
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name]), name


def test_the_best_state_is_kept_and_can_be_benched(tmp_path: Path):
    assert fit(tmp_path, *SCHEDULE, "training.keep_best=5", "logger=csv") == 0
    distances = [row["eval/nfe_005/fd_digits"] for row in csv_rows(tmp_path) if "eval/nfe_005/fd_digits" in row]
    best = torch.load(tmp_path / "best.ckpt", weights_only=True)["diffaccel"]
    assert best["images_seen"] == (96, 192, 288, 320)[distances.index(min(distances))]
    words = [word for word in TINY if "batch" not in word]
    bench = ["bench", "digits/edm", *words, f"checkpoint={tmp_path / 'best.ckpt'}", "n=20", "nfe=3", "logger=none"]
    assert main([*bench, f"out={tmp_path / 'bench'}"]) == 0
    assert read_points(tmp_path / "bench" / "points.jsonl")[0]["checkpoint"]["images_seen"] == best["images_seen"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["training.evaluate_every=10"], "below training.batch_size"),
        (["training.keep_best=5"], "set training.evaluate_every"),
        ([*SCHEDULE, "training.keep_best=7"], "not among the budgets"),
    ],
)
def test_a_mistake_in_the_schedule(tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]):
    assert fit(tmp_path, *words, "logger=none") == 2
    assert named in capsys.readouterr().err


# Loggers


def test_all_loggers_are_told_the_same(tmp_path: Path):
    for logger in ("csv", "tensorboard", "wandb"):
        assert fit(tmp_path / logger, *SCHEDULE, f"logger={logger}") == 0
    events = EventAccumulator(str(next((tmp_path / "tensorboard").glob("tensorboard/version_0"))))
    events.Reload()
    board = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    rows, (_, runs) = csv_rows(tmp_path / "csv"), history(tmp_path / "wandb")
    names = {key for row in rows for key in row if key.startswith(("eval/", "curve/", "train/denoiser"))}
    assert {"train/denoiser_loss", "eval/nfe_005/fd_digits", "curve/nfe", "curve/fd_digits"} <= names
    for name in names - {"curve/seconds_per_image"}:
        expected = [row[name] for row in rows if name in row]
        assert [row[name] for row in runs if name in row] == pytest.approx(expected, rel=1e-5), name
        assert board[name] == pytest.approx(expected, rel=1e-5), name


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loss, calls = Diffusion.denoiser_loss, [0]

    def interrupted(self: Diffusion, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 15:
            raise KeyboardInterrupt
        return loss(self, *arguments)

    monkeypatch.setattr(Diffusion, "denoiser_loss", interrupted)
    words = ["logger=wandb", "training.checkpoint_minutes=0.0001", "images=640"]
    assert fit(tmp_path, *words) == 130
    if not (tmp_path / "last.ckpt").is_file():
        pytest.fail("nothing to go on from")
    assert fit(tmp_path, *words, "resume=auto") == 0
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1


def test_wandb_has_configuration_table_and_weights(tmp_path: Path):
    assert fit(tmp_path, "logger=wandb") == 0
    records, rows = history(tmp_path)
    config: dict[str, Any] = {}
    for record in records:
        for update in [*record.run.config.update, *record.config.update]:
            config[update.key or ".".join(update.nested_key)] = json.loads(update.value_json)
    assert config["training"]["images"] == 320 and config["method"]["label"] == "edm"
    assert config["provenance"]["experiment"] == "digits/edm"
    assert any("points" in row or "points._type" in row for row in rows), "the table"
    kept = {record.request.log_artifact.artifact.name or record.artifact.name for record in records}
    assert {"digits-edm-raw", "digits-edm-ema"} <= kept
