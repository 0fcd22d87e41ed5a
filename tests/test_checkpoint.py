"""What training leaves behind: resuming changes nothing, and a foreign checkpoint runs nothing."""

import errno
import os
import pickle
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffaccel.__main__ import main
from diffaccel.density import GaussianDensity
from diffaccel.errors import UsageError
from diffaccel.evaluation import Evaluator
from diffaccel.methods import Diffusion
from diffaccel.report import read_points
from diffaccel.run.checkpoint import Checkpointer, WholeFiles
from diffaccel.weights import file_sha256, read_weights, save_weights

IMAGES, BATCH = 1280, 64  # 20 steps
TINY = [
    *("network.widths=[8]", "network.attention=[]", "network.embedding=16", "network.dropout=0.1"),
    *(f"images={IMAGES}", f"training.batch_size={BATCH}", "training.warmup=300", "training.flip=true"),
    *("logger=none", "n=40", "nfe=2"),
]

pytestmark = pytest.mark.usefixtures("undrawn")
Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit that ran through."""
    out = tmp_path_factory.mktemp("whole")
    assert main(["fit", "digits/edm", *TINY, f"out={out}", "reference="]) == 0
    return out


def state(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.ckpt", weights_only=True)


def assert_equal(a: Any, b: Any) -> None:
    """Compare nested checkpoints to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 2], ids=str)
def test_an_interrupt_within_a_step_waits_for_its_end(
    whole: Path, signals: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
):
    """Nearly all of the time passes within steps. A second interrupt does not wait, and loses the step."""
    loss, calls = Diffusion.denoiser_loss, [0]

    def interrupted(self: Diffusion, *arguments: Any) -> Any:
        calls[0] += 1
        for number in signals if calls[0] == 7 else ():
            os.kill(os.getpid(), number)
        return loss(self, *arguments)

    monkeypatch.setattr(Diffusion, "denoiser_loss", interrupted)
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference="]
    assert main(words) == 130
    assert "interrupted: the fit ends after this step" in capsys.readouterr().err
    assert (tmp_path / "last.ckpt").exists() == (len(signals) == 1)
    if len(signals) == 1:
        assert state(tmp_path)["diffaccel"]["steps"] == 7
    assert main([*words, "resume=auto"]) == 0
    assert load_file(tmp_path / "ema.safetensors").keys() == load_file(whole / "ema.safetensors").keys()
    assert_equal(state(tmp_path)["state_dict"], state(whole)["state_dict"])


@pytest.mark.parametrize("steps", [[7], [1, 10]], ids=str)
def test_an_interrupted_fit_ends_where_a_whole_one_does(
    whole: Path, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
):
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference="]
    for step in steps:
        original = Checkpointer.on_train_batch_end

        def interrupt(self: Checkpointer, trainer: Any, module: Diffusion, *rest: Any, step: int = step) -> None:
            if module.steps == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(Checkpointer, "on_train_batch_end", interrupt)
        assert main([*words, "resume=auto"]) == 130
        assert "resume=auto" in capsys.readouterr().err
        monkeypatch.setattr(Checkpointer, "on_train_batch_end", original)
        assert state(tmp_path)["diffaccel"]["images_seen"] == step * BATCH
        assert not list(tmp_path.glob("*.safetensors")), "an unfinished run leaves no weights"
    assert main([*words, "resume=auto"]) == 0
    assert f"{IMAGES} images seen" in capsys.readouterr().err
    for key in ("state_dict", "diffaccel", "optimizer_states"):
        assert_equal(state(tmp_path)[key], state(whole)[key])
    for name in ("raw", "ema"):
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), load_file(whole / f"{name}.safetensors"))


def test_a_finished_run_takes_no_step_more(whole: Path, tmp_path: Path):
    last = whole / "last.ckpt"
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference=", f"resume={last}"]
    assert main(words) == 0
    assert_equal(state(tmp_path)["diffaccel"], state(whole)["diffaccel"])
    assert main([*words[:-2], f"out={tmp_path / 'longer'}", "reference=", f"images={2 * IMAGES}", words[-1]]) == 0
    assert state(tmp_path / "longer")["diffaccel"]["images_seen"] == 2 * IMAGES, "a longer budget goes on"


def test_hours_are_those_of_all_the_runs(whole: Path, tmp_path: Path):
    content = state(whole)
    content["callbacks"]["Checkpointer"]["seconds"] += 7200
    torch.save(content, tmp_path / "long.ckpt")
    assert main(["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference=", f"resume={tmp_path / 'long.ckpt'}"]) == 0
    hours = read_weights(tmp_path / "raw.safetensors")[1]["hours"]
    assert 2 <= hours < 2.2 and state(tmp_path)["callbacks"]["Checkpointer"]["seconds"] >= 7200


def test_the_weights_are_the_states_in_half_the_bytes(whole: Path):
    content = state(whole)
    network = {key.removeprefix("denoiser._network."): value for key, value in content["state_dict"].items()}
    raw, story = read_weights(whole / "raw.safetensors")
    averaged, averaged_story = read_weights(whole / "ema.safetensors")
    assert_equal(raw, {key: value.bfloat16().float() for key, value in network.items()})
    average = {key.removeprefix("denoiser."): value for key, value in content["diffaccel"]["ema"].items()}
    assert_equal(averaged, {key: value.bfloat16().float() for key, value in average.items()})
    assert (story["averaged"], averaged_story["averaged"]) == (False, True)
    assert story["images_seen"] == IMAGES and story["experiment"] == "digits/edm" and story["seed"] == 0


def test_weights_and_checkpoint_load_back_in_bench(whole: Path, tmp_path: Path):
    words = ["bench", "digits/edm", *TINY, f"out={tmp_path}"]
    for file in ("ema.safetensors", "last.ckpt"):
        assert main([*words, f"checkpoint={whole / file}"]) == 0
    first, second = read_points(tmp_path / "points.jsonl")
    assert first["checkpoint"]["images_seen"] == second["checkpoint"]["images_seen"] == IMAGES
    assert first["checkpoint"]["sha256"] != second["checkpoint"]["sha256"]
    name = "fd_digits"
    assert first["metrics"][name] == pytest.approx(second["metrics"][name], rel=0.05), "bf16 against fp32"


def test_a_fit_begins_with_weights_that_it_is_given(whole: Path, tmp_path: Path, capsys: Printed):
    """At a rate next to 0 they stay: the file's, to the last bit, and no random ones."""
    for name in ("ema.safetensors", "last.ckpt"):
        words = [*TINY, "reference=", f"images={BATCH}", "training.lr=1e-30", f"out={tmp_path / name}"]
        assert main(["fit", "digits/edm", *words, f"init={whole / name}"]) == 0
        found, description = read_weights(tmp_path / name / "raw.safetensors")
        assert_equal(found, load_file(whole / "ema.safetensors"))
        assert description["init_sha256"] == file_sha256(whole / name)
    assert main(["fit", "digits/edm", *TINY, f"init={tmp_path / 'none.safetensors'}", f"out={tmp_path / 'no'}"]) == 2
    assert "none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("experiment", ["digits/dlg", "digits/small_t", "toy/tdpm", "digits/extractor"])
def test_a_fit_of_no_denoiser_begins_with_none(experiment: str, whole: Path, tmp_path: Path, capsys: Printed):
    words = [f"init={whole / 'ema.safetensors'}", f"out={tmp_path}", "logger=none"]
    assert main(["fit", experiment, *words]) == 2
    assert "init: this fit trains no denoiser" in capsys.readouterr().err


class Malicious:
    """Unpickles into a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path: Path, capsys: Printed):
    trace, files = tmp_path / "executed", [tmp_path / "zip.ckpt", tmp_path / "bare.ckpt"]
    torch.save({"diffaccel": Malicious(trace), "state_dict": {}}, files[0])
    files[1].write_bytes(pickle.dumps(Malicious(trace), protocol=2))
    for file in files:
        for words in (["bench", f"checkpoint={file}"], ["fit", f"resume={file}"], ["sample", f"checkpoint={file}"]):
            capsys.readouterr()
            assert main([words[0], "digits/edm", *TINY, f"out={tmp_path / 'out'}", words[1]]) == 2
            error = capsys.readouterr().err
            assert str(file) in error and "never run" in error and "Traceback" not in error
    assert not trace.exists()
    pickle.loads(files[1].read_bytes())
    assert trace.exists(), "the trap works"


def test_other_files_are_refused(whole: Path, tmp_path: Path, capsys: Printed):
    content = (whole / "last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save({"state_dict": {}, "diffaccel": {"images_seen": 1, "steps": 1}}, tmp_path / "nothing.ckpt")
    for file in sorted(tmp_path.glob("*.ckpt")):
        for words in (["bench", f"checkpoint={file}"], ["fit", f"resume={file}"]):
            capsys.readouterr()
            assert main([words[0], "digits/edm", *TINY, f"out={tmp_path / 'out'}", words[1]]) == 2
            error = capsys.readouterr().err
            assert str(file) in error and error.count("\n") == 1


def test_a_checkpoint_appears_whole_or_not_at_all(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
):
    """A write that breaks off leaves the last checkpoint as it was, and the run one line."""
    last = tmp_path / "last.ckpt"
    last.write_bytes(b"good")

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match=r"last.ckpt can't be written \(No space left on device\): make room"):
        WholeFiles().save_checkpoint(state(whole), last)
    assert last.read_bytes() == b"good" and os.listdir(tmp_path) == ["last.ckpt"]
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path / 'fit'}", "reference=", "resume=auto"]
    assert main([*words, f"images={BATCH}"]) == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said
    assert not list(tmp_path.glob("fit/*.ckpt*"))


def test_weights_that_are_nan_are_not_gone_on_from(whole: Path, tmp_path: Path, capsys: Printed):
    for part in ("ema", "state_dict"):
        content = state(whole)
        tensors = content["diffaccel"]["ema"] if part == "ema" else content["state_dict"]
        name = next(name for name in tensors if name.endswith("weight"))
        tensors[name].view(-1)[0] = torch.nan
        torch.save(content, tmp_path / "nan.ckpt")
        words = ["digits/edm", *TINY, f"out={tmp_path / 'out'}"]
        for run in (["fit", f"resume={tmp_path / 'nan.ckpt'}"], ["bench", f"checkpoint={tmp_path / 'nan.ckpt'}"]):
            if run[0] == "bench" and part == "state_dict":
                continue  # the average is what samples
            capsys.readouterr()
            assert main([run[0], *words, run[1]]) == 2
            said = " ".join(capsys.readouterr().err.split())
            assert "nan.ckpt" in said and f"{name.removeprefix('denoiser.')}'" in said and "NaN" in said
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_settings_that_it_had(whole: Path, tmp_path: Path, capsys: Printed):
    """Else one seed's weights would be kept under another's name."""
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path / 'out'}", "reference=", f"resume={whole / 'last.ckpt'}"]
    for changed, said in (
        ("seed=1", "seed=0, but this run has 1"),
        ("denoiser.sigma_data=0.5", "denoiser="),
        ("levels.mean=0.5", "levels="),
        ("limit=100", "training_images={'n': 1437, "),
    ):
        assert main([*words, changed]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert main([*words, "network.dropout=0.2", f"images={IMAGES + BATCH}"]) == 0, "this is a setting of the training"


@pytest.mark.parametrize(
    ("fit", "changed", "said"),
    [
        (["edm", "network.classes=10", "training.label_drop=0"], "training.label_drop=0.1", "label_drop=0.0, but"),
        (["edm"], "training.flip=false", "training.flip=True, but this run has False"),
        (["ddm"], "method.weighting=later", "method.weighting=unit, but this run has later"),
        (["ddm", "method.weighting=later"], "method.l1=true", "method.l1=False, but this run has True"),
        (["small_t_trained", "prior.init=null"], "method.weighting=likelihood", "method.weighting=sigma, but"),
        (["tdpm", "method.critic.channel_base=8"], "method.gamma=5", "method.gamma=0.1, but this run has 5"),
    ],
)
def test_a_fit_is_resumed_with_its_own_loss(fit: list[str], changed: str, said: str, tmp_path: Path, capsys: Printed):
    """A state of an earlier version does not record it; learning rates may change."""
    words = ["fit", f"digits/{fit[0]}", *TINY, "reference=", f"images={BATCH}", f"out={tmp_path}", "resume=auto"]
    assert main([*words, *fit[1:]]) == 0
    capsys.readouterr()
    assert main([*words, *fit[1:], changed]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    lr = ["training.lr=0.01", *(["method.critic_lr=3.0"] if fit[0] == "tdpm" else [])]
    assert main([*words, *fit[1:], *lr, f"images={2 * BATCH}"]) == 0
    content = state(tmp_path)
    del content["diffaccel"]["recipe"]
    content["diffaccel"]["description"].pop("label_drop", None)
    torch.save(content, tmp_path / "last.ckpt")
    assert main([*words, *fit[1:], changed, f"images={3 * BATCH}"]) == 0


def test_a_command_after_the_end_of_a_fit_keeps_its_header(whole: Path, tmp_path: Path, monkeypatch):
    """It trains nothing: the files have the device, version, command and half-life of the run that made the weights."""
    shutil.copy(whole / "last.ckpt", tmp_path)
    monkeypatch.setattr("diffaccel.run.checkpoint.device_name", lambda device: "another device")
    monkeypatch.setattr("diffaccel.run.checkpoint.__version__", "99")
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference=", "resume=auto", "training.lr=0.5"]
    for _ in range(2):
        assert main([*words, "training.ema_half_life=77"]) == 0
        for name in ("raw", "ema"):
            (tensors, header), (expected, told) = (
                read_weights(out / f"{name}.safetensors") for out in (tmp_path, whole)
            )
            assert header == told and told["device"] != "another device" and "lr" not in told["command"]
            assert_equal(tensors, expected)
    assert main([*words, "training.ema_half_life=77", f"images={IMAGES + BATCH}"]) == 0
    header = read_weights(tmp_path / "ema.safetensors")[1]
    assert header["device"] == "another device" and header["version"] == "99" and header["ema_half_life"] == 77


@pytest.mark.parametrize("size", [2 * BATCH, 3 * BATCH, BATCH // 4, 10 * BATCH])
def test_another_batch_size_goes_on_at_the_next_image(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every position of the training stream is trained once, in order."""
    seen: list[int] = []
    step = Diffusion.training_step

    def spy(self: Diffusion, batch: Any, batch_idx: int) -> None:
        if self.images_seen == stop:
            raise KeyboardInterrupt
        seen.extend(batch.index.tolist())
        step(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", spy)
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference=", "resume=auto"]
    stop = 7 * BATCH
    assert main(words) == 130
    stop = -1
    assert main([*words, f"training.batch_size={size}"]) == 0
    assert seen == list(range(len(seen))) and IMAGES <= len(seen) < IMAGES + size
    assert state(tmp_path)["diffaccel"]["images_seen"] == len(seen)


def test_hours_include_the_fit_of_a_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now, fit = [0.0], GaussianDensity.fit

    def slow(self: GaussianDensity, images: Any) -> None:
        now[0] += 7200
        fit(self, images)

    monkeypatch.setattr(GaussianDensity, "fit", slow)
    monkeypatch.setattr("diffaccel.run.checkpoint.time", SimpleNamespace(monotonic=lambda: now[0]))
    words = ["fit", "digits/small_t", "logger=none", "reference=", f"out={tmp_path}", "resume=auto"]
    for _ in range(2):  # the second command trains nothing
        assert main(words) == 0
        assert read_weights(tmp_path / "density.safetensors")[1]["hours"] == 2.0
        now[0] += 3600


@pytest.mark.parametrize("moved", [False, True])
def test_the_best_state_stays_the_best_in_another_folder(moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Distances 5 and 1 before the interrupt, 8 after it, in the folder of the run or where it was moved to."""
    distances, measure = iter([5.0, 1.0, *[8.0] * 9]), Evaluator.measure

    def measured(self: Evaluator, *arguments: Any, **options: Any) -> dict[str, Any]:
        point = measure(self, *arguments, **options)
        point["metrics"][self.extractor.metric_name] = next(distances)
        return point

    def interrupt(self: Checkpointer, trainer: Any, module: Diffusion, *_: Any) -> None:
        if module.steps == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "measure", measured)
    words = ["fit", "digits/edm", *TINY, "n=20", "training.evaluate_every=320", "training.evaluate_n=20"]
    words += ["training.keep_best=2", "resume=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "on_train_batch_end", interrupt)
        assert main([*words, f"out={tmp_path / 'first'}"]) == 130
    out = (tmp_path / "first").rename(tmp_path / "second") if moved else tmp_path / "first"
    assert main([*words, f"out={out}"]) == 0
    assert torch.load(out / "best.ckpt", weights_only=True)["diffaccel"]["images_seen"] == 640


@pytest.mark.parametrize(
    ("fit", "changed", "said"),
    [
        (["digits/edm", *TINY[:3]], "data.path={}/b.npz", "training_images={'n': 40, "),
        (["digits/edm", *TINY[:3]], "data.test_share=0.3", "training_images={'n': 40, "),
        (["digits/small_t"], "data.path={}/b.npz", "training_images={'n': 40, "),
        (["digits/dlg"], "posterior.ratio_max=20", "posterior="),
        (["digits/extractor", "method.epochs=1", "method.dim=4", "method.widths=[4]"], "data.path={}/b.npz", "sha256="),
    ],
)
def test_a_fit_is_resumed_on_its_own_images(fit: list[str], changed: str, said: str, tmp_path: Path, capsys: Printed):
    """Whatever the name of the file; a state of an earlier version does not record them."""
    labels = np.arange(40) % 10
    for seed, name in enumerate("ab"):
        images = np.random.default_rng(seed).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels)
    shutil.copy(tmp_path / "a.npz", tmp_path / "moved.npz")
    words = ["fit", *fit, "data=npz", f"data.path={tmp_path}/a.npz", f"data.test_path={tmp_path}/a.npz", "logger=none"]
    words += ["reference=", f"out={tmp_path / 'out'}", "resume=auto"]
    words += ["method.batch_size=20"] if fit[0] == "digits/extractor" else ["images=64", "training.batch_size=32"]
    assert main([*words]) == 0
    assert main([*words, f"data.path={tmp_path}/moved.npz"]) == 0
    capsys.readouterr()
    split = ["data.test_path=null"] if "test_share" in changed else []
    assert main([*words, *split, changed.format(tmp_path)]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")
    content = state(tmp_path / "out")
    own = content["diffaccel"].get("extractor") or content["diffaccel"]["description"]
    for key in ("training_images", "images_sha256", "levels", "posterior"):
        own.pop(key, None)
    torch.save(content, tmp_path / "out" / "last.ckpt")
    assert main([*words, *split, changed.format(tmp_path)]) == 0


@pytest.mark.parametrize("held_out", [0, 1])
def test_a_fit_without_held_out_images_ends_with_its_weights(held_out: int, tmp_path: Path, capsys: Printed):
    rng = np.random.default_rng(0)
    for name, n in (("train", 40), ("test", held_out)):
        images = rng.integers(0, 256, (max(n, 1), 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(len(images)) % 2)
    words = ["data=npz", f"data.path={tmp_path}/train.npz", "logger=none", "reference=", "images=32"]
    words += ["training.batch_size=32", *([f"data.test_path={tmp_path}/test.npz"] if held_out else [])]
    for method, file in (("small_t", "density"), ("dlg", "classifier")):
        assert main(["fit", f"digits/{method}", *words, f"out={tmp_path / method}"]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert (tmp_path / method / f"{file}.safetensors").is_file() and "BELOW" not in said and "nan" not in said
        if method == "small_t" or not held_out:
            assert "not tested, because train.npz has" in said
    if not held_out:
        assert main(["fit", "digits/extractor", *words[:4], "method.batch_size=20", f"out={tmp_path / 'judge'}"]) == 2
        assert "has no test split" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "judge" / "last.ckpt").exists(), "it has trained"


def test_a_header_names_the_data_by_their_label(whole: Path):
    assert read_weights(whole / "ema.safetensors")[1]["data"] == "digits 8x8"


def test_weights_of_another_fit_are_not_overwritten(whole: Path, tmp_path: Path, capsys: Printed):
    fit = ["fit", "digits/edm", *TINY, "reference=", f"images={BATCH}", f"out={tmp_path}"]
    assert main(fit) == 0
    before = (tmp_path / "ema.safetensors").read_bytes()
    for missing, words in (
        ("", ["seed=1"]),
        ("", ["seed=1", "resume=auto"]),
        ("", [f"resume={whole / 'last.ckpt'}"]),
        ("last.ckpt", ["seed=1"]),
        ("", ["seed=1", "resume=auto"]),
    ):
        if missing:
            (tmp_path / missing).unlink()
        capsys.readouterr()
        assert main([*fit, *words]) == 2, words
        said = capsys.readouterr().err
        assert str(tmp_path) in said and "another out=" in said
    assert (tmp_path / "ema.safetensors").read_bytes() == before


def test_names_that_are_taken_are_found_before_training(tmp_path: Path, capsys: Printed, monkeypatch):
    monkeypatch.setattr(Diffusion, "training_step", lambda *_: pytest.fail("it trained"))
    fit = ["fit", "digits/edm", *TINY, "reference=", f"out={tmp_path}"]
    for name in ("last.ckpt", "ema.safetensors", "config.yaml"):
        (tmp_path / name).mkdir()
        assert main(fit) == 2
        said = capsys.readouterr().err
        assert name in said and said.count("diffaccel: ") == 1 and "Traceback" not in said
        (tmp_path / name).rmdir()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert main(fit) == 2
    assert "MB free" in capsys.readouterr().err


def test_dlg_goes_on_without_a_copy_of_its_denoiser(tmp_path: Path, capsys: Printed) -> None:
    words = ["fit", "digits/dlg", "logger=none", "reference=", "n=200", f"out={tmp_path}"]
    assert main([*words, "images=1280"]) == 0
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["state_dict"] and not any(name.startswith("denoiser.") for name in state["state_dict"])
    assert main([*words, "images=2560", "resume=auto"]) == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["diffaccel"]["images_seen"] == 2560
    tensors, said = read_weights(Path("experiments/digits/weights/edm.safetensors"))
    other = tmp_path / "other.safetensors"
    save_weights(other, {name: 1.1 * tensor for name, tensor in tensors.items()}, said)
    assert main([*words, "images=3840", "resume=auto", f"checkpoint={other}"]) == 2
    assert "another denoiser" in capsys.readouterr().err


def test_an_interrupt_within_a_step_keeps_the_last_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffaccel.training.ema.EMA.update", interrupt)  # after the optimiser, before the end
    assert main(["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference="]) == 130
    assert not (tmp_path / "last.ckpt").exists()


def test_averages_of_other_networks_are_refused(whole: Path, tmp_path: Path, capsys):
    content = state(whole)
    average = content["diffaccel"]["ema"]
    content["diffaccel"]["ema"] = {key.replace("denoiser.", "generator."): value for key, value in average.items()}
    torch.save(content, tmp_path / "other.ckpt")
    words = ["fit", "digits/edm", *TINY, f"out={tmp_path}", "reference=", f"resume={tmp_path / 'other.ckpt'}"]
    assert main(words) == 2
    assert "contains averages of other networks" in " ".join(capsys.readouterr().err.split())
    assert main(["bench", "digits/edm", f"checkpoint={tmp_path / 'other.ckpt'}", "n=10", "logger=none"]) == 2
    assert "holds no averaged denoiser" in " ".join(capsys.readouterr().err.split())
