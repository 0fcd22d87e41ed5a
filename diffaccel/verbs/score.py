"""``score``: the metrics of a bench for images of any origin, or for statistics of images.

The point is appended to OUT/points.jsonl. The point of images that ``sample`` wrote has the method, budget, seed and
settings of their description, and their features are kept, so that ``compare`` pairs them with a bench. Other images
are not paired.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from diffaccel.collective import World
from diffaccel.config import EXPERIMENTS, Config, load, load_tree, to_yaml
from diffaccel.data import build_source
from diffaccel.data.given import GivenImages
from diffaccel.data.source import random_order
from diffaccel.errors import UsageError
from diffaccel.evaluation.partial import Partial
from diffaccel.evaluation.pictures import draw_curve, draw_samples
from diffaccel.evaluation.point import describe_judges
from diffaccel.evaluation.provenance import device_name, git_commit, identity_hash, versions
from diffaccel.evaluation.scores import Real
from diffaccel.evaluation.scoring import hash_all, hash_each, number_of, score_images, score_moments
from diffaccel.experiment.judging import Judge, build_judges
from diffaccel.features.independence import check_independent
from diffaccel.metrics.base import Measured, Metric, build_metrics, measure
from diffaccel.metrics.reference import Reference
from diffaccel.metrics.statistics import read_any
from diffaccel.parts.overrides import as_given
from diffaccel.report import append_point, distance, normalised, read_points
from diffaccel.report.judges import features_name
from diffaccel.report.points import UNKNOWN
from diffaccel.report.rows import samples_of
from diffaccel.report.table import print_points
from diffaccel.run import launch
from diffaccel.run.machine import settle
from diffaccel.storage import check_room, check_target, whole, write_whole
from diffaccel.text.terminal import number, say, side_output
from diffaccel.verbs.asked import JUDGING, Asked, read_words
from diffaccel.verbs.run import quiet
from diffaccel.verbs.sample import DESCRIPTION, find_described
from diffaccel.weights import tensors_sha256

HELP = """\
score SOURCE EXPERIMENT [name=mine]
the metrics of bench for any images: a folder, zip or npz

SOURCE is a folder or zip of images, an npz with images or arr_0 (N, H, W, C), or statistics (mu, sigma). EXPERIMENT may
be a data set (`diffaccel score images digits`), or be omitted with reference=FILE extractor=inception, where FILE is a
file of `diffaccel reference`, statistics, or images.

Keys:
  name=mine                name of the method in points and tables
  nfe=10                   number of evaluations per image, which places the point on the curve
  n=5000 seed=0            number of images, and seed of their noise
  image_size=32            size that larger images are resized to
  judges=inception,mobilenetv2 or extractor=inception  feature networks that score the images
  reference=FILE floor=FILE  statistics of training and held-out images
  metrics=[frechet,kid] jpeg=75  metrics, and quality of the JPEGs that are scored
  out=DIR                  output folder
  keep_features=false again=true  what is kept, and whether images that were scored are scored again
  batch_size=100 threads=2 devices=1 num_nodes=1 accelerator=cpu  settings of the machine
"""
DESCRIBED = (
    *("experiment", "process", "data", "checkpoint", "configuration", "by_budget", "tuned", "settings", "truncate"),
    *("nfe_budget", "nfe", "nfe_burn_in", "evaluations", "chains", "noise", "weights", "precision"),
)
"""Keys of a description that are those of a point."""
SHOWN = 64
"""Number of images on the sample grid."""


def score_command(words: list[str]) -> None:
    """Score the source that the words of a command line name."""
    score(read_words(words))


def score(asked: Asked) -> dict[str, Any]:
    """Score images or statistics, write the point, and print it.

    Args:
        asked: Source, experiment and settings.

    Returns:
        Point.

    Raises:
        UsageError: The input is invalid.
    """
    quiet()
    path, description = find_described(asked.path)
    source = read_any(path, prefer_images=True) or GivenImages(path, asked.own.get("image_size"))
    config = _configure(asked, source)
    judges = build_judges(config, source, asked.path, asked.given)
    with launch.folder_of(config):
        settle(config)
        return Scoring(asked, config, source, judges, description).run()


def _configure(asked: Asked, source: GivenImages | Reference) -> Config:
    """Configuration of the scoring: that of the experiment or data set, with the settings of the command."""
    instead: dict[str, Any] = {"precision": "32-true", "method": {"name": "diffusion"}}
    if "reference" in asked.given:
        instead["floor"] = None  # the experiment's own is of other data or features
    name, data = asked.experiment, ""
    if name is None:
        shape = list(source.shape) if isinstance(source, GivenImages) else [1, 1, 1]
        config = load_tree(
            {**instead, "shape": shape, "data": {"name": "folder", "path": asked.path}}, asked.settings, "score"
        )
    else:
        if (EXPERIMENTS / name / "base.yaml").is_file():
            name = f"{name}/base"
        config = load(name, asked.settings, instead, trains=False)
        data = config.data_name
    config.out = config.out or str(Path("runs", data, "scores"))
    return config


class Scoring:
    """Scoring of a source.

    Args:
        asked: Words of the command.
        config: Configuration.
        source: Images or statistics.
        judges: Extractors and statistics of real images.
        description: Description of images that ``sample`` wrote, or None.

    Raises:
        UsageError: The description is of other images, or the command contradicts it; or there are too few images.
    """

    def __init__(
        self,
        asked: Asked,
        config: Config,
        source: GivenImages | Reference,
        judges: Sequence[Judge],
        description: Mapping[str, Any] | None,
    ) -> None:
        self.asked, self.config, self.source, self.judges = asked, config, source, judges
        self.judge = judges[0]
        self.of_images, self.described = isinstance(source, GivenImages), description is not None
        self.order = torch.empty(0, dtype=torch.long)
        self.hashes, self.images_sha256 = self._hashes(description)
        self.metrics = self._metrics()
        self.origin = self._origin(description)
        self.samples = samples_of(self.origin)
        self.shown: torch.Tensor | None = None
        self.features: dict[str, torch.Tensor] = {}

    def _hashes(self, description: Mapping[str, Any] | None) -> tuple[torch.Tensor | None, str | None]:
        """Choose and order the images to score, hash each and all of them, and compare them with their description.

        Images that ``sample`` wrote keep their order, by which they are paired. Others are often sorted by class, and
        some metrics are of the first images only: they are scored in a random order, which is always the same.
        """
        path, n = self.asked.path, self.asked.own.get("n")
        if not isinstance(self.source, GivenImages):
            for key in ("n", "image_size", "jpeg"):
                if self.asked.own.get(key) is not None or key in self.asked.given:
                    raise UsageError(f"{path} has statistics, of images as they were: omit {key}=")
            return None, None
        if (n or len(self.source)) > len(self.source) or (n or len(self.source)) < 2:
            raise UsageError(
                f"{path} has {len(self.source)} images{'' if n is None else f', n={n}'}: a distance requires at least "
                "2, and n is at most the number of images"
            )
        hashes = hash_each(self.source.images)
        if description is not None and description.get("images_sha256") != hash_all(hashes):
            raise UsageError(
                f"{path}: {DESCRIPTION} describes other images: remove it to score these without a description, or "
                "make them again with `diffaccel sample`"
            )
        found = range(len(hashes)) if description is not None else random_order(len(hashes)).tolist()
        self.order = torch.tensor(found[:n])
        return hashes[self.order], hash_all(hashes[self.order.sort().values])

    def _metrics(self) -> list[Metric]:
        """Build the metrics, without those that require classes if those of the images are unknown.

        Raises:
            UsageError: The user asked for such a metric.
        """
        metrics = build_metrics(self.config.metrics)
        lacking = [metric for metric in metrics if metric.needs_labels]
        if not lacking or (isinstance(self.source, GivenImages) and self.source.images.labels is not None):
            return metrics
        remedy = "sample them with format=npz, which keeps their classes" if self.described else "give npz with labels"
        said = f"{self.asked.path}: the classes of the images are unknown, which the metric 'accuracy' requires"
        if "metrics" in self.asked.given:
            raise UsageError(f"{said}: {remedy}, or remove the metric")
        say(f"{said}, so that it is left out ({remedy})")
        return [metric for metric in metrics if not metric.needs_labels]

    def _origin(self, description: Mapping[str, Any] | None) -> dict[str, Any]:
        """Keys of the point on method, cost and noise: those of the description, or as the user gave them."""
        own, path = self.asked.own, Path(self.asked.path)
        if description is None:
            name = own.get("name") or path.resolve().stem
            data = as_given(self.config.data.get("label")) or build_source(self.config.data).label
            return {
                "method": name,
                "data": data if self.config.experiment else None,
                "nfe_budget": own.get("nfe"),
                "nfe": own.get("nfe"),
                "seed": own.get("seed"),
                "noise": UNKNOWN,
                "configuration": {"made": "elsewhere"},
            }
        said = normalised({"noise": UNKNOWN, **description})
        for key in ("nfe", "seed"):
            if own.get(key) not in (None, said[key]):
                given, made = number(own[key], 12), number(said[key], 12)
                raise UsageError(f"{path / DESCRIPTION} has {key} {made}, not {given}: omit {key}=")
        n = self.asked.own.get("n")
        if said.get("nfe_burn_in") and n not in (None, said["n"]):
            raise UsageError(
                f"{path} has {said['n']} images of {said['chains']} chains, whose burn-in is shared by all of them: "
                "omit n=, or sample fewer images"
            )
        check = [judge.extractor for judge in self.judges if judge.extractor is not None]
        check_independent(check, description.get("feature_networks") or (), str(path))
        found = {key: said[key] for key in DESCRIBED if key in said}
        parts = {part: said["settings"][part].get("name") for part in ("prior", "solver")}
        return {"method": own.get("name") or said["method"] or path.stem, **parts, **found, "seed": said["seed"]}

    def run(self) -> dict[str, Any]:
        """Score, write and print the point."""
        config, point = self.config, dict[str, Any]()
        if launch.is_first(config):
            check_target(config.folder / "points.jsonl")
            self._write_settings()

        def work(world: World, device: torch.device) -> None:
            point.update(self._point(world, device))

        if launch.everywhere(config, work):
            self._print(point)
        return point

    def _point(self, world: World, device: torch.device) -> dict[str, Any]:
        """Return the point, scored now or before; collective."""
        for extractor in (one for judge in self.judges for one in (judge.extractor, judge.base)):
            if extractor is not None:
                extractor.to(device)
        reals = [judge.real() for judge in self.judges]
        key, partials = self._key(reals), [self._partial(judge) for judge in self.judges]
        point = world.broadcast(self._before(key))
        if point is None:
            found: dict[str, Any] = {}
            results = {}
            for judge, real, partial in zip(self.judges, reals, partials, strict=True):
                own, measured = self._measured(judge, real, partial, world)
                found = {**own, **found, "seconds_scoring": own["seconds_scoring"] + found.get("seconds_scoring", 0.0)}
                described = describe_judges(judge.named, real, number_of(found["n"], real))
                results[judge.named.name] = {"metrics": measured.values, **measured.details, **described}
            point = {
                **self.origin,
                "source": self._source(),
                **found,
                "world_size": world.size,
                "device": device_name(device),
                "threads": torch.get_num_threads(),
                "versions": versions(),
                "git": git_commit(),
                **results[self.judge.named.name],
                **({"judges": results} if len(results) > 1 else {}),
                "key": key,
            }
            if world.first:
                self._write(point)
        elif world.first:
            say(f"{self.asked.path}: scored before (set again=true to score it again)")
        if world.first:
            for partial in partials:
                partial.clear()
            with suppress(OSError):  # the folder may contain batches of another point
                (self.config.folder / "partial").rmdir()
        return point

    def _measured(self, judge: Judge, real: Real, partial: Partial, world: World) -> tuple[dict[str, Any], Measured]:
        """Compute the metrics by a judge, and keys of the point on what was scored; collective."""
        name, metrics = judge.named.metric_name, judge.applicable(self.metrics, self.of_images)
        if isinstance(self.source, Reference):
            n = self.source.moments.n or None
            return {"n": n, "seconds_scoring": 0.0}, score_moments(self.source.moments, real, metrics, name)
        assert judge.extractor is not None and self.hashes is not None
        n, dim = len(self.hashes), judge.extractor.dim
        if world.first:
            check_room(self.config.folder, 8 * n * dim, 4 * n * dim, "features")
        scores = score_images(
            self.source.images, self.order, self.hashes, judge.extractor, real, self.config.images_per_batch,
            self.origin.get("chains"), self.samples, SHOWN, partial, world,
        )  # fmt: skip
        self.shown, self.features[judge.extractor.sha256] = scores.shown, scores.first.features
        found = {"n": n, "images_sha256": self.images_sha256, "seconds_scoring": float(scores.seconds[1]) / n}
        measured = measure(metrics, scores.made(name), real)
        for pair in (measured.details.get("memorisation") or {}).get("closest", ()):
            pair[0] = int(self.order[pair[0]])  # in the order of the files
        return found, measured

    def _key(self, reals: Sequence[Real]) -> str:
        """Cache key of everything that determines the point, except for versions of other packages."""
        scored = self.source.sha256 if isinstance(self.source, Reference) else self.images_sha256
        by_class = any(metric.needs_labels for metric in self.metrics)
        judges = [
            {"extractor": judge.named.sha256, **real.identity(by_class)}
            for judge, real in zip(self.judges, reals, strict=True)
        ]
        scores = judges[0] if len(judges) == 1 else {"judges": judges}
        own = {key: self.origin.get(key) for key in ("method", "nfe_budget", "nfe", "seed", "settings", "chains")}
        if self.samples > 1:
            own["blocks"] = "conditions"  # earlier points: samples of a condition are in several blocks
        if by_class and isinstance(self.source, GivenImages) and self.source.images.labels is not None:
            own["labels"] = tensors_sha256({"images": self.source.images.labels[self.order]})
        if self.of_images and not self.described:
            own["order"] = "random"  # earlier points: that of the files
        return identity_hash({"scored": scored, **scores, "metrics": self.config.metrics, **own})

    def _partial(self, judge: Judge) -> Partial:
        """Finished batches of images on disk, in a folder that is named by all that determines them."""
        if judge.extractor is None or self.hashes is None:
            return Partial(None)
        identity = {"images": hash_all(self.hashes), "extractor": judge.extractor.sha256}
        key = identity_hash({**identity, "batch_size": self.config.images_per_batch})
        return Partial(self.config.folder / "partial" / f"score-{key}")

    def _before(self, key: str) -> dict[str, Any] | None:
        """Point with this key in OUT."""
        path = self.config.folder / "points.jsonl"
        if self.config.again or not path.is_file():
            return None
        return next((point for point in read_points(path) if point.get("key") == key), None)

    def _source(self) -> dict[str, Any]:
        """Description of the source in the point."""
        if isinstance(self.source, Reference):
            return {"path": self.asked.path, "kind": "statistics", "sha256": self.source.sha256}
        size = self.asked.own.get("image_size")
        found = {"path": self.asked.path, "kind": self.source.name, "files": len(self.source)}
        return {**found, "image_size": size} if size else found

    def _write(self, point: dict[str, Any]) -> None:
        """Write the features of images that may be paired, the point, its sample grid, and the curve."""
        folder, key = self.config.folder, self.judge.named.metric_name
        for place, (sha256, features) in enumerate(self.features.items()):
            if self.described and self.config.keep_features:
                path = folder / "features" / features_name(point["key"], sha256, not place)
                with side_output(str(path)), whole(path) as part, part.open("wb") as file:
                    np.save(file, features.numpy())
        append_point(folder / "points.jsonl", point)
        if distance(normalised(point), key) is not None:
            if self.shown is not None:
                draw_samples(self.shown, True, point, folder)
            draw_curve(point, folder)

    def _write_settings(self) -> None:
        """Write the settings that determine the scores to OUT/config.yaml, by which ``compare`` finds the reference."""
        path = self.config.folder / "config.yaml"
        if not path.exists():
            tree = yaml.safe_load(to_yaml(self.config, self.config.folder))
            write_whole(path, yaml.safe_dump({key: tree[key] for key in JUDGING if key in tree}, sort_keys=False))

    def _print(self, point: Mapping[str, Any]) -> None:
        """Print the point, and which metrics it lacks for what reason."""
        only = [judge.path for judge in self.judges if judge.distance_only]
        if only or not self.of_images:
            which = self.asked.path if not self.of_images else only[0]
            say(f"{which} has statistics without features of single images: only the Frechet distance is computed")
        drawn = distance(normalised(point), self.judge.named.metric_name) is not None
        files = "points.jsonl, curve.png and config.yaml" if drawn else "points.jsonl and config.yaml"
        print_points([point], self.judge.named.metric_name, self.config.folder, files)
