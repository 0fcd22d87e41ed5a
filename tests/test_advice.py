"""What the help, the READMEs and the messages advise is accepted: commands load and build, keys and values exist."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pages
import pytest

from diffaccel import experiment
from diffaccel.config import FLAGS, KEYS, Config, load
from diffaccel.config.sweep import read_sweep
from diffaccel.data import SOURCES
from diffaccel.denoiser import DENOISERS
from diffaccel.denoiser.levels import LEVELS
from diffaccel.density import DENSITIES
from diffaccel.features.extractors import EXTRACTORS
from diffaccel.features.fitting import fit_extractor
from diffaccel.methods import METHODS
from diffaccel.nn import NETWORKS
from diffaccel.nn.critic import CRITICS
from diffaccel.parts.catalogue import registry_of
from diffaccel.parts.overrides import ALIASES, one_experiment, paths_and_options
from diffaccel.parts.registry import Registry
from diffaccel.parts.trees import STATISTICS
from diffaccel.prior import PRIORS
from diffaccel.prior.posterior import POSTERIORS
from diffaccel.process import PROCESSES
from diffaccel.process.attenuation import ATTENUATIONS
from diffaccel.solver import GRIDS, SOLVERS
from diffaccel.verbs import VERBS
from diffaccel.verbs.asked import OWN, read_words
from diffaccel.verbs.exporting import OWN as EXPORT_OPTIONS
from diffaccel.verbs.help import help_of, keys_of, overview
from diffaccel.verbs.listed import list_experiments, list_keys
from diffaccel.verbs.names import check_names, check_own_keys

sys.path.insert(0, str(pages.DOCS))

import tables  # noqa: E402

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("experiments/*/README.md")), *pages.PAGES]
ELSEWHERE_KEYS = {key for verb in VERBS.values() if not verb.on_experiment for key in keys_of(verb)} | {"timesteps"}
"""Keys of commands that are not on an experiment, and an argument of a function of diffusers in a text."""
PROGRAMS = ("diffaccel", "make", "python", "pre-commit", "pip", "wandb")
"""Programs that the pages name."""
SMALL = ("toy", "digits", "cifar10_small", "mnist")
"""Data whose networks build in no time."""
SCORE_ONLY = set(OWN) - KEYS
"""Keys of ``diffaccel score`` that no experiment has."""

KINDS: dict[str, Registry[Any]] = {
    "solver": SOLVERS, "prior": PRIORS, "process": PROCESSES, "network": NETWORKS, "denoiser": DENOISERS,
    "levels": LEVELS, "posterior": POSTERIORS, "method": METHODS, "data": SOURCES, "extractor": EXTRACTORS,
    "grid": GRIDS, "density": DENSITIES, "attenuation": ATTENUATIONS, "critic": CRITICS, "init_solver": SOLVERS,
}  # fmt: skip


# Commands, as a shell passes them on


def blocks(page: Path) -> list[str]:
    """The shell blocks of a page, those that are not run among them."""
    return [block.code for block in pages.blocks(page, *pages.SHELL)]


def script() -> str:
    """All commands that the pages and the help name, in one script: blocks, then what stands in backquotes; tables."""
    parts = blocks(ROOT / "experiments" / "cifar10_small" / "README.md")[:1]
    parts += map(tables.commands, tables.tables().values())
    for page in PAGES:
        parts += blocks(page)
        prose = pages.unfenced(page)
        parts += [re.sub(r"\s+", " ", found) for found in re.findall(r"`((?:for|diffaccel|make) [^`]*)`", prose)]
    parts += [line[: line.find("  ")] for line in re.findall(r"^  (diffaccel .*)", overview(), re.M)]
    for text in (overview(), *map(help_of, VERBS)):
        parts += [re.sub(r"\s+", " ", found) for found in re.findall(r"`(diffaccel [^`]*)`", text)]
    text = "\n".join(parts).replace(".venv/bin/", "").replace("EXPERIMENT", "digits/edm")
    text = text.replace(" key=value", "").replace(" ...", "")
    return re.sub(r"\[([\w.]+=[\w./,]+)\]", r"\1", text).replace("python -c", ": -c")


def run(shell: list[str]) -> list[tuple[str, ...]]:
    """Run the script with functions in place of the programs; return their words."""
    stubs = "".join(f'{name}() {{ record {name} "$@"; }}\n' for name in PROGRAMS)
    launchers = 'srun() { while [ "$1" != diffaccel ]; do shift; done; record "$@"; }\n'
    launchers += 'torchrun() { while [ "$1" != diffaccel ]; do shift; done; record "$@"; }\n'
    record = "record() { printf '%s\\037' \"$@\"; printf '\\036'; }\n"
    found = subprocess.run([*shell, record + stubs + launchers + script()], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0 and found.stderr == "", found.stderr
    return [tuple(line.split("\037")[:-1]) for line in found.stdout.split("\036")[:-1]]


@pytest.fixture(scope="module")
def commands() -> list[tuple[str, ...]]:
    return run(["bash", "-c"])


@pytest.fixture
def my_solver() -> Iterator[None]:
    """The documentation's own part, made by its own code."""
    (code,) = re.findall(
        r"^```python\n(from dataclasses.*?)^```", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S
    )
    exec(code, {"__name__": "readme"})
    yield
    SOLVERS._factories.pop("my_solver")


def check_named(verb: str, words: Sequence[str]) -> None:
    """Check that ``list`` and ``explain`` are given groups and parts that exist, or the words for them in general."""
    group, *name = words
    name = [word for word in name if "=" not in word and word != "digits/edm"]  # options, and what is filled in
    lists = {"experiments": list_experiments, "keys": list_keys, "sweeps": lambda: [True]}
    lists["weights"] = lambda data="digits": [(ROOT / "experiments" / data / "base.yaml").is_file()]
    if verb == "list" and group in lists:
        assert all(lists[group](*name))
        return
    assert len(name) == 1 or (verb == "list" and not name)
    if group not in ("GROUP", "WHAT"):
        assert all(one in registry_of(group) for one in name)


def check_score(words: Sequence[str]) -> None:
    """Check that ``score`` accepts the words, and that there is what it compares with."""
    asked = read_words(words)
    data = ROOT / "experiments" / str(asked.experiment) / "base.yaml"
    if asked.experiment is None:
        assert "reference" in asked.given
    elif not data.is_file():
        load(asked.experiment, asked.settings)


def test_every_command_loads_and_builds(commands: list[tuple[str, ...]], my_solver: None):
    built = set()
    seen = {words[:2] for words in commands}
    assert {("diffaccel", verb) for verb in VERBS} <= seen and ("make", "bench") in seen
    for program, verb, *words in {re.sub(r"\d+", "1", str(words)): words for words in commands}.values():
        if program != "diffaccel" or verb not in VERBS or not words:
            continue
        if verb in ("advise", "compare", "convert"):
            paths, _ = paths_and_options(words, keys_of(VERBS[verb]), verb, ["inspect", "again"])
            assert paths, words
            continue
        if verb == "export":
            words = [word for word in words if word.partition("=")[0] not in EXPORT_OPTIONS]
        if verb == "score":
            check_score(words)
            continue
        if verb in ("list", "explain"):
            check_named(verb, words)
            continue
        if verb == "sweep":
            assert words[0] == "FILE" or read_sweep(words[0]).runs(1), words
            continue
        if verb in ("new", "curve", "train"):  # on a folder, which may be one that an earlier command writes
            check_own_keys(VERBS[verb], words)
            continue
        written = ("mine/", "runs/")  # by an earlier command
        if {"--help", "help"} & {*words} or any(word.startswith(written) for word in words):
            continue
        config = load(*check_names(*one_experiment(words, KEYS, FLAGS)))
        if not config.experiment.startswith(SMALL) or config.method_name == "extractor":
            continue
        parts = repr((config.method, config.process, config.network, config.denoiser, config.prior, config.solver))
        if (key := re.sub(r"\d+\.?\d*", "0", parts)) in built:
            continue
        built.add(key)
        for part in (config.prior, *(entry.get("prior", {}) for entry in config.by_nfe.values())):
            part.pop("init", None)  # a file that an earlier command leaves
        method = experiment.build_method(config, load=False)
        for budget in config.nfe if verb in ("bench", "sample") else ():
            assert method.sampler.plan(budget, config.n).steps >= 0


def test_make_has_its_targets_and_options(commands: list[tuple[str, ...]]):
    makefile = (ROOT / "Makefile").read_text()
    for _, target, *words in (words for words in commands if words[0] == "make"):
        assert re.search(rf"^{target}:", makefile, re.M), target
        for word in words:
            assert re.search(rf"\b{word.split('=')[0]}\b", makefile), word
    for key in re.findall(r"\$\(call option,\w+,(\w+)\)", makefile):
        if key == "methods":  # of the command train
            continue
        load("toy/edm", [f"{key}={'2' if key not in KINDS else 'heun' if key == 'solver' else 'gaussian'}"])


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_passes_on_the_same_words(commands: list[tuple[str, ...]]):
    assert run(["zsh", "-f", "-c"]) == commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_word_of_a_block_is_special_to_zsh(page: Path):
    """Without quotes zsh takes brackets for a pattern, and pasted comments for words; it splits no variable."""
    for block in blocks(page):
        if "python -c" in block:
            continue
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|\$\{\w+\}", "", block)
        assert not re.search(r"=\S*[\[*?{]|(^|\s)#|(^|\s)=\w", bare), block
        assert not re.search(r"(^|\s)\$[A-Z]{2,}(\s|$)", bare, re.M), block


# Keys and values in messages and prose

SETTING = re.compile(r"(?<![\w./\-\"'{<])([a-z_]\w*(?:\.\w+)*)=([\w./+-]*\w|)(?![\w=\"'\[{(<])")
ELSEWHERE = {
    "key",
    "format",
    "image",
    "images",
    "sigmas",
    "classes",
    "condition",
    "use_distributed_sampler",
    "denoise",
    "hidden",
}
"""Words before a ``=`` in strings that advise no setting: arguments of functions."""


def strings() -> Iterator[tuple[str, str]]:
    """The texts of the package, docstrings of attributes among them, without what f-strings fill in."""
    for path in sorted((ROOT / "diffaccel").rglob("*.py")):
        tree = ast.parse(path.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                yield path.name, "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield path.name, node.value


def settings() -> list[tuple[str, str, str]]:
    found = {(name, key, value) for name, text in strings() for key, value in SETTING.findall(text)}
    for page in PAGES:
        spans = re.findall(r"`([^`\n]*)`", pages.unfenced(page))
        found |= {(page.parent.name, key, value) for span in spans for key, value in SETTING.findall(span)}
    return sorted(setting for setting in found if setting[1] not in ELSEWHERE)


def known(key: str) -> bool:
    """Whether some experiment may set a key."""
    top, *path = ALIASES.get(key, key).split(".")
    if key in SCORE_ONLY:
        return True
    if not path or top not in KINDS:
        place: Any = Config()
        for name in (top, *path):
            if isinstance(place, dict) or (top in STATISTICS and name != top):  # files of judges, by their names
                return True
            if not hasattr(place, name):
                return key in ELSEWHERE_KEYS
            place = getattr(place, name)
        return True
    registry: Registry[Any] | None = KINDS[top]
    while registry is not None and path:
        keys = {"name", "checkpoint", "init"}.union(registry.extra, *(registry.keys_of(name) for name in registry))
        if path[0] not in keys and path[0] not in fit_extractor.__annotations__:
            return False
        registry = KINDS.get(path.pop(0))
    return not path


def test_messages_and_prose_name_keys_and_parts_that_exist():
    found = settings()
    assert len(found) > 80 and ("adaptive.py", "nfe", "null") in found
    unknown = [(where, key, value) for where, key, value in found if not known(key)]
    assert unknown == []
    for where, key, value in (setting for setting in found if setting[1] not in SCORE_ONLY):
        kind = KINDS.get(key.removesuffix(".name").split(".")[-1])
        if kind is not None and value and not value.isupper():
            assert value in kind or (key == "method" and value == "extractor") or key == "data", (where, key, value)
        elif "." not in ALIASES.get(key, key) and re.fullmatch(r"[a-z\d_-]+", value) and hasattr(Config(), key):
            load("toy/edm", [f"{key}={value}"])


def test_commands_in_messages_are_the_programs():
    for where, text in strings():
        for command in re.findall(r"`diffaccel ([^`]*)`", text):
            verb, *words = shlex.split(command.replace("{}", "digits/edm").replace("EXPERIMENT", "digits/edm"))
            assert verb in (*VERBS, "help", "VERB"), (where, command)
            if verb in ("list", "explain") and words:
                check_named(verb, words)
            elif words and verb == "score":
                check_score(words)
            elif verb == "sweep":
                assert not words or words[0] in ("FILE", "digits/edm") or read_sweep(words[0])
            elif words and (verb == "help" or words == ["--help"]):
                assert verb in VERBS or words[0] in (*VERBS, "VERB")
            elif words and verb in VERBS and verb not in ("advise", "compare", "convert", "new", "curve", "train"):
                own = [word for word in words if verb != "export" or word.partition("=")[0] not in EXPORT_OPTIONS]
                load(*one_experiment(own, KEYS, FLAGS))


# What was advised and failed


@pytest.mark.parametrize(
    "line",
    [
        "digits/edm solver.grid.rho=5",
        "digits/edm solver.grid.ratio_min=0.01",
        "cifar10_small/dlg solver.grid.ratio_min=0.01",
        "cifar10_small/dlg solver.grid=karras solver.grid.rho=5",
        "cifar10_small/tdpm method.critic=features method.frozen=true",
        "digits/edm network=ncsnpp network.width=16 network.attention=[] network.augment=9 training.augment=0.1",
        "digits/small_t prior.density.basis=dct",
    ],
)  # fmt: skip
def test_advice_builds(line: str):
    name, *words = line.split()
    method = experiment.build_method(load(name, words), load=False)
    for budget in method.sampler.by_nfe or (10,):
        method.sampler.plan(budget, 5000)
    if "augment" in line:
        assert method.phases()


def test_an_error_names_the_part_that_has_a_key():
    from diffaccel.errors import UsageError

    with pytest.raises(UsageError, match="grid 'listed' has no key 'rho'; it is a key of karras"):
        experiment.build_method(load("cifar10_small/dlg", ["solver.grid.rho=5"]), load=False, frozen=True)


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("digits/dlg checkpoint=", "which the experiment's fit does not train"),
        ("digits/edm checkpoint=", "the output of `diffaccel fit digits/edm`"),
        ("digits/small_t prior.checkpoint=", "the output of `diffaccel fit digits/small_t`"),
        ("digits/small_t checkpoint=", "which the experiment's fit does not train"),
    ],
)
def test_weights_that_are_missing_are_had_from_a_fit_that_leaves_them(line: str, remedy: str):
    from diffaccel.errors import UsageError
    from diffaccel.experiment.loading import check_trained

    name, *words = line.split()
    with pytest.raises(UsageError) as error:
        config = load(name, words)
        method = experiment.build_method(config, load=False)
        check_trained(config, method.sampler, "denoiser" in method.trained_networks())
    assert remedy in str(error.value)
