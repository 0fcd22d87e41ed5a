"""``new``: the experiments of all methods for images of one's own, with the statistics of their judges."""

import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.config import load, parse_overrides
from diffaccel.config.keys import map_paths, name_parts
from diffaccel.errors import UsageError
from diffaccel.features.extractors import EXTRACTORS
from diffaccel.features.packaged import installed_judges
from diffaccel.metrics.reference import file_of
from diffaccel.parts.overrides import paths_and_options, scalar
from diffaccel.recipes.checkpoint import Given, read_given
from diffaccel.recipes.experiments import WEIGHTS, experiments, why_no_dlg
from diffaccel.recipes.folder import MANIFEST, Folder, check_empty, read_manifest
from diffaccel.recipes.images import Facts, inspect, source_of
from diffaccel.run.machine import settle
from diffaccel.storage import occupied
from diffaccel.text.terminal import print_lines, say
from diffaccel.verbs.reference import reference
from diffaccel.verbs.run import quiet

HELP = """\
new DIR images=FOLDER [checkpoint=FILE]
write the experiments of all methods for your images

FOLDER is a folder or zip of images, or an npz. The images stay where they are. A tenth of them is held out, and the
statistics of both parts are computed for each judge. `diffaccel curve DIR` continues.

Keys:
  images=FOLDER test=FOLDER  images, and held-out images; by default a part of the first
  test_share=0.1           part of the images that is held out, chosen by the hash of their pixels
  size=32                  resize the central square of each image to this height and width
  checkpoint=FILE          weights of a denoiser for these images, which then needs no training
  labels=false             ignore the class of each image
  label=NAME               name of the data in tables
  judges=efficientnet_lite0,mobilenetv2  extractors that score images; by default those that are installed
  threads=2 accelerator=gpu  machine that computes the statistics
  again=true               replace experiments and statistics that were written for something else
"""
MACHINE = ("threads", "accelerator")
"""Options for the machine that computes the statistics."""
OPTIONS = ("images", "test", "checkpoint", "size", "test_share", "labels", "label", "judges", "again", *MACHINE)
"""Options of the command."""


@dataclass(frozen=True)
class Asked:
    """Arguments of the command.

    Attributes:
        path: Folder to write.
        images: Folder, zip archive or npz file of images.
        test: Place of held-out images; None to hold out a share of ``images``.
        checkpoint: Checkpoint of a denoiser; None to train one.
        size: Height and width to resize the central square of each image to; None to keep the images.
        test_share: Share of the images that is held out.
        labels: Whether to read labels.
        label: Name of the data in tables.
        judges: Extractors that score images, as in an experiment; None for those that are installed.
        again: Whether to replace experiments and statistics that were written for something else.
        machine: ``key=value`` words for the machine.
    """

    path: Path
    images: str
    test: str | None = None
    checkpoint: str | None = None
    size: int | None = None
    test_share: float = 0.1
    labels: bool = True
    label: str | None = None
    judges: str | None = None
    again: bool = False
    machine: tuple[str, ...] = ()

    @classmethod
    def of(cls, words: Sequence[str]) -> "Asked":
        """Read the words of a command line.

        Raises:
            UsageError: A word is unknown, the folder or the images are missing, or a value has the wrong type.
        """
        paths, options = paths_and_options(words, OPTIONS, "new", flags=["again"])
        if len(paths) != 1 or not options.get("images"):
            raise UsageError("new requires a new folder and your images: diffaccel new DIR images=FOLDER")
        return cls(
            Path(paths[0]),
            options["images"],
            options.get("test") or None,
            options.get("checkpoint") or None,
            None if options.get("size", "") in ("", "null") else _typed(options, "size", int),
            float(_typed(options, "test_share", (int, float))) if "test_share" in options else 0.1,
            _typed(options, "labels", bool) if "labels" in options else True,
            options.get("label") or None,
            options.get("judges") or None,
            _typed(options, "again", bool) if "again" in options else False,
            tuple(f"{key}={options[key]}" for key in MACHINE if key in options),
        )


def _typed(options: dict[str, str], key: str, kind: Any) -> Any:
    value = scalar(options[key])
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        named = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
        raise UsageError(f"{key}={options[key]}: give {named}")
    return value


def new_command(words: list[str]) -> Path:
    """Write the experiments that the words of a command line ask for.

    Raises:
        UsageError: See :meth:`Asked.of` and :func:`new`.
    """
    quiet()
    return new(Asked.of(words))


def new(asked: Asked) -> Path:
    """Write the experiments of all methods for images of any origin, and the statistics of their judges.

    Nothing of the images is copied. The same call goes on after an interrupt, and keeps files that were edited.

    Returns:
        Folder of the experiments.

    Raises:
        UsageError: The images can't be used, the checkpoint does not fit them, no judge is installed, or the folder has
            other content.
    """
    path = asked.path
    _check_places(path, asked.images)
    if read_manifest(path) is None:
        check_empty(path)  # before the images are read
    judges = _judges(asked)
    data = source_of(asked.images, asked.test, asked.size, asked.test_share, asked.labels, asked.label)
    facts = inspect(data)
    given = None if asked.checkpoint is None else read_given(asked.checkpoint, facts)
    texts = experiments(facts, judges, given)
    print_lines(*(f"{facts.data['label']}: {line}" for line in facts.describe()))
    if given is not None:
        print_lines(*given.describe(facts))
    with occupied(path):
        folder = Folder.open(path, _made_of(facts, judges, given), asked.again)
        folder.save()
        edited = [name for name, text in texts.items() if not folder.write(name, text)]
        folder.save()
        if edited:
            say(f"{path}: {', '.join(edited)} were edited and are kept as they are")
        _statistics(path, facts, judges, asked)
    _describe(path, texts, why_no_dlg(facts, given))
    return path


def _check_places(path: Path, images: str) -> None:
    """Check that the output is not among the images, of which it would become a part."""
    own, place = Path(os.path.realpath(path)), Path(os.path.realpath(os.path.expanduser(images)))
    if place.is_dir() and own.is_relative_to(place):
        raise UsageError(f"{path} is inside {images}, whose images it would add to: choose a folder elsewhere")


def _judges(asked: Asked) -> dict[str, Any]:
    """Return the judges, as in an experiment, by the names of their extractors.

    Raises:
        UsageError: None is installed, or one can't be built.
    """
    if asked.judges is not None:
        tree = parse_overrides([f"judges={asked.judges}"])
        name_parts(tree)
        map_paths(tree, os.path.abspath)
        nodes = [node["name"] if list(node) == ["name"] else node for node in tree["judges"]]
        return {EXTRACTORS.build({"name": node} if isinstance(node, str) else node).name: node for node in nodes}
    found, missing = installed_judges()
    how = "; ".join(f"{name}: {command}" for name, command in missing.items())
    if not found:
        raise UsageError(f"no network that scores images is installed: install one ({how}), or set judges=NAME")
    if missing:
        say(f"judged by {' and '.join(found)} only; a second opinion can be installed ({how})")
    return {EXTRACTORS.build({"name": name}).name: name for name in found}


def _made_of(facts: Facts, judges: dict[str, Any], given: Given | None) -> dict[str, Any]:
    images = {"data": facts.data, "shape": list(facts.shape), "sha256": facts.sha256}
    return {"images": images, "judges": list(judges.values()), "checkpoint": None if given is None else given.sha256}


def _statistics(path: Path, facts: Facts, judges: Collection[str], asked: Asked) -> None:
    """Compute the statistics of the judges, unless there are those of an earlier `new`."""
    config = load(str(path / "base.yaml"), ["method=diffusion", *asked.machine, f"again={str(asked.again).lower()}"])
    files = [Path(file_of(found, name) or "") for found in (config.reference, config.floor) for name in judges]
    if not asked.again and all(file.is_file() for file in files):
        return
    say(f"computing the statistics of {facts.train + facts.test:,} images for {' and '.join(judges)}")
    for file in files:
        file.unlink(missing_ok=True)  # of a `new` that was killed between two files
    settle(config)
    reference(config, advises=False)


def _describe(path: Path, texts: dict[str, str], no_dlg: str | None) -> None:
    names = [name.removesuffix(".yaml") for name in texts if name != "base.yaml"]
    print_lines(f"{path}: experiments {', '.join(names)}, on base.yaml; statistics in {WEIGHTS}/, record in {MANIFEST}")
    if no_dlg is not None:
        print_lines(f"no experiment dlg: {no_dlg}")
    methods = ",".join(name for name in ("edm", "dlg", "small_t") if name in names)
    command = f"diffaccel curve {shlex.quote(str(path))} methods={methods} nfe=5,10,20"
    print_lines("next, what it would run and about how long, and then the curves:")
    print_lines(f"  {command} dry_run=true", f"  {command}")
