import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image

from diffaccel.errors import UsageError
from diffaccel.report import (
    Published,
    append_point,
    frechet_key,
    normalised,
    plot_curve,
    read_points,
    sample_grid,
    scatter,
    write_csv,
    write_curve_csv,
)
from diffaccel.report.axes import pareto
from diffaccel.report.drawing import ticks_of
from diffaccel.report.published import published_for
from diffaccel.report.strips import IMAGES, first_images, joined
from diffaccel.report.styles import styles_of


def point(nfe: int, fd: float | None = 2.0, method: str = "edm", extractor: str = "digits", **keys) -> dict:
    metrics = {f"fd_{extractor}": fd, f"fd_{extractor}_se": 0.1, "kid": -0.001}
    return {
        **{"method": method, "solver": "heun", "prior": "gaussian", "nfe": nfe, "n": 5000, "seed": 0},
        **{"extractor": {"name": extractor, "dim": 64}, "metrics": metrics},
        **keys,
    }


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look at what is on them."""
    saved, save = [], Figure.savefig

    def savefig(figure, path, **kwargs):
        saved.append(figure)
        save(figure, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def labels_of(figure) -> list[str]:
    """Labels at the ends of curves, in the order of the curves, and those of the legend."""
    (axes,) = figure.axes
    legend = axes.get_legend()
    texts = [text for text in axes.texts if text.get_gid() == "label"] + (legend.get_texts() if legend else [])
    return [text.get_text().replace("\n", " ") for text in texts]


def test_points_round_trip(tmp_path):
    path, points = tmp_path / "new" / "points.jsonl", [point(5), point(10, seed=1)]
    for each in points:
        append_point(path, each)
    assert read_points(path) == points
    assert path.read_bytes().count(b"\n") == 2


def test_what_json_lacks_becomes_null(tmp_path):
    append_point(tmp_path / "points", {"se": float("nan"), "nested": {"list": [float("inf"), 1.5]}})
    assert read_points(tmp_path / "points") == [{"se": None, "nested": {"list": [None, 1.5]}}]
    with pytest.raises(TypeError, match="not JSON serializable"):
        append_point(tmp_path / "points", {"fd": torch.tensor(1.0)})
    assert len(read_points(tmp_path / "points")) == 1


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_passed_over_and_removed(tmp_path, cut):
    path = tmp_path / "points.jsonl"
    for nfe in (5, 10):
        append_point(path, point(nfe))
    path.write_bytes(path.read_bytes()[: -cut - 1])
    assert read_points(path) == [point(5)]
    append_point(path, point(20))
    assert read_points(path) == [point(5), point(20)]


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "points.jsonl"
    path.write_text(json.dumps(point(5)))
    append_point(path, point(10))
    assert read_points(path) == [point(5), point(10)]


def test_unreadable_points_are_named(tmp_path):
    path = tmp_path / "points.jsonl"
    with pytest.raises(UsageError, match="no points at .*points.jsonl"):
        read_points(path)
    for line in ("{nfe: 5}", "3", ""):
        path.write_text(json.dumps(point(5)) + f"\n{line}\n" + json.dumps(point(10)) + "\n")
        with pytest.raises(UsageError, match="line 2, is not a point"):
            read_points(path)


def test_csv_has_a_row_per_point_and_a_column_per_metric(tmp_path):
    points = [point(5, 3.5), point(10, None, seed=2, images_sha256="not a column")]
    write_curve_csv(points, tmp_path / "curve.csv")
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["nfe"] for row in rows] == ["5", "10"]
    assert [row["fd_digits"] for row in rows] == ["3.5", ""]
    assert [row["seed"] for row in rows] == ["0", "2"] and {row["curve"] for row in rows} == {"edm (heun, gaussian)"}
    assert rows[0]["kid"] == "-0.001" and rows[0]["extractor"] == "digits" and "images_sha256" not in rows[0]


def test_only_inception_gives_fid():
    assert frechet_key([point(5)]) == "fd_digits"
    assert frechet_key([point(5, extractor="inception")]) == "fid"
    with pytest.raises(UsageError, match="points of one extractor"):
        frechet_key([point(5), point(5, extractor="cifar10")])


def test_curve_shows_every_series_and_the_floor(tmp_path, figures):
    points = [point(10, 2.0), point(5, 4.0), point(5, 6.0, seed=1), point(5, 3.0, method="tdpm"), point(20, None)]
    plot_curve(points, tmp_path / "curve.png", "title", [Published("DDIM", 10, 13.4)], floor=0.5)
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "fd_digits@5000" and axes.get_xscale() == axes.get_yscale() == "log"
    expected = [
        "edm (heun, gaussian), 1 to 2 seeds",
        "tdpm (heun, gaussian)",
        "Pareto front",
        "held-out real images (0.5)",
    ]
    assert labels_of(figures[0]) == expected
    lines = [np.stack(line.get_data()).tolist() for line in axes.lines]
    assert [[5, 10], [5.0, 2.0]] in lines  # through the mean of the repeated measurement
    assert [[5, 5, 10], [4.0, 6.0, 2.0]] in lines  # a marker for each
    assert "DDIM" in [text.get_text() for text in axes.texts]
    assert Image.open(tmp_path / "curve.png").size[0] > 900


def test_curve_takes_the_floor_from_the_points(tmp_path, figures):
    one = point(5)
    one["metrics"]["fd_digits_floor"] = 0.25
    one["floor"] = {"n": 5000, "sha256": "a"}
    plot_curve([one, point(10, n=1000)], tmp_path / "curve.png", "")
    assert labels_of(figures[0]) == ["edm (n=5000)", "edm (n=1000)", "5000 held-out real images (0.25)"]
    other = point(10, n=1000)
    other["metrics"]["fd_digits_floor"], other["floor"] = 0.75, {"n": 1000, "sha256": "a"}
    plot_curve([one, other], tmp_path / "curve.png", "")
    assert labels_of(figures[1]) == ["edm (n=5000)", "edm (n=1000)"], "two floors are none"


def test_a_floor_far_below_does_not_squeeze_the_curves(tmp_path, figures):
    plot_curve([point(5), point(10)], tmp_path / "curve.png", "", floor=1e-4)
    axes = figures[0].axes[0]
    assert "held-out real images (0.0001, below)" in labels_of(figures[0])
    assert axes.get_ylim()[0] > 0.1


@pytest.mark.parametrize("points", [[], [point(5, None)]], ids=["none", "not scored"])
def test_nothing_to_plot_is_an_error(tmp_path, points):
    with pytest.raises(UsageError):
        plot_curve(points, tmp_path / "curve.png", "")


@pytest.mark.parametrize(("channels", "side", "scale"), [(1, 8, 8), (3, 32, 2), (3, 100, 1)])
def test_grid_holds_every_pixel_of_every_image(tmp_path, channels, side, scale):
    images = torch.randint(256, (5, channels, side, side), dtype=torch.uint8)
    sample_grid(images, tmp_path / "new" / "grid.png", rows=2)
    picture = np.asarray(Image.open(tmp_path / "new" / "grid.png")).reshape(2 + 2 * (side * scale + 2), -1, channels)
    cells = rearrange(picture[2:, 2:], "(r h) (k w) c -> (r k) c h w", r=2, k=3)[:, :, :-2, :-2]
    assert np.array_equal(cells[:5, :, ::scale, ::scale], images)
    assert np.array_equal(cells[:5, :, scale - 1 :: scale, scale - 1 :: scale], images)
    assert (cells[5] == 255).all()


def test_scatter_draws_both_sets(tmp_path, figures):
    points, real = torch.randn(30, 2, 1, 1), torch.randn(40, 2, 1, 1)
    scatter(points, tmp_path / "scatter.png", real, "toy")
    drawn = [collection.get_offsets() for collection in figures[0].axes[0].collections]
    np.testing.assert_allclose(drawn[0], real.flatten(1))
    np.testing.assert_allclose(drawn[1], points.flatten(1))


@pytest.mark.parametrize("name", ["$x_{", "a_b^c", "[red]", "\\frac", "_hidden", "a" * 5000, "中文 ☃", "\x1b[31m"])
def test_any_name_is_drawn_as_it_is(tmp_path, figures, name):
    points = [point(5, method=name), point(10, method=name), point(5, method="other", extractor="digits")]
    plot_curve(points, tmp_path / "curve.png", name, [Published(name, 10, 13.4)])
    first, second = labels_of(figures[0])
    assert first.startswith(name.replace("\x1b", "\\x1b")[:20]) and second == "other (heun, gaussian)"
    assert Image.open(tmp_path / "curve.png").size[0] > 900


def test_a_measurement_that_comes_again_is_drawn_once(tmp_path, figures):
    points = [point(5, 4.0, key="a"), point(10, 2.0, key="b"), point(5, 3.0, key="a")]
    plot_curve(points, tmp_path / "curve.png", "")
    lines = [np.stack(line.get_data()).tolist() for line in figures[0].axes[0].lines]
    assert [[5, 10], [3.0, 2.0]] in lines and not any(4.0 in line[1] for line in lines)


def test_points_that_lack_something_are_left_out(tmp_path, figures):
    junk = [
        {},
        {"metrics": []},
        point("5"),
        point(-1),
        point(5, "2"),
        point(5, -1.0),
        point(5, float("nan")),
        point(5, None),
    ]
    plot_curve([*junk, point(10, 2.0)], tmp_path / "curve.png", "")
    assert labels_of(figures[0]) == ["edm (heun, gaussian)"]
    write_curve_csv(junk, tmp_path / "curve.csv")
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 1 + len(junk)


def test_lines_that_nest_too_deep_are_named(tmp_path):
    (tmp_path / "points.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(UsageError, match="line 1, is not a point"):
        read_points(tmp_path / "points.jsonl")


def test_text_cells_are_no_formulas(tmp_path):
    write_csv([["=1+1", "-0.5", -0.5, "+1e3", "@x", "-2+3", "\t=1", None]], tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as file:
        (row,) = csv.reader(file)
    assert row == ["'=1+1", "-0.5", "-0.5", "+1e3", "'@x", "'-2+3", "\\t=1", ""]


def test_a_method_has_a_colour_and_a_solver_a_line():
    curves = {
        "a heun": [normalised(point(5))],
        "a ddim": [normalised(point(5, solver="ddim"))],
        "b heun": [normalised(point(5, method="tdpm"))],
        "a heun, eta": [normalised(point(5))],
        "b tuned": [normalised(point(5, method="tdpm", tuned=True))],
    }
    styles = styles_of(curves)
    look = {label: (style.colour(), style.dashes, style.marker) for label, style in styles.items()}
    assert look["a heun"][0] == look["a ddim"][0] != look["b heun"][0] == look["b tuned"][0]
    assert look["a heun"][1:] == look["b heun"][1:] != look["a ddim"][1:]
    assert look["b tuned"][1:] == ((), "o"), "a solid line: several solvers may be in it"
    assert look["a heun, eta"][0] != look["a heun"][0] and len(set(look.values())) == 5
    assert all(style.colour(dark=True) != style.colour() for style in styles.values())


def test_the_front_has_what_nothing_improves_upon():
    pairs = [(10, 2.0), (5, 3.0), (5, 2.5), (20, 2.0), (50, 1.0), (2, 9.0)]
    assert pareto(pairs) == [(2, 9.0), (5, 2.5), (10, 2.0), (50, 1.0)]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.02, 8.4, [1.5, 2, 3, 4, 5, 6, 8]),
        (0.9, 110, [1, 2, 5, 10, 20, 50, 100]),
        (1.41, 1.52, [1.42, 1.44, 1.46, 1.48, 1.5, 1.52]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]):
    assert ticks_of(low, high) == pytest.approx(ticks)


def test_curves_against_other_costs(tmp_path, figures):
    points = [point(nfe, 8 / nfe, seconds_per_image=0.01 * nfe) for nfe in (5, 10)] + [point(20, 1.0)]
    plot_curve(points, tmp_path / "curve.png", "", x="seconds")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "seconds per image"
    assert [[0.05, 0.1], [1.6, 0.8]] in [np.stack(line.get_data()).tolist() for line in axes.lines], (
        "cost is known of two"
    )
    with pytest.raises(UsageError, match="gflops_per_image"):
        plot_curve(points, tmp_path / "curve.png", "", x="gflops")


def test_published_figures_are_for_their_data_judge_and_number():
    def scored(n: int, extractor: str = "inception", reference: str = "CIFAR-10") -> list[Published]:
        return published_for([normalised(point(10, extractor=extractor, n=n, reference={"name": reference}))])

    found = scored(50_000)
    assert len(found) > 40 and all(figure.source and figure.nfe > 0 for figure in found)
    assert {figure.value for figure in found if figure.label == "DDIM, DDPM" and figure.nfe == 10} == {13.36}
    assert scored(5_000) == scored(50_000, "digits") == scored(50_000, reference="CIFAR-10 (JPEG)") == []
    assert len(scored(50_000, reference="celebahq256")) == 1


def test_strips_are_cut_from_grids(tmp_path):
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8)
    sample_grid(images, tmp_path / "grid.png")
    found = first_images(tmp_path / "grid.png", 30)
    assert len(found) == IMAGES
    for cell, image in zip(found, images, strict=False):
        assert np.array_equal(cell[::2, ::2].transpose(2, 0, 1), image)
    board = joined(found)
    assert board.shape == (64, 64 * IMAGES + 2 * (IMAGES - 1), 4) and (board[:, 64:66, 3] == 0).all()
    scatter(torch.randn(30, 2), tmp_path / "scatter.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert [first_images(tmp_path / name, 30) for name in ("scatter.png", "broken.png", "none.png")] == [[], [], []]


def test_reading_points_imports_no_pytorch():
    """A comparison of a few points should take no longer than its plots."""
    code = "import sys, diffaccel.__main__, diffaccel.verbs.compare; print({'torch', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
