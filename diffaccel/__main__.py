"""The command line: ``diffaccel VERB [EXPERIMENT] key=value ...``."""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from diffaccel.errors import SharedError, UsageError, suggest
from diffaccel.storage import FULL, check_room, check_target
from diffaccel.text.escape import printable
from diffaccel.text.terminal import PlainConsole, print_lines, side_output

HELP = """\
diffaccel: which way of sampling in few steps is best, on your data, at your budget?

  diffaccel bench EXPERIMENT nfe=5,10,20 n=5000     measure points of the quality-versus-NFE curve
  diffaccel fit EXPERIMENT [resume=auto]            train; leaves weights and the curve
  diffaccel search EXPERIMENT nfe=5,10 seed=7       find the best prior and solver for each budget, in search.trials
  diffaccel tradeoff EXPERIMENT                     small T: the bound and the distance for each start time
  diffaccel compare DIR DIR ... [out=runs/compare]  put points of several runs side by side, paired by their noise
  diffaccel convert SRC DST                         foreign checkpoint to safetensors; --inspect SRC says what it is
  diffaccel sample EXPERIMENT nfe=10 n=64           write the images that bench measures (format=png or npz)
  diffaccel reference EXPERIMENT                    write statistics of the data, which bench compares with
  diffaccel list GROUP                              list the parts of a group (solver, prior ...); alone, the groups
  diffaccel explain GROUP NAME                      a part's keys, defaults and sources (explain solver heun)

EXPERIMENT is a YAML file or <data>/<method> under experiments/: digits/dlg, digits/edm, toy/dlg ...
(`diffaccel bench method=dlg data=digits nfe=10` is the same as `diffaccel bench digits/dlg nfe=10`).

Keys may be set on the command line; the frequent ones:
  nfe=10 or nfe=5,10       most network evaluations per image, burn-in included; one point each
  n=5000 seed=0            images per point, and their noise
  solver=ipndm             another part by name (solver, prior, process ...)
  solver.grid.ratio_min=0.01  a key of a part
  chains=100               chains of a Langevin-Gibbs prior
  checkpoint=FILE          weights of the denoiser; init=FILE: those that a fit begins it with
  batch_size= threads= devices= accelerator=
  precision=auto           bf16-mixed where the device has bf16 units, else 32-true; or one of Lightning's
  images=1000000 limit=64  training length; use only the first images of the data
  logger=wandb|csv|tensorboard|none  W&B writes offline unless wandb_mode=online (or WANDB_MODE)
  out=DIR                  runs/<data>/<method> by default
  dry_run=true             print the plan and its cost; measure nothing
"""

console = PlainConsole(stderr=True, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch is imported: threads that wait actively slow a run tenfold where something else takes a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not words or words[0] in ("help", "-h", "--help"):
        print_lines(*HELP.splitlines())
        return 0
    if words[0] in ("version", "--version"):
        from diffaccel import __version__

        print_lines(f"diffaccel {__version__}")
        return 0
    verbs: dict[str, Callable[[Any], None]] = {
        "bench": bench,
        "fit": fit,
        "search": search,
        "tradeoff": tradeoff,
        "sample": sample,
        "reference": reference,
    }
    verb = words.pop(0)
    if verb in PATH_VERBS and not {"-h", "--help", "help"} & set(words):
        return _guarded(lambda: PATH_VERBS[verb](words))
    if verb in (*verbs, *PATH_VERBS) and (words[:1] == ["help"] or {"-h", "--help"} & set(words)):
        print_lines(*HELP.splitlines())
        return 0

    def run() -> None:
        if verb not in verbs:
            raise UsageError(
                f"no command is called {verb!r}{suggest(verb, [*verbs, *PATH_VERBS])} (see `diffaccel help`)"
            )
        _quiet()
        from diffaccel.config import FLAGS, KEYS, load
        from diffaccel.parts.overrides import one_experiment
        from diffaccel.run import launch
        from diffaccel.run.machine import settle

        experiment, settings = one_experiment(words, KEYS, FLAGS)
        # Statistics are written to OUT, and not over those that the experiment reads.
        instead = {"reference": "", "floor": ""} if verb == "reference" else None
        config = load(experiment, settings, instead)
        writes = not (config.dry_run and verb in ("bench", "sample"))
        with launch.folder_of(config) if writes else nullcontext():
            settle(config)
            verbs[verb](config)

    return _guarded(run)


def _guarded(run: Callable[[], None]) -> int:
    """Run, and turn what a user can mend, or did, into one line and an exit status."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        # A scheduler's SIGTERM is a Ctrl-C: Lightning alone notes it and, but in training, goes on.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run()
    except SharedError as error:
        from lightning.pytorch.utilities import rank_zero_only  # late, as all that takes seconds to import

        rank_zero_only(console.print)(printable(f"diffaccel: {error}"), style="red")
        return 2
    except UsageError as error:
        console.print(printable(f"diffaccel: {error}"), style="red")
        return 2
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        where = "the output" if error.filename is None else error.filename
        console.print(printable(f"diffaccel: {where}: {error.strerror}"), style="red")
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        console.print(
            "diffaccel: interrupted; what was finished is kept (bench, sample and search go on from it, "
            "fit with resume=auto)"
        )
        return 130
    return 0


def compare(words: list[str]) -> None:
    """Print the points of several runs side by side, and write a page of them."""
    from diffaccel.parts.overrides import paths_and_options
    from diffaccel.verbs import compare as comparison

    sources, options = paths_and_options(words, ["out", "reference"], "compare")
    out = Path(options.get("out") or "runs/compare").expanduser()
    comparison.check_out(out)
    check_target(out / "index.html")
    rows = comparison.compare(sources, options.get("reference"), console.print)
    comparison.write(rows, out)
    comparison.show(rows)
    print_lines(f"index.html, curve.png, compare.csv and table.md are in {out}")


def convert(words: list[str]) -> None:
    """Write a checkpoint of another program as our safetensors, or with ``--inspect`` say what it holds."""
    from diffaccel import pretrained
    from diffaccel.parts.overrides import paths_and_options, scalar
    from diffaccel.run.targets import check_new

    paths, options = paths_and_options(words, pretrained.OPTIONS, "convert", flags=["inspect", "again"])
    inspects, again = (scalar(options.pop(flag, "no")) is True for flag in ("inspect", "again"))
    if len(paths) != (1 if inspects else 2):
        raise UsageError("convert takes a checkpoint and the name of a new .safetensors, or --inspect and a checkpoint")
    if not inspects:
        check_new([Path(paths[1])], again)
    typed: dict[str, Any] = {}
    for key, value in options.items():
        try:
            typed[key] = pretrained.OPTIONS[key](value)
        except ValueError:
            raise UsageError(f"{key}={value} is no number") from None
    source = Path(paths[0])
    found = pretrained.read(source, **typed) if inspects else pretrained.convert(source, Path(paths[1]), **typed)
    print_lines(*pretrained.describe(found).splitlines())
    if not inspects:
        print_lines(f"{paths[1]}: give it as checkpoint= to any experiment with images of shape {found.shape}")


def list_parts(words: list[str]) -> None:
    """Print the groups of parts, or the parts of one."""
    from diffaccel.verbs.listing import show_list

    show_list(words)


def explain(words: list[str]) -> None:
    """Print what a part is, its keys and its references."""
    from diffaccel.verbs.listing import show_explanation

    show_explanation(words)


PATH_VERBS: dict[str, Callable[[list[str]], None]] = {
    "compare": compare,
    "convert": convert,
    "list": list_parts,
    "explain": explain,
}
"""Commands that take no experiment."""


def bench(config: Any) -> None:
    """Measure the configured budgets with the configured weights."""
    from torch.utils.data import DataLoader

    from diffaccel import experiment
    from diffaccel.report.table import print_points
    from diffaccel.run import launch

    if (planned := _plan(config)) is None:
        return
    method, _ = planned
    evaluator = experiment.build_evaluator(config, method)
    if launch.is_first(config):
        check_room(config.folder, *evaluator.room(), "features")
    launch.write_config(config, "points.jsonl")
    trainer = launch.build_trainer(config, [evaluator])
    method.eval()
    try:
        trainer.test(method, DataLoader([0]), verbose=False)  # type: ignore[arg-type]
    finally:
        _finish(config)
    if trainer.is_global_zero:
        print_points(evaluator.points, evaluator.extractor.metric_name, evaluator.out)


def _plan(config: Any) -> tuple[Any, dict[float, Any]] | None:
    """Build the method and plan its budgets; a dry run prints them and stops there."""
    from diffaccel import experiment

    method = experiment.build_method(config, load=not config.dry_run, frozen=True)
    plans = {budget: method.plan(budget, config.n) for budget in config.nfe}
    if not config.dry_run:
        return method, plans
    from diffaccel.verbs.cost import print_cost

    print_cost(config, method, plans)
    return None


def search(config: Any) -> None:
    """Find the best prior and solver for each configured budget."""
    from torch.utils.data import DataLoader

    from diffaccel import experiment
    from diffaccel.run import launch

    method = experiment.build_method(config, frozen=True)
    searcher = experiment.build_searcher(config, method)
    launch.write_config(config, "trials.jsonl", "best.yaml")
    config.logger = "none"
    trainer = launch.build_trainer(config, [searcher])
    method.eval()
    trainer.test(method, DataLoader([0]), verbose=False)  # type: ignore[arg-type]
    if trainer.is_global_zero:
        print_lines(f"{len(searcher.measured)} trials are in {Path(searcher.out, 'trials.jsonl')}, the winners in "
              f"{Path(searcher.out, 'best.yaml')}: measure them on another seed with `diffaccel bench`")  # fmt: skip


def tradeoff(config: Any) -> None:
    """Measure the bound and the distance of samples as functions of the start time."""
    from torch.utils.data import DataLoader

    from diffaccel import experiment
    from diffaccel.evaluation.tradeoff import TradeoffCurve, best, starts_of
    from diffaccel.methods import SmallTimeDiffusion
    from diffaccel.run import launch
    from diffaccel.run.targets import check_new

    method = experiment.build_method(config, frozen=True)
    if not isinstance(method, SmallTimeDiffusion):
        raise UsageError(f"{config.experiment} has no T to choose: take {config.data_name}/small_t, say")
    if launch.is_first(config):
        check_new([config.folder / "tradeoff.csv"], config.again)
    starts = starts_of(method, config.tradeoff.T, experiment.build_fitted(config, method))
    settings, data = config.tradeoff, experiment.build_data(config)
    evaluator = experiment.build_evaluator(config, method, measured=False) if settings.fd else None
    likelihood = experiment.build_likelihood(config, method)
    curve = TradeoffCurve(settings, starts, data, evaluator, likelihood, config.seed, config.batch_size, config.folder)
    launch.write_config(config, "tradeoff.csv")
    config.logger = "none"
    trainer = launch.build_trainer(config, [curve])
    method.eval()
    trainer.test(method, DataLoader([0]), verbose=False)  # type: ignore[arg-type]
    if trainer.is_global_zero:
        found = ", ".join(f"{name} at T = {T:g}" for name, T in best(curve.rows).items())
        print_lines(f"least bound: {found}; tradeoff.csv and tradeoff.png are in {config.folder}")


def fit(config: Any) -> None:
    """Train a method, or the feature network that scores."""
    from diffaccel import experiment
    from diffaccel.data.module import check_labels
    from diffaccel.experiment import loading
    from diffaccel.report.table import print_points
    from diffaccel.run import launch
    from diffaccel.run.targets import resume_from

    frozen = config.method_name != "extractor" and experiment.keeps_denoiser(config)
    if config.init and (frozen or config.method_name == "extractor" or not config.network):
        raise UsageError("init: this fit trains no denoiser: remove it (checkpoint= names a frozen one's weights)")
    if config.method_name == "extractor":
        _fit_extractor(config)
        return
    for part in (config.posterior, config.prior, *(entry.get("prior", {}) for entry in config.by_nfe.values())):
        part.pop("checkpoint", None)  # what is trained starts anew; what is frozen keeps its weights
    method = experiment.build_method(config, load=frozen)
    data = experiment.build_data(config)
    check_labels(data, method.trained_classes)
    resume = resume_from(config, [*method.exports()], console)
    checkpointer = launch.build_checkpointer(config)
    if launch.is_first(config):
        checkpointer.check_outputs(method)
    if resume is not None:
        checkpointer.check_same_run(resume, loading.check_resumable(resume, method))
    callbacks: list[Any] = [checkpointer]
    evaluator = None
    if config.reference and Path(config.reference).is_file():
        with method.tuning():
            for budget in config.nfe:
                method.plan(budget, config.n)
                if config.training.evaluate_every is not None:
                    method.plan(budget, config.training.evaluate_n)
        evaluator = experiment.build_evaluator(config, method, measured=False)
        callbacks.append(evaluator)
        if config.training.keep_best is not None:
            callbacks.append(launch.build_best(config, evaluator))
    else:
        console.print("no reference file: the end of the fit is not evaluated (see `diffaccel reference`)")
    launch.write_config(config)
    trainer = launch.build_trainer(config, callbacks, training=True, phases=len(method.phases()))
    try:
        trainer.fit(method, data, ckpt_path=resume, weights_only=True)
    finally:
        _finish(config)
    if not trainer.is_global_zero:
        return
    for line in method.describe_fit(data):
        console.print(line)
    if evaluator is not None:
        print_points(evaluator.points, evaluator.extractor.metric_name, evaluator.out)
    console.print(f"{method.images_seen} images seen; weights and state are in {config.folder}")


def sample(config: Any) -> None:
    """Write the images that bench measures, a folder for each budget."""
    from diffaccel.verbs.sample import sample as write_images

    if (planned := _plan(config)) is not None:
        for folder in write_images(config, *planned):
            print_lines(str(folder))


def reference(config: Any) -> None:
    """Write the statistics that bench compares with: of the training split, and of the test split for the floor."""
    from diffaccel.verbs.reference import write_statistics

    if words := write_statistics(config):
        print_lines(f"to use them, add to bench: {words}")


def _fit_extractor(config: Any) -> None:
    from diffaccel import experiment
    from diffaccel.features.extractors import save_classifier
    from diffaccel.features.fitting import fit_extractor
    from diffaccel.parts.registry import Registry
    from diffaccel.run import launch
    from diffaccel.run.machine import announce, device_type
    from diffaccel.run.targets import resume_from

    recipes: Registry[Any] = Registry("method")
    recipes.register("extractor")(fit_extractor)
    data = experiment.build_data(config)
    resume = resume_from(config, ["extractor"], console)
    launch.write_config(config, "last.ckpt", "extractor.safetensors")
    if config.precision not in ("32-true", "bf16-mixed"):
        raise UsageError(f"precision={config.precision}: an extractor is trained in 32-true or bf16-mixed")
    announce(config)
    started = time.monotonic()
    recipe = dict(config.method)
    metric = recipe.pop("metric", config.data["name"])
    context = {"state_path": config.folder / "last.ckpt", "resume": resume, "console": console}
    context |= {"device": device_type(config), "bf16": config.precision == "bf16-mixed"}
    model, accuracy = recipes.build(recipe, data=data, seed=config.seed, **context)
    path = config.folder / "extractor.safetensors"
    save_classifier(model, path, metric, data.label, accuracy, config.seed)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{path}: test accuracy {accuracy:.2%}, {minutes:.1f} minutes")


def _finish(config: Any) -> None:
    """Close W&B's run: the next one in this process would go on writing into it."""
    if config.logger == "wandb":
        with side_output("W&B, as it closed,"):
            import wandb

            wandb.finish()


def _quiet() -> None:
    """Leave the terminal to our own lines."""
    os.environ.setdefault("WANDB_SILENT", "true")
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    import lightning.pytorch  # first: its import sets the levels that are set here

    for name in ("lightning.pytorch", "lightning.fabric", lightning.pytorch.utilities.rank_zero.__name__):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
