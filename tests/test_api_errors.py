"""Mistakes in a notebook: each is one ``UsageError`` of one sentence, and no traceback from within."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_api import ROOT, by_class

import diffaccel as da
from diffaccel.prior import GaussianPrior
from diffaccel.sampling import Setting
from diffaccel.solver import SOLVERS

BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n=0: it must be 1 or more|n=0: it must be from 1"),
    ({"n": -1}, "n=-1: it must be"),
    ({"n": 2.5}, "n=2.5: give a whole number"),
    ({"n": "ten"}, "n='ten': give a whole number"),
    ({"n": True}, "n=True: give a whole number"),
    ({"nfe": 0}, "nfe=0: it must be positive"),
    ({"nfe": -3}, "nfe=-3: it must be positive"),
    ({"nfe": 0.5}, "nfe=0.5 is below the minimum of 1"),
    ({"nfe": "x"}, "nfe='x': give a number"),
    ({"nfe": math.nan}, "nfe=nan: it must be"),
    ({"nfe": None}, "nfe=None: give a number"),
    ({"nfe": [5, 10]}, r"nfe=\[5, 10\]: give a number"),
    ({"seed": -1}, "seed=-1: it must be"),
    ({"seed": 1.5}, "seed=1.5: give a whole number"),
    ({"batch_size": 0}, "batch_size=0: it must be"),
    ({"batch_size": 2.5}, "batch_size=2.5: give a whole number"),
]


@pytest.fixture(scope="module")
def model() -> da.Model:
    return da.load("digits/edm")


def one_sentence(error: pytest.ExceptionInfo[da.UsageError]) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("given", "said"), BAD_CALLS, ids=str)
def test_a_bad_argument_of_a_call_is_refused(model: da.Model, given: dict[str, Any], said: str):
    with pytest.raises(da.UsageError, match=said) as error:
        da.Sampler(model)(**{"n": 4, "nfe": 3, **given})
    one_sentence(error)


KINDS = [{"n": np.int64(4)}, {"nfe": 3.0}, {"nfe": 3.5}, {"nfe": np.float64(3)}, {"seed": np.int32(0)}]


@pytest.mark.parametrize("given", KINDS, ids=str)
def test_any_kind_of_number_will_do(model: da.Model, given: dict[str, Any]):
    expected = da.Sampler(model)(4, nfe=3)
    assert torch.equal(da.Sampler(model)(**{"n": 4, "nfe": 3, **given}), expected)


SETTING = Setting(GaussianPrior(), SOLVERS.build("heun"))
BAD_SAMPLERS: list[tuple[dict[str, Any], str]] = [
    ({"prior": "gausian"}, "no prior is called 'gausian'; did you mean 'gaussian'"),
    ({"solver": "huen"}, "no solver is called 'huen'; did you mean 'heun'"),
    ({"prior": {"name": "gaussian", "ratio": 3}}, "prior 'gaussian' has no key 'ratio'"),
    ({"solver": {"name": "ddim", "etta": 1}}, "solver 'ddim' has no key 'etta'"),
    ({"prior": SOLVERS.build("heun")}, "prior: Heun.* is not a prior"),
    ({"solver": GaussianPrior()}, "solver: GaussianPrior.* is not a solver"),
    ({"prior": 3}, "prior: 3 is not a prior"),
    ({"solver": ["heun"]}, r"solver: \['heun'\] is not a solver"),
    ({"solver": type(SOLVERS.build("heun"))}, "is not a solver"),
    ({"by_nfe": {3: "ddim"}}, "by_nfe=.*: give budgets"),
    ({"by_nfe": 3}, "by_nfe=3: give budgets"),
    *(
        ({"by_nfe": {n: SETTING}}, f"by_nfe: {n} is not a budget: give a whole number from 1")
        for n in (0, -3, True, 2.5)
    ),
    ({"by_nfe": {5: Setting("gaussian", SETTING.solver)}}, "by_nfe.5: the prior 'gaussian' is not a Prior: build it"),
    ({"by_nfe": {5: Setting(SETTING.prior, "heun")}}, "by_nfe.5: the solver 'heun' is not a Solver: build it"),
    ({"by_nfe": {5: SETTING}, "solver": "heun"}, "solver='heun' .*by_nfe.*: leave out"),
    ({"by_nfe": {5: SETTING}, "prior": GaussianPrior()}, "prior=.* .*by_nfe.*: leave out"),
    ({"prior": ""}, "prior: '' is not a prior"),
    ({"solver": ""}, "solver: '' is not a solver"),
    ({"tweedie": 0.02}, "tweedie=0.02: give an object of type Tweedie"),
    ({"kind": "png"}, "kind='png': give an object of type ImageKind"),
    ({"prior": "chain"}, "prior 'chain' .*(reads noise levels|requires a posterior)"),
    ({"prior": {"name": "implicit", "ratio_star": 1.0}}, "has no weights for its prior|network of its own"),
    ({"batch_size": 0}, "batch_size=0: it must be"),
    ({"precision": "double"}, "precision='double' is none of .*64-true"),
]


@pytest.mark.parametrize("alone", [False, True], ids=["model", "denoiser"])
@pytest.mark.parametrize(("given", "said"), BAD_SAMPLERS, ids=str)
def test_a_bad_part_is_refused(model: da.Model, alone: bool, given: dict[str, Any], said: str):
    with pytest.raises(da.UsageError, match=said) as error:
        da.Sampler(model.denoiser if alone else model, **({"shape": (1, 8, 8)} if alone else {}), **given)
    one_sentence(error)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8, 8), (1, 0, 8), (1.0, 8.0, 8.5), 8, "188"], ids=str)
def test_a_bad_shape_is_refused(model: da.Model, shape: Any):
    with pytest.raises(da.UsageError, match=r"shape=.*: give \(C, H, W\)") as error:
        da.Sampler(model.denoiser, shape=shape)
    one_sentence(error)


def test_a_model_by_its_name_is_refused_with_what_loads_it():
    with pytest.raises(da.UsageError, match=r"da.load\('digits/edm'\)"):
        da.Sampler("digits/edm")  # type: ignore[arg-type]
    with pytest.raises(da.UsageError, match="does not define the shape"):
        da.Sampler(by_class().denoiser)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"images": [[1]]}, "images are a list: give a tensor"),
        ({"images": np.zeros((4, 1, 8, 8), np.uint8)}, "images are a ndarray: give a tensor"),
        ({"images": torch.zeros(4, 8, 8, dtype=torch.uint8)}, r"shape \(4, 8, 8\), not \(n, 1, 8, 8\)"),
        ({"images": torch.zeros(4, 1, 8, 8).double()}, "torch.float64: give uint8"),
        ({"batch_size": 0}, "batch_size=0: it must be"),
        ({"reference": None}, "reference=None: give a data set's name"),
        ({"reference": "digit"}, "did you mean 'digits'"),
        ({"extractor": "incepton"}, "did you mean 'inception'"),
    ],
    ids=str,
)
def test_a_bad_argument_of_measure_is_refused(given: dict[str, Any], said: str):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(da.UsageError, match=said) as error:
        da.measure(**{"images": images, "reference": "digits", **given})
    one_sentence(error)


def test_a_source_that_is_no_model_is_refused(tmp_path: Path):
    fitted, empty = tmp_path / "fit", tmp_path / "empty"
    fitted.mkdir()
    empty.mkdir()
    (fitted / "ema.safetensors").touch()
    for source, said in (
        (5, "neither a name nor a path"),
        (fitted, "folder of a fit: load one of its files, .*ema.safetensors"),
        (empty, "refused"),
        (ROOT / "README.md", "it is text"),
    ):
        with pytest.raises(da.UsageError, match=said) as error:
            da.load(source)  # type: ignore[arg-type]
        one_sentence(error)
    for keys, said in (
        ({"checkpoint": "no.safetensors"}, "do not exist"),
        ({"solvr": 1}, "'solver'"),
        ({"solver": object()}, "is no setting: give a number"),
        ({"by_nfe": {3: {"solver": object()}}}, "is no setting"),
    ):
        with pytest.raises(da.UsageError, match=said) as error:
            da.load("digits/edm", **keys)
        one_sentence(error)


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"nfe": 0}, "nfe"), ({"n": -1}, "n=-1"), ({"solvr": "heun"}, "did you mean 'solver'"), ({"nfe": "x"}, "nfe")],
    ids=str,
)
def test_a_bad_setting_of_a_command_is_refused(tmp_path: Path, keys: dict[str, Any], said: str):
    with pytest.raises(da.UsageError, match=said) as error:
        da.bench("toy/edm", **keys, out=tmp_path, logger="none")
    one_sentence(error)
