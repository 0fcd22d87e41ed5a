"""What an installation brings: the experiments, and all that is imported, in versions that are tried."""

import ast
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
import yaml

import diffaccel
from diffaccel.__main__ import main
from diffaccel.data import SOURCES
from diffaccel.density import DENSITIES, TrainingImages
from diffaccel.errors import UsageError
from diffaccel.features.packaged import EfficientNetLite0, MobileNetV2
from diffaccel.features.perceptual import build_lpips
from diffaccel.noise import NoiseStreams

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
REQUIREMENTS, LOWEST = (
    runpy.run_path(str(ROOT / ".ci" / "lowest.py"))[name](PYPROJECT) for name in ("requirements", "lowest")
)
EXTRAS = {"flow": ["zuko"], "sklearn": ["sklearn"], "text": ["transformers"], "vision": ["torchvision"]}
"""Extra -> packages that the code imports."""
JUDGES = "judges"
"""Extra with weights alone, which the code doesn't import."""

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

# Every experiment with the files beside it that it names.
LIST = """
import json, re
from diffaccel.config import EXPERIMENTS, as_written, load
names = sorted(file.relative_to(EXPERIMENTS).with_suffix("").as_posix() for file in EXPERIMENTS.glob("*/*.yaml"))
names = [name for name in names if "/base" not in name and not name.startswith("sweeps/")]
trees = {name: json.dumps(as_written(load(name)), default=str) for name in names}
print(json.dumps({name: re.findall(f"{EXPERIMENTS}/([^\\"]+)", tree) for name, tree in trees.items()}))
"""


# Whether the noise has its compiled loop, and its numbers.
DRAW = """
import hashlib, torch
from diffaccel.noise import NoiseStreams, host
drawn = NoiseStreams(3, range(5)).normal(torch.empty(5, 3, 8, 8))
print(host.compiled_loop(), hashlib.sha256(drawn.numpy().tobytes()).hexdigest())
"""

BROUGHT = {"triton": "torch", "huggingface_hub": "transformers"}
"""Package -> dependency that requires it: PyTorch with CUDA, the library of text encoders."""


def imported() -> list[tuple[str, str]]:
    """Packages that the code imports, anywhere in a file, each with the extra that the import names, '' for none."""
    found: list[tuple[str, str]] = []
    for file in (ROOT / "diffaccel").rglob("*.py"):
        _collect(ast.parse(file.read_text()), "", found)
    ours = set(sys.stdlib_module_names) | {"diffaccel"}
    return [(extra, package) for extra, package in found if package not in ours]


def _collect(node: ast.AST, extra: str, found: list[tuple[str, str]]) -> None:
    if isinstance(node, ast.Import):
        found += [(extra, alias.name.split(".")[0]) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        found.append((extra, node.module.split(".")[0]))
    elif isinstance(node, ast.With):
        call = node.items[0].context_expr
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "extra":
            extra = ast.literal_eval(call.args[0])
    for child in ast.iter_child_nodes(node):
        _collect(child, extra, found)


def test_what_is_imported_is_installed_or_names_its_extra():
    providers, used = packages_distributions(), imported()
    for extra, package in used:
        required = {re.split("[>=]", one)[0] for one in REQUIREMENTS[extra]}
        names = {name.lower().replace("_", "-") for name in providers.get(package, [])} | {BROUGHT.get(package, "")}
        assert names & required, f"{package} is of none of the {extra or 'plain'} dependencies"
    assert {extra: [package] for extra, package in used if extra and package not in BROUGHT} == EXTRAS
    assert REQUIREMENTS.keys() == {"", *EXTRAS, JUDGES, "all", "dev", "docs"}
    assert [EfficientNetLite0.shipped.package] == [one.partition(">=")[0] for one in REQUIREMENTS[JUDGES]]


def test_make_setup_installs_both_judges():
    """One is an extra; the other has dependencies that nothing needs, and an extra can't leave them out."""
    recipe = (ROOT / "Makefile").read_text().partition("\n$(STAMP):")[2].partition("\n\n")[0]
    for judge in (EfficientNetLite0, MobileNetV2):
        command = judge.shipped.install.removeprefix("pip install ")
        assert command.replace("'diffaccel[judges]'", "-e '.[dev]'") in recipe


def test_all_and_dev_install_every_extra():
    assert REQUIREMENTS["all"] == [f"diffaccel[{','.join(sorted([*EXTRAS, JUDGES]))}]"]
    assert "diffaccel[all,docs]" in REQUIREMENTS["dev"]


def fit_mixture() -> None:
    density = DENSITIES["mixture"]((1, 4, 4), ratio=0.4, basis="dct", rank=2, components=2)
    density.fit(TrainingImages(lambda rank, world: iter([(0, torch.randn(4, 1, 4, 4))])))


@pytest.mark.parametrize(
    ("extra", "build", "part"),
    [
        ("flow", lambda: DENSITIES["flow"]((1, 4, 4), ratio=0.4), "density 'flow'"),
        ("sklearn", fit_mixture, "fitting density 'mixture'"),
        ("sklearn", lambda: SOURCES["digits"]().split("train"), "source 'digits'"),
        ("vision", lambda: SOURCES["cifar10"]("nowhere").split("train"), "source 'cifar10'"),
        ("vision", build_lpips, "method.perceptual_weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_missing_extra_is_one_line(
    extra: str, build: Callable[[], object], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package,) = EXTRAS[extra]
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError) as caught:
        build()
    said = f"{part} requires {package}, which is not installed: pip install 'diffaccel[{extra}]'"
    assert str(caught.value) == said


def test_run_without_its_extra_prints_that_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert main(["fit", "digits/edm", "logger=none", "precision=32-true", f"out={tmp_path}"]) == 2
    said = "diffaccel: source 'digits' requires sklearn, which is not installed: pip install 'diffaccel[sklearn]'"
    assert capsys.readouterr().err.splitlines()[-1] == said


def test_every_dependency_has_a_lowest_version_that_is_tried():
    installed = [one for extra in REQUIREMENTS if extra not in ("all", "dev", "docs") for one in REQUIREMENTS[extra]]
    assert [f"{name}>={version}" for name, version in LOWEST.items()] == installed, "a dependency without a lower bound"
    steps = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["lowest"]["steps"]
    commands = [step.get("run", "") for step in steps]
    assert any(".ci/lowest.py > lowest.txt" in command for command in commands)
    assert {"PIP_CONSTRAINT": "lowest.txt"} in [step.get("env") for step in steps]
    assert any("pytest" in command for command in commands)


def test_every_python_that_is_named_is_tried():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tried = jobs["test"]["strategy"]["matrix"]["python"]
    assert re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT) == tried
    assert f'requires-python = ">={tried[0]}"' in PYPROJECT
    assert jobs["lowest"]["steps"][1]["with"]["python-version"] == tried[0]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked sdist, built from a copy of the clone: setuptools writes into the folder that it builds."""
    clone, built = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("sdist")
    for path in ROOT.iterdir():
        if path.name in ("diffaccel", "experiments", "tests"):
            shutil.copytree(path, clone / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, clone)
    (folder,) = unpack(build("build_sdist", clone, built), "gztar").iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist, as that of a release."""
    return build("build_wheel", sdist, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The unpacked wheel, in an environment without extras but for torchvision, which torch-fidelity requires."""
    folder = unpack(wheel, "zip")
    hidden = EXTRAS["flow"] + EXTRAS["sklearn"]
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({hidden}))\n")
    return folder


def build(hook: str, source: Path, target: Path) -> Path:
    environment = os.environ | {"DIFFACCEL_PURE": "1"}
    command = [sys.executable, "-c", BUILD, hook, str(target)]
    subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
    (file,) = target.iterdir()
    return file


def unpack(archive: Path, form: str) -> Path:
    shutil.unpack_archive(archive, archive.parent / "unpacked", form)
    return archive.parent / "unpacked"


def python(where: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder on the package that lies in another one."""
    cwd.mkdir()
    environment = os.environ | {"PYTHONPATH": str(where)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def files(folder: Path, *patterns: str) -> set[str]:
    return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}


def test_sdist_contains_what_a_wheel_is_built_from(sdist: Path) -> None:
    names = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "diffaccel/py.typed")
    for name in (*names, "diffaccel/noise/philox.c"):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (sdist / "tests").exists()
    assert files(sdist, "**/*_raw.*", "**/results") == set()


def test_wheel_contains_every_experiment_and_the_marker_of_types(wheel: Path, installed: Path) -> None:
    assert wheel.stat().st_size < 95e6, "PyPI takes files of up to 100 MB"
    package = installed / "diffaccel"
    assert files(package, "**/*.py", "py.typed") == files(ROOT / "diffaccel", "**/*.py", "py.typed")
    assert files(package / "experiments", "*/*.yaml") == files(ROOT / "experiments", "*/*.yaml")
    for name in files(package / "experiments", "*/*.*", "*/weights/*.*"):
        assert (package / "experiments" / name).read_bytes() == (ROOT / "experiments" / name).read_bytes()
    assert files(package, "**/*_raw.*", "**/results") == set()


def test_one_wheel_is_for_every_platform_and_python(wheel: Path, installed: Path, tmp_path: Path) -> None:
    """PyPI takes no wheel of a plain Linux, and a compiled one would not install on the other versions of Python."""
    assert wheel.name == f"diffaccel-{diffaccel.__version__}-py3-none-any.whl"
    assert files(installed, "**/*.so", "**/*.pyd", "**/*.c") == set()
    assert "DIFFACCEL_PURE=1" in (ROOT / ".ci" / "package").read_text()
    done = python(installed, tmp_path / "empty", "-c", DRAW)
    own = hashlib.sha256(NoiseStreams(3, range(5)).normal(torch.empty(5, 3, 8, 8)).numpy().tobytes()).hexdigest()
    assert done.stdout.split() == ["None", own], done.stderr


def test_wheel_has_the_files_that_its_experiments_name(installed: Path, tmp_path: Path) -> None:
    named = json.loads(python(installed, tmp_path / "empty", "-c", LIST).stdout)
    for experiment, names in named.items():
        for name in names:
            assert (installed / "diffaccel/experiments" / name).is_file() == (ROOT / "experiments" / name).is_file(), (
                f"{experiment} of the wheel names {name}"
            )
    assert {Path(name).name for name in named["digits/dlg"]} == {
        "classifier.safetensors",
        "edm.safetensors",
        "extractor.safetensors",
        "floor.npz",
        "reference.npz",
    }


def test_wheel_has_the_sweeps(installed: Path, tmp_path: Path) -> None:
    words = ("solvers", "dry_run=true", "nfe=5", f"out={tmp_path}")
    done = python(installed, tmp_path / "empty", "-m", "diffaccel", "sweep", *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("diffaccel bench data=cifar10_small method=edm solver=") == 12


def test_wheel_benches_from_an_empty_folder_without_extras(installed: Path, tmp_path: Path) -> None:
    words = ("digits/dlg", "nfe=10", "n=300", "precision=32-true", "threads=1", "logger=none")
    done = python(installed, tmp_path / "empty", "-m", "diffaccel", "bench", *words)
    assert done.returncode == 0, done.stderr
    (point,) = (tmp_path / "empty" / "runs").rglob("points.jsonl")
    assert json.loads(point.read_text())["nfe"] <= 10
    resolved = yaml.safe_load(point.with_name("config.yaml").read_text())
    weights = point.parent / resolved["reference"]
    assert weights.resolve() == (installed / "diffaccel/experiments/digits/weights/reference.npz").resolve()
