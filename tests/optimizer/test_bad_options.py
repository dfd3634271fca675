"""Options that FusedLayca refuses: each with the name, the value and the way out, and with nothing modified."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.backends import load
from layca_fast.formulas.bases import BASES

from ..support import contents, copy_of, parameter, params_of, random_gradients, running, same_bits, train

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class BadOption:
    """Options that are refused wherever they come from, and what the message must match."""

    name: str
    options: Mapping[str, Any]
    error: type[Exception]
    message: str


LR_RANGE = r"must be finite and >= 0"


BAD_OPTIONS = (
    BadOption("negative lr", {"lr": -0.1}, ValueError, rf"lr=-0\.1: {LR_RANGE}"),
    BadOption("lr NaN", {"lr": NAN}, ValueError, rf"lr=nan: {LR_RANGE}"),
    BadOption("lr infinite", {"lr": INF}, ValueError, rf"lr=inf: {LR_RANGE}"),
    BadOption("negative lr in a tensor", {"lr": torch.tensor(-0.5)}, ValueError, rf"lr=tensor\(-0\.5.*{LR_RANGE}"),
    BadOption("lr NaN in a tensor", {"lr": torch.tensor(NAN)}, ValueError, rf"lr=tensor\(nan\).*{LR_RANGE}"),
    BadOption("two rates in one tensor", {"lr": torch.ones(2)}, ValueError, r"lr.*\(2,\).*must hold one number"),
    BadOption("lr as text", {"lr": "0.1"}, TypeError, r"lr='0\.1': must be a number"),
    BadOption("unknown base", {"base": "adamw9"}, ValueError, r"base='adamw9' is unknown.*'adam', .*'sgd_amom'"),
    BadOption("unknown rule", {"rule": "lamb"}, ValueError, r"rule='lamb' is unknown.*'layca', 'hyperball'"),
    BadOption("unknown radius", {"radius": "first"}, ValueError, r"radius='first' is unknown.*'initial', 'current'"),
    BadOption("unknown backend", {"backend": "warp"}, ValueError, r"backend='warp' is unknown.*'auto'.*'cpu'.*'torch'"),
    BadOption("capturable as text", {"capturable": "yes"}, ValueError, r"capturable='yes' is unknown.*\[False, True\]"),
    BadOption("rotate as text", {"rotate": "yes"}, ValueError, r"rotate='yes': must be True, False, or None"),
    BadOption("no chunks", {"chunks": 0}, ValueError, r"chunks=0: must be a whole number >= 1, or 'all'"),
    BadOption("negative chunks", {"chunks": -2}, ValueError, r"chunks=-2: must be a whole number >= 1, or 'all'"),
    BadOption("fractional chunks", {"chunks": 1.5}, ValueError, r"chunks=1\.5: must be a whole number"),
    BadOption("chunks as another text", {"chunks": "each"}, ValueError, r"chunks='each': .*'all'"),
    BadOption("no sizes", {"chunks": ()}, ValueError, r"chunks=\(\): .*sizes along the first dimension"),
    BadOption("a size of zero", {"chunks": (3, 0)}, ValueError, r"chunks=\(3, 0\): .*sizes"),
    BadOption("fractional sizes", {"chunks": [1.5, 2]}, ValueError, r"chunks=\[1\.5, 2\]|chunks=\(1\.5, 2\)"),
    BadOption("sizes of matrices", {"chunks": ("matrices", (2, 3))}, ValueError, r"'matrices', \(2, 3\).*must be"),
    BadOption("columns in text", {"chunks": ("columns", "all")}, ValueError, r"'columns', 'all'.*\('columns', n\)"),
    BadOption("chunks as a truth value", {"chunks": True}, ValueError, r"chunks=True: must be a whole number"),
    BadOption("negative weight decay", {"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1: .*finite.*>= 0"),
    BadOption("weight decay NaN", {"weight_decay": NAN}, ValueError, r"weight_decay=nan: .*finite.*>= 0"),
    BadOption("compensate as text", {"compensate": "yes"}, ValueError, r"compensate='yes': must be True or False"),
    BadOption("compensate as a number", {"compensate": 1}, ValueError, r"compensate=1: must be True or False .*None"),
    BadOption(
        "state_dtype of float16",
        {"state_dtype": torch.float16},
        ValueError,
        r"state_dtype=torch\.float16 is unknown.*None, torch\.bfloat16, torch\.float32",
    ),
    BadOption("state_dtype as text", {"state_dtype": "bf16"}, ValueError, r"state_dtype='bf16' is unknown.*bfloat16"),
    BadOption("negative momentum", {"momentum": -0.9}, ValueError, r"momentum=-0\.9: must be a number in \[0, inf\)"),
    BadOption("momentum NaN", {"momentum": NAN}, ValueError, r"momentum=nan: must be a number in \[0, inf\)"),
    BadOption("dampening NaN", {"dampening": NAN}, ValueError, r"dampening=nan: must be a finite number"),
    BadOption(
        "nesterov without momentum",
        {"nesterov": True, "momentum": 0.0},
        ValueError,
        r"nesterov=True needs momentum > 0.*momentum=0\.0.*nesterov=False",
    ),
    BadOption(
        "nesterov with dampening",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        r"nesterov=True needs .*dampening = 0.*dampening=0\.1",
    ),
    BadOption(
        "averaging momentum of 1",
        {"base": "sgd_amom", "momentum": 1.0},
        ValueError,
        r"momentum=1\.0: must be a number in \[0, 1\)",
    ),
    *(
        BadOption(f"{base} with betas {betas}", {"base": base, "betas": betas}, ValueError, message)
        for base in ("adam", "lion")
        for betas, message in (
            ((1.0, 0.9), r"betas=\(1\.0, 0\.9\): must be two numbers in \[0, 1\)"),
            ((0.9, -0.1), r"betas=\(0\.9, -0\.1\): must be two numbers"),
            ((0.9, NAN), r"betas=\(0\.9, nan\): must be two numbers"),
            ((0.9,), r"betas=\(0\.9,\): must be two numbers"),
            (0.9, r"betas=0\.9: must be two numbers"),
            (("0.9", 0.9), r"betas=\('0\.9', 0\.9\): must be two numbers"),
        )
    ),
    *(
        BadOption(f"{base} with eps {eps}", {"base": base, "eps": eps}, ValueError, rf"eps={eps}: .*\[0, inf\)")
        for base in ("adam", "rmsprop", "adagrad")
        for eps in (-1e-8, NAN, INF)
    ),
    BadOption(
        "lion that forgets", {"base": "lion", "betas": (0.9, 0.0)}, ValueError, r"betas=.*second beta.*at least 0\.01"
    ),
    *(
        BadOption(f"muon with momentum {value}", {"base": "muon", "momentum": value}, ValueError, message)
        for value, message in (
            (1.0, r"momentum=1\.0: .*\[0, 1\)"),
            (-0.1, r"momentum=-0\.1: "),
            (NAN, "momentum=nan: "),
        )
    ),
    *(
        BadOption(
            f"muon with ns_steps {value!r}",
            {"base": "muon", "ns_steps": value},
            ValueError,
            r"ns_steps=.* from 1 to 99",
        )
        for value in (0, -1, 100, 2.5, True, "5")
    ),
    *(
        BadOption(
            f"muon with ns_coefficients {value!r}",
            {"base": "muon", "ns_coefficients": value},
            ValueError,
            r"ns_coefficients=.*: must be three finite numbers \(a, b, c\)",
        )
        for value in (3.4, (3.4, -4.7), (3.4, -4.7, NAN), (3.4, -4.7, 2.0, 0.0), ("a", "b", "c"))
    ),
    BadOption("muon with eps", {"base": "muon", "eps": -1e-8}, ValueError, r"eps=-1e-08: .*\[0, inf\)"),
    BadOption("nesterov of muon", {"base": "muon", "nesterov": "no"}, ValueError, r"nesterov='no': must be True or"),
    BadOption(
        "ns_dtype of float16",
        {"base": "muon", "ns_dtype": torch.float16},
        ValueError,
        r"ns_dtype=torch\.float16 is unknown.*torch\.bfloat16, torch\.float32, torch\.float64",
    ),
    BadOption(
        "another adjust_lr",
        {"base": "muon", "adjust_lr": "mine"},
        ValueError,
        r"adjust_lr='mine' is unknown.*'original', 'match_rms_adamw'",
    ),
    BadOption("amsgrad as text", {"base": "adam", "amsgrad": "no"}, ValueError, r"amsgrad='no': must be True or False"),
    BadOption("alpha of 1", {"base": "rmsprop", "alpha": 1.0}, ValueError, r"alpha=1\.0: must be a number in \[0, 1\)"),
    BadOption("negative alpha", {"base": "rmsprop", "alpha": -0.1}, ValueError, r"alpha=-0\.1: .*\[0, 1\)"),
    BadOption(
        "centered as number", {"base": "rmsprop", "centered": 2}, ValueError, r"centered=2: must be True or False"
    ),
    BadOption("rmsprop momentum", {"base": "rmsprop", "momentum": -1}, ValueError, r"momentum=-1: .*\[0, inf\)"),
    BadOption(
        "negative accumulator",
        {"base": "adagrad", "initial_accumulator_value": -1.0},
        ValueError,
        r"initial_accumulator_value=-1\.0: must be a number in \[0, inf\)",
    ),
)


OF_ANOTHER_BASE = (
    BadOption(
        "option of another base",
        {"base": "sgd_amom", "nesterov": True},
        TypeError,
        r"nesterov=True is no option of base='sgd_amom' \(it belongs to .*sgd\): it has \['momentum'\]",
    ),
    BadOption(
        "betas for rmsprop", {"base": "rmsprop", "betas": (0.9, 0.9)}, TypeError, r"betas=.*belongs to .*adam.*lion"
    ),
    BadOption("AdamW", {"base": "adamw"}, ValueError, r"base='adamw' is unknown: 'adam' is it, for its weight decay"),
    BadOption("misspelt base", {"base": "Adma"}, ValueError, r"base='Adma' is unknown: did you mean 'adam'\?"),
    BadOption("eps for lion", {"base": "lion", "eps": 1e-8}, TypeError, r"eps=1e-08 is no option of base='lion'"),
    BadOption("ns_steps for adam", {"base": "adam", "ns_steps": 5}, TypeError, r"ns_steps=5.*belongs to muon"),
    BadOption(
        "two options of another base",
        {"base": "sgd_amom", "momentum": 0.9, "dampening": 0.1},
        TypeError,
        r"dampening=0\.1 is no option of base='sgd_amom'",
    ),
)


ids = {"ids": lambda case: case.name}


def with_the_rest_of_its_base(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a group needs beside them, so that it is these that are refused."""
    base = BASES.get(options.get("base", ""))
    return {**(base.options if base else {}), **options}


@pytest.mark.parametrize("case", BAD_OPTIONS + OF_ANOTHER_BASE, **ids)
def test_the_constructor_refuses(case: BadOption, seed: int) -> None:
    param = parameter(3, 4)
    before = copy_of(param)
    with pytest.raises(case.error, match=case.message):
        FusedLayca([param], **{"lr": 0.1, "backend": "torch", **case.options})
    assert same_bits(copy_of(param), before)


@pytest.mark.parametrize("case", BAD_OPTIONS, **ids)
def test_a_new_group_is_refused_and_the_run_goes_on(case: BadOption, seed: int) -> None:
    optimizer = running()
    before, groups = contents(optimizer), optimizer.state_dict()["param_groups"]
    given = {"params": [("new", parameter(2, 3))], **case.options}
    with pytest.raises(case.error, match=case.message):
        optimizer.add_param_group(given)
    assert same_bits(contents(optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.step()


@pytest.mark.parametrize("case", BAD_OPTIONS, **ids)
def test_an_option_set_mid_run_is_refused_and_the_run_goes_on(case: BadOption, seed: int) -> None:
    optimizer = running()
    before, good = contents(optimizer), dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(with_the_rest_of_its_base(case.options))
    with pytest.raises(case.error, match=case.message):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    optimizer.param_groups[0].update(good)
    optimizer.step()
    assert not same_bits(contents(optimizer), before)


@pytest.mark.parametrize("case", BAD_OPTIONS, **ids)
def test_an_option_set_before_the_first_step_is_refused(case: BadOption, seed: int) -> None:
    param = parameter(3, 4)
    optimizer = FusedLayca([param], 0.1, momentum=0.9, backend="torch")
    optimizer.param_groups[0].update(with_the_rest_of_its_base(case.options))
    param.grad = torch.randn_like(param)
    before = contents(optimizer)
    with pytest.raises(case.error, match=case.message):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    assert len(optimizer.state) == 0


def test_the_constructor_refuses_unknown_keywords_and_lists_those_it_has(seed: int) -> None:
    with pytest.raises(TypeError, match=r"betas=\(0\.9, 0\.99\).*base='sgd'.*'dampening', 'momentum', 'nesterov'"):
        FusedLayca([parameter(3, 4)], 0.1, betas=(0.9, 0.99))
    with pytest.raises(TypeError, match=r"lr_decay=0\.1.*base='adagrad'.*'eps', 'initial_accumulator_value'"):
        FusedLayca([parameter(3, 4)], 0.1, base="adagrad", lr_decay=0.1)


@pytest.mark.parametrize("shape", [(3, 4), (2, 2)], ids=str)
def test_a_group_must_be_a_dict(shape: tuple[int, ...], seed: int) -> None:
    optimizer = running()
    before = contents(optimizer)
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([parameter(*shape)])
    assert same_bits(contents(optimizer), before)


def test_a_base_set_mid_run_whose_options_the_group_lacks_says_which(seed: int) -> None:
    optimizer = running(base="sgd_amom")
    before = contents(optimizer)
    optimizer.param_groups[0]["base"] = "sgd"
    with pytest.raises(ValueError, match=r"base='sgd'.*dampening.*nesterov"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)


def test_one_bad_group_stops_the_others_too(seed: int) -> None:
    """Nothing may be half stepped, whichever group or batch comes first."""
    optimizer = running()
    optimizer.add_param_group({"params": [("wide", Parameter(torch.randn(3, 3).double()))], "momentum": 0.0})
    optimizer.add_param_group({"params": [("late", parameter(6, 2))], "base": "sgd_amom"})
    train(optimizer, random_gradients(params_of(optimizer), 1))
    before = contents(optimizer)
    optimizer.param_groups[2]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)


def test_a_backend_that_cannot_run_here_says_why(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = running()
    before = contents(optimizer)
    monkeypatch.setattr(load("cpu"), "missing", lambda: "no C++ compiler was found")
    optimizer.param_groups[0]["backend"] = "cpu"
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run on cpu: no C\+\+ compiler was found.*'auto'"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    optimizer.param_groups[0]["backend"] = "auto"
    optimizer.step()
    assert not same_bits(contents(optimizer), before), "auto must fall back to torch"


def test_the_cuda_backend_says_that_it_is_not_there(seed: int) -> None:
    param = parameter(3, 4)
    before = copy_of(param)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run.*'auto'"):
        train(FusedLayca([param], 0.1, backend="cuda"), random_gradients([param], 1))
    assert same_bits(copy_of(param), before)
