import csv
import json

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
    plot_curve,
    read_points,
    sample_grid,
    scatter,
    write_csv,
    write_curve_csv,
)


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
    expected = ["edm (heun, gaussian), 1 to 2 seeds", "tdpm (heun, gaussian)", "Pareto front", "real images (0.5)"]
    assert labels_of(figures[0]) == expected
    lines = [np.stack(line.get_data()).tolist() for line in axes.lines]
    assert [[5, 10], [5.0, 2.0]] in lines  # through the mean of the repeated measurement
    assert [[5, 5, 10], [4.0, 6.0, 2.0]] in lines  # a marker for each
    assert "DDIM" in [text.get_text() for text in axes.texts]
    assert Image.open(tmp_path / "curve.png").size[0] > 900


def test_curve_takes_the_floor_from_the_points(tmp_path, figures):
    one = point(5)
    one["metrics"]["fd_digits_floor"] = 0.25
    plot_curve([one, point(10, n=1000)], tmp_path / "curve.png", "")
    assert labels_of(figures[0]) == ["edm (n=5000)", "edm (n=1000)", "real images (0.25)"]


def test_a_floor_far_below_does_not_squeeze_the_curves(tmp_path, figures):
    plot_curve([point(5), point(10)], tmp_path / "curve.png", "", floor=1e-4)
    axes = figures[0].axes[0]
    assert "real images (0.0001, below)" in labels_of(figures[0])
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
