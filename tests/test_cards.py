"""Model cards: what headers, files and points say, and nothing that was measured with other weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffaccel.__main__ import main
from diffaccel.config import EXPERIMENTS
from diffaccel.noise import GENERATOR
from diffaccel.report import read_points
from diffaccel.report.cards import BUDGETS, Card, Distance, chosen_metric, markdown, read_cards
from diffaccel.report.judges import seen_by
from diffaccel.report.measured import same_settings
from diffaccel.report.points import normalised
from diffaccel.weights import file_sha256, save_weights

RESULTS = EXPERIMENTS / "cifar10_small" / "results"


@pytest.mark.parametrize("data", ["cifar10_small", "digits", "mnist", "toy"])
def test_a_card_has_what_the_file_has(data: str):
    cards = read_cards(data)
    assert [card.path for card in cards] == sorted((EXPERIMENTS / data / "weights").glob("*.safetensors"))
    text = markdown(cards)
    for card in cards:
        assert card.sha256 == file_sha256(card.path) and card.size == card.path.stat().st_size
        row = next(line for line in text.splitlines() if f"`{card.path.name}`" in line)
        assert f"{card.parameters:,}" in row and card.sha256[:12] in row
        if card.kind != "extractor":
            assert f"{card.header['images_seen']:,}" in row and f"diffaccel fit {card.header['experiment']}" in row


def test_parameters_are_those_of_the_network():
    sizes = {card.path.stem: card.parameters for card in read_cards("cifar10_small")}
    assert sizes["edm"] == sizes["ddm"] == sizes["tdpm"] == 2_523_724
    assert {card.path.stem: card.parameters for card in read_cards("digits")}["ddm"] == 325_364


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist has no results")
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("edm", {"name": "dpmpp2m"}),
        ("ddm", {"name": "bridge", "eta": 1.0}),
        ("tdpm_shared", {"name": "ddim"}),
        ("tdpm", {}),
    ],
)
def test_a_figure_is_that_of_the_experiments_own_settings(name: str, solver: dict[str, Any]):
    """Of the many solvers in edm/points.jsonl, that of the experiment; of two points, that with the present noise."""
    cards = {card.path.stem: card for card in read_cards("cifar10_small")}
    assert chosen_metric([*cards.values()]) == "fd_cifar10"
    points = read_points(RESULTS / name / "points.jsonl")
    for budget in BUDGETS:
        own = [
            seen_by(point, "cifar10")["metrics"]["fd_cifar10"]
            for point in sorted(points, key=lambda point: point.get("noise") != GENERATOR)
            if point["nfe_budget"] == budget and solver.items() <= point["settings"]["solver"].items()
        ]
        found = cards[name].distances["fd_cifar10"][budget]
        assert (found.value, found.n, found.seed) == (own[0], 5000, 900_001)
    assert not cards["edm"].path.with_stem("edm_raw").is_file() or not cards["edm_raw"].distances


def test_a_figure_of_another_number_of_images_states_it():
    """One column does not mix distances of 2,000 and 5,000 images: their biases differ."""

    def card(name: str, n: int) -> Card:
        distances = {"fd_x": {5.0: Distance(1.4, 0.02, n, 1), 10.0: Distance(1.2, None, n, 1)}}
        return Card(Path(name), {}, "0" * 64, 1, 1, None, distances)

    cards = [card("a", 5000), card("b", 2000), card("c", 5000)]
    text = markdown(cards)
    assert "| 1.4 ± 0.02 (n=2,000), 1.2 (n=2,000) |" in text and text.count("| 1.4 ± 0.02, 1.2 |") == 2
    assert "(5,000 images unless n is given, seed 1)" in text
    assert "(2,000 images, seed 1)" in markdown(cards[1:2]) and "(n=" not in markdown(cards[1:2])


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist has no results")
def test_chains_have_a_figure():
    """100 chains are the experiment's 20 images per chain."""
    (card,) = (card for card in read_cards("digits") if card.path.name == "classifier.safetensors")
    assert card.distances["fd_digits"].keys() == {5.0, 10.0}


CHAIN = {"name": "chain", "chains": None, "images_per_chain": 10}


@pytest.mark.parametrize(
    ("own", "given", "same"),
    [
        ({"chains": 500}, CHAIN, True),
        ({"chains": 500, "restart_every": 20}, CHAIN, True),  # a chain of ten images ends before it
        ({"chains": 100, "restart_every": 10}, CHAIN, True),
        ({"chains": 499}, CHAIN, False),
        ({"chains": 100}, CHAIN, False),
        ({"chains": 500, "restart_every": 5}, CHAIN, False),
        ({"chains": 500, "eta": 0.5}, CHAIN, False),
        ({"chains": 500, "eta": 0.5}, {**CHAIN, "eta": 0.5}, True),
        ({}, {**CHAIN, "images_per_chain": 50}, True),  # a point of version 0.1 has 100 chains
    ],
)
def test_chains_are_compared_by_their_number_and_length(own: dict[str, Any], given: dict[str, Any], same: bool):
    point = normalised({"n": 5000, "settings": {"prior": {"name": "chain", **own}, "solver": {"name": "heun"}}})
    assert same_settings(point, {"prior": given, "solver": {"name": "heun"}}) == same


def test_settings_are_compared_with_their_defaults_and_without_paths():
    def measured(solver: dict[str, Any], prior: dict[str, Any]) -> bool:
        own = {
            "prior": {"name": "density", "T": 0.4, "density": "normal", "checkpoint": "a"},
            "solver": {"name": "deis"},
        }
        return same_settings(normalised({"n": 10, "settings": own}), {"prior": prior, "solver": solver})

    prior = {"name": "density", "T": 0.4, "density": "normal", "checkpoint": "b"}
    former = {"name": "deis", "mode": "rhoab", "max_order": 3}
    assert measured(former, prior) and measured({**former, "lower_order_final": False}, prior)
    assert not measured({"name": "deis"}, prior), "its defaults have changed since version 0.1"
    assert not measured(former, {**prior, "T": 0.3}) and not measured({"name": "heun"}, prior)
    assert not measured(former, {"name": "gaussian"})


@pytest.mark.skipif(not RESULTS.is_dir(), reason="an sdist has no results")
def test_points_of_other_weights_are_no_figures(tmp_path: Path):
    for name in ("weights", "results"):
        shutil.copytree(EXPERIMENTS / "cifar10_small" / name, tmp_path / name)
    assert not any(card.distances for card in read_cards(str(tmp_path))), "copies are not what the experiment names"


def test_a_new_file_says_how_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without the folders of the machine that it was made on."""
    words = ["images=128", "data.path=/home/someone/x.npz", "--training.batch_size=64", f"out={tmp_path}"]
    fit = ["fit", "digits/edm", "logger=none", "reference=", words[0], words[2], words[3]]
    assert main(fit) == 0
    (card,) = (card for card in read_cards(str(tmp_path)) if card.path.name == "ema.safetensors")
    assert card.command == "diffaccel fit digits/edm logger=none reference= images=128 training.batch_size=64"
    assert card.header["steps"] == 2 and card.header["device"] and card.header["ema_half_life"] == 10_000
    capsys.readouterr()
    assert main(["list", "weights", str(tmp_path), "format=markdown"]) == 0
    printed = capsys.readouterr().out
    assert f"| `{card.command}` |" in printed and f"| {card.header['device']} |" in printed and "figure" not in printed


def test_commands_name_files_without_their_folders():
    from diffaccel.config import load
    from diffaccel.run.trainer import command_of

    words = ["init=/home/someone/a b.safetensors", "data.path=/home/someone/x.npz", "resume=auto", "out=/tmp/x", "n=20"]
    config = load("cifar10_small/edm", words)
    assert command_of(config) == "diffaccel fit cifar10_small/edm 'init=a b.safetensors' data.path=x.npz n=20"


def test_what_a_list_of_weights_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for words, said in (
        (["tyo"], "did you mean 'toy'"),
        (["toy", "digits"], "at most one folder"),
        (["toy", "format=html"], "format=html is not one of text, markdown"),
        (["toy", "fromat=text"], "did you mean 'format'"),
        ([str(tmp_path)], "neither a folder with weights"),
    ):
        assert main(["list", "weights", *words]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_names_from_files_do_not_break_the_table(tmp_path: Path):
    header = {"kind": "denoiser", "data": "a | b", "images_seen": 5, "experiment": "x/y"}
    save_weights(tmp_path / "a.safetensors", {"w": torch.zeros(3), "n": torch.zeros(2, dtype=torch.int64)}, header)
    (card,) = read_cards(str(tmp_path))
    assert card.parameters == 3 and json.dumps(card.header)
    assert "a \\| b" in markdown([card])
