"""Order of the fits of a folder, and running those that are missing."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from diffaccel.__main__ import main
from diffaccel.config import load
from diffaccel.errors import UsageError
from diffaccel.experiment import build_data
from diffaccel.experiment.order import Fit, plan
from diffaccel.training.ema import EMA
from diffaccel.verbs.train import train
from diffaccel.weights import read_weights, save_weights

IMAGES, BATCH = 320, 16
TINY = ["logger=none", "reference=", f"images={IMAGES}", f"training.batch_size={BATCH}", "training.log_every=1"]
NETWORK = {"name": "unet", "widths": [8, 16], "blocks": 1, "embedding": 16}


def write(folder: Path, **experiments: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in experiments.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Names of experiments whose order in the alphabet is not that of their fits."""
    density = {
        "name": "density",
        "T": 0.4,
        "density": {"name": "gaussian"},
        "checkpoint": "weights/density.safetensors",
    }
    chain = {"name": "chain", "chains": 4, "init_steps": 5, "warmup": [[5, None]]}
    posterior = {"name": "classifier", "count": 20, "width": 4, "checkpoint": "weights/classifier.safetensors"}
    return write(
        tmp_path / "own",
        base={"data": "digits", "shape": [1, 8, 8], "network": NETWORK, "n": 20},
        score={"base": "base.yaml", "method": "diffusion", "checkpoint": "weights/score.safetensors"},
        best={"base": "score.yaml", "method": {"name": "diffusion", "label": "best"}},
        a_density={
            "base": "score.yaml",
            "method": {"name": "small_t", "frozen": True},
            "process": "vp",
            "prior": density,
        },
        a_chain={"base": "score.yaml", "method": "dlg", "posterior": posterior, "prior": chain},
    )


def names(fits: Sequence[Fit]) -> list[str]:
    return [fit.name for fit in fits]


def test_fits_follow_those_that_they_need(folder: Path, tmp_path: Path):
    fits = plan(str(folder), tmp_path / "runs")
    assert names(fits) == ["score", "a_chain", "a_density"], "best inherits the weights of score"
    assert [len(fit.needs) for fit in fits] == [0, 1, 1]
    assert not any(fit.done or fit.begun for fit in fits)
    score = tmp_path / "runs" / "score" / "ema.safetensors"
    assert fits[1].words() == [f"out={tmp_path / 'runs' / 'a_chain'}", "resume=auto", f"checkpoint={score}"]
    outputs = {made.key: made.left.name for fit in fits for made in fit.makes}
    assert outputs == {
        "checkpoint": "ema.safetensors",
        "posterior.checkpoint": "classifier.safetensors",
        "prior.checkpoint": "density.safetensors",
    }


def test_weights_that_the_settings_name_are_not_fitted(folder: Path, tmp_path: Path):
    """Neither is the experiment's own path fitted, nor does a fit get a path after that of the settings."""
    save_weights(tmp_path / "mine.safetensors", {}, {"kind": "denoiser", "images_seen": 1})
    fits = plan(str(folder), tmp_path / "runs", settings=[f"checkpoint={tmp_path / 'mine.safetensors'}"])
    assert names(fits) == ["a_chain", "a_density"] and not any(fit.needs for fit in fits)
    assert fits[0].words() == [f"out={tmp_path / 'runs' / 'a_chain'}", "resume=auto"]
    with pytest.raises(UsageError, match=r"checkpoint=.*none.safetensors does not exist"):
        plan(str(folder), tmp_path / "runs", settings=[f"checkpoint={tmp_path / 'none.safetensors'}"])
    assert names(plan(str(folder), tmp_path / "runs", ["a_density"], ["prior=gaussian"])) == ["score"]


@pytest.mark.parametrize("given", ["score,a_chain", "[score, a_chain]", "['score','a_chain']"])
def test_several_methods_are_given_as_a_list(folder: Path, tmp_path: Path, capsys, given: str):
    assert main(["train", str(folder), f"methods={given}", f"out={tmp_path / 'runs'}", "dry_run=true"]) == 0
    assert capsys.readouterr().out.count("diffaccel fit") == 2


def test_only_what_is_asked_for_and_needed(folder: Path, tmp_path: Path):
    assert names(plan(str(folder), tmp_path, ["a_density"])) == ["score", "a_density"]
    assert names(plan(str(folder), tmp_path, ["best"])) == ["score"]
    with pytest.raises(UsageError, match="no experiment 'bset'; did you mean 'best'"):
        plan(str(folder), tmp_path, ["bset"])


def test_shipped_weights_are_done_and_read_from_where_they_are(folder: Path, tmp_path: Path):
    save_weights(folder / "weights" / "score.safetensors", {}, {"kind": "denoiser", "images_seen": 1})
    fits = plan(str(folder), tmp_path)
    assert [fit.done for fit in fits] == [True, False, False]
    assert fits[1].words() == [f"out={tmp_path / 'a_chain'}", "resume=auto"]


def test_placed_weights_of_a_shorter_fit_are_kept_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A longer fit that is asked for is not run over them, which is said."""
    said = {"kind": "denoiser", "images_seen": 100, "steps": 10}
    for file in (folder / "weights" / "score.safetensors", tmp_path / "score" / "ema.safetensors"):
        save_weights(file, {}, said)
    for images, named in ((100, False), (400, True)):
        train(str(folder), [f"images={images}"], ["score"], out=str(tmp_path), dry_run=True)
        found = " ".join(capsys.readouterr().err.split())
        assert ("score.safetensors: fitted on 100 images, fewer than images=400, and kept" in found) == named


def test_weights_of_other_images_end_the_plan(folder: Path, tmp_path: Path):
    said = {"kind": "denoiser", "images_seen": 320, "steps": 10, "data": "digits 8x8"}
    for limit in (None, 500):
        config = load(str(folder / "score.yaml"), [] if limit is None else [f"limit={limit}"])
        said["training_images"] = build_data(config).identify()
        save_weights(tmp_path / "score" / "ema.safetensors", {}, said)
        settings = ["images=320", f"limit={limit or 'null'}"]
        assert plan(str(folder), tmp_path, settings=settings)[0].done
    with pytest.raises(
        UsageError, match="trained on 500 images of 'digits 8x8', which are not the 1,437 of .*: remove"
    ):
        plan(str(folder), tmp_path, settings=["images=320"])


@pytest.mark.parametrize(("seen", "steps", "done"), [(100, 10, False), (320, 10, True), (400, 10, True), (57, 0, True)])
def test_weights_of_a_shorter_fit_are_not_done(folder: Path, tmp_path: Path, seen: int, steps: int, done: bool):
    """A density in closed form takes no step, and has seen as many images as there are."""
    said = {"images_seen": seen, "steps": steps}
    save_weights(tmp_path / "score" / "ema.safetensors", {}, {"kind": "denoiser", **said})
    assert plan(str(folder), tmp_path, settings=["images=320"])[0].done is done


def test_fits_in_a_circle_are_refused(tmp_path: Path):
    base = {"data": "digits", "shape": [1, 8, 8], "network": NETWORK, "process": "vp"}
    prior = {"name": "density", "T": 0.4, "checkpoint": "d.safetensors"}
    write(
        tmp_path,
        a={**base, "method": "diffusion", "checkpoint": "a.safetensors", "prior": prior},
        d={**base, "method": {"name": "small_t", "frozen": True}, "checkpoint": "a.safetensors", "prior": prior},
    )
    with pytest.raises(UsageError, match=r"need each other's weights \(a -> d -> a\)"):
        plan(str(tmp_path), tmp_path / "runs")


def test_weights_that_nothing_makes_are_named(tmp_path: Path):
    base = {"data": "digits", "shape": [1, 8, 8], "network": NETWORK, "process": "vp"}
    prior = {"name": "density", "T": 0.4, "checkpoint": "d.safetensors"}
    frozen = {"name": "small_t", "frozen": True}
    write(tmp_path, d={**base, "method": frozen, "checkpoint": "other.safetensors", "prior": prior})
    with pytest.raises(UsageError, match=r"checkpoint=.*other.safetensors does not exist"):
        plan(str(tmp_path), tmp_path / "runs")


@pytest.mark.parametrize("data", ["digits", "toy", "cifar10_small"])
def test_everything_that_ships_is_done(data: str):
    fits = plan(data)
    assert fits and all(fit.done for fit in fits)


def test_cifar10_mid_is_missing_in_order():
    fits = {fit.name: fit for fit in plan("cifar10_mid")}
    assert fits.keys() == {"edm", "ddm", "tdpm_shared", "tdpm", "dlg", "small_t", "small_t_flow"}
    order = [*fits]
    for name in ("tdpm", "dlg", "small_t", "small_t_flow"):
        assert order.index("edm") < order.index(name)
        assert [made.left.name for made in fits[name].needs] == ["ema.safetensors"]
    with pytest.raises(UsageError, match="'cifar10_mod' is no folder.*did you mean 'cifar10_mid'"):
        plan("cifar10_mod")


# train


def test_a_failure_ends_the_run_and_the_rest_goes_on(folder: Path, tmp_path: Path):
    """The other fits would read weights that there are not."""
    ran: list[str] = []

    def run(words: Sequence[str]) -> int:
        ran.append(Path(words[1]).stem)
        out = next(Path(word[4:]) for word in words if word.startswith("out="))
        if len(ran) == 2:
            return 2
        name = {"score": "ema", "a_chain": "classifier", "a_density": "density"}[out.name]
        save_weights(out / f"{name}.safetensors", {}, {"images_seen": IMAGES})
        return 0

    with pytest.raises(UsageError, match="a_chain.yaml failed"):
        train(str(folder), TINY, out=str(tmp_path), run=run)
    assert ran == ["score", "a_chain"]
    train(str(folder), TINY, out=str(tmp_path), run=run)
    assert ran == ["score", "a_chain", "a_chain", "a_density"]
    train(str(folder), TINY, out=str(tmp_path), run=run)
    assert len(ran) == 4, "nothing is left"


def test_an_interrupt_in_the_middle_changes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Interrupted in step 13, the first fit resumes after step 10, and ends with the weights of a whole one."""
    words = [*TINY, "training.ema_half_life=4,8", "training.checkpoint_minutes=1e-9"]
    whole = train(str(folder), words, out=str(tmp_path / "whole"), run=main)
    assert [fit.done for fit in whole] == [False, False, False]
    update, calls = EMA.update, []

    def interrupt(self: EMA, images: int, seen: int) -> None:
        update(self, images, seen)
        calls.append(seen)
        if len(calls) == 2 * 13:
            raise KeyboardInterrupt

    monkeypatch.setattr(EMA, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(str(folder), words, out=str(tmp_path / "parts"), run=main)
    monkeypatch.undo()
    kept = torch.load(tmp_path / "parts" / "score" / "last.ckpt", weights_only=True)["diffaccel"]
    assert (kept["steps"], kept["ema_half_life"], [*kept["ema_others"]]) == (10, 4, ["8"])
    left = plan(str(folder), tmp_path / "parts", settings=words)
    assert [(fit.done, fit.begun) for fit in left] == [(False, True), (False, False), (False, False)]
    train(str(folder), words, out=str(tmp_path / "parts"), run=main)
    for fit in whole:
        for made in fit.makes:
            other = tmp_path / "parts" / made.left.relative_to(tmp_path / "whole")
            one, two = read_weights(made.left)[0], read_weights(other)[0]
            assert one.keys() == two.keys() and all(bool((one[key] == two[key]).all()) for key in one), made
    capsys.readouterr()
    train(str(folder), words, out=str(tmp_path / "parts"), run=main, place=True)
    assert (folder / "weights" / "score.safetensors").read_bytes() == (
        tmp_path / "parts" / "score" / "ema.safetensors"
    ).read_bytes()
    assert main(["bench", str(folder / "a_density.yaml"), "nfe=5", "dry_run=true"]) == 0
    assert all(fit.done and not fit.words()[2:] for fit in plan(str(folder), tmp_path / "none"))


def test_an_extractor_has_no_settings_of_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    judges = [{"name": "small", "path": "weights/judge.safetensors"}]
    folder = write(
        tmp_path / "own",
        base={"data": "digits", "shape": [1, 8, 8], "network": NETWORK, "judges": judges},
        judge={"base": "base.yaml", "method": "extractor"},
        score={"base": "base.yaml", "method": "diffusion", "checkpoint": "weights/score.safetensors"},
    )
    words = ["images=64", "training.lr=0.1", "seed=1", "devices=2"]
    assert main(["train", str(folder), f"out={tmp_path}", "dry_run=true", *words]) == 0
    commands = {line.split()[2]: line for line in capsys.readouterr().out.splitlines() if " fit " in line}
    kept = {name: [word in commands[str(folder / f"{name}.yaml")] for word in words] for name in ("judge", "score")}
    assert kept == {"judge": [False, False, True, False], "score": [True, True, True, True]}


def test_a_dry_run_prints_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["train", str(folder), f"out={tmp_path}", "methods=a_density", "dry_run=true", "images=64"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [f"{folder / 'score.yaml'}: new", f"{folder / 'a_density.yaml'}: new (after score)"]
    assert printed[2] == f"diffaccel fit {folder / 'score.yaml'} images=64 out={tmp_path / 'score'} resume=auto"
    for words, said in (
        ([], "requires a folder"),
        ([str(folder), "place=perhaps"], "place=perhaps: give true or false"),
    ):
        assert main(["train", *words]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
