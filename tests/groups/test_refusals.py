"""What layer_groups refuses: each with the name, the value and the way out, and with nothing modified."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from layca_fast import FusedLayca, layer_groups

from ..support import contents, parameter, running, same_bits


@dataclass(frozen=True)
class BadArgument:
    """Arguments that are refused, and what the message must match."""

    name: str
    arguments: Mapping[str, Any]
    error: type[Exception]
    message: str


BAD = (
    BadArgument("alpha 1", {"alpha": 1.0}, ValueError, r"alpha=1\.0: must lie strictly between -1.*and 1.*0 gives"),
    BadArgument("alpha -1", {"alpha": -1}, ValueError, r"alpha=-1: must lie strictly between"),
    BadArgument("alpha NaN", {"alpha": math.nan}, ValueError, r"alpha=nan: must lie strictly between"),
    BadArgument("alpha as text", {"alpha": "0.5"}, TypeError, r"alpha='0\.5': must be a number"),
    BadArgument("negative lr", {"lr": -0.1}, ValueError, r"(?<!_)lr=-0\.1: must be finite and >= 0"),
    BadArgument("two rates", {"lr": torch.ones(2)}, ValueError, r"lr is a tensor of shape \(2,\)"),
    BadArgument("infinite others_lr", {"others_lr": math.inf}, ValueError, r"others_lr=inf: must be finite"),
    BadArgument("others_lr as text", {"others_lr": "1"}, TypeError, r"others_lr='1': must be a number"),
    BadArgument("others", {"others": "drop"}, ValueError, r"others='drop' is unknown.*'train', 'freeze'"),
    BadArgument(
        "others_lr of the frozen",
        {"others": "freeze", "others_lr": 0.1},
        ValueError,
        r"others_lr=0\.1: others='freeze' trains no others; leave others_lr out",
    ),
    BadArgument("embeddings", {"embeddings": "yes"}, ValueError, r"embeddings='yes' is unknown.*False, True"),
    BadArgument("rotate as in a group", {"rotate": True}, TypeError, r"rotate=True: must be a list of module types"),
    BadArgument("a lone type", {"rotate": nn.Linear}, TypeError, r"rotate=.*Linear.*must be a list of module types"),
    BadArgument("no module type", {"rotate": [3]}, TypeError, r"rotate: 3 is no module type"),
    BadArgument("a norm layer", {"rotate": [nn.LayerNorm]}, ValueError, r"rotate: LayerNorm is a norm layer"),
    BadArgument("chunks of a type", {"rotate": {nn.Linear: 0}}, ValueError, r"chunks=0: must be a whole number"),
    BadArgument(
        "chunks that do not divide",
        {"rotate": {nn.Linear: 3}},
        ValueError,
        r"chunks=3 does not divide.*'0\.weight' \(shape \(4, 3\)",
    ),
    BadArgument(
        "sizes that do not add up",
        {"rotate": {nn.Linear: (3, 2)}},
        ValueError,
        r"chunks=\(3, 2\) adds up to 5.*'0\.weight' \(shape \(4, 3\)",
    ),
    BadArgument("names of chunks", {"chunk_names": "qk"}, TypeError, r"chunk_names='qk': layer_groups sets it itself"),
    BadArgument("chunks", {"chunks": 3}, TypeError, r"chunks=3: layer_groups sets it itself"),
    BadArgument("lr_factor", {"lr_factor": 0.5}, TypeError, r"lr_factor=0\.5: layer_groups sets it itself"),
    BadArgument("zeros", {"zeros": "rotate"}, ValueError, r"zeros='rotate' is unknown.*'others', 'rotate-later'"),
    BadArgument(
        "zeros without a norm",
        {"zeros": "rotate-later"},
        ValueError,
        r"zeros='rotate-later' with joins_at=None: say from",
    ),
    BadArgument("joins_at 0", {"zeros": "rotate-later", "joins_at": 0}, ValueError, "joins_at=0: say from"),
    BadArgument(
        "joins_at as text", {"zeros": "rotate-later", "joins_at": "1"}, TypeError, "joins_at='1': must be the norm"
    ),
    BadArgument("joins_at alone", {"joins_at": 1.0}, ValueError, r"joins_at=1\.0: .*set zeros='rotate-later'"),
    BadArgument("params", {"params": []}, TypeError, r"params=\[\]: layer_groups sets it itself"),
)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_an_argument_is_refused_and_nothing_frozen(case: BadArgument, seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    freeze = {} if "others_lr" in case.arguments else {"others": "freeze"}
    with pytest.raises(case.error, match=case.message):
        layer_groups(model, **{**freeze, **case.arguments})
    assert all(param.requires_grad for param in model.parameters())


def test_the_model_must_be_a_module(seed: int) -> None:
    with pytest.raises(TypeError, match=r"model is a list: it must be a torch\.nn\.Module"):
        layer_groups([parameter(2, 3)])


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 3).requires_grad_(False)], ids=["empty", "not trainable"])
def test_a_model_with_nothing_to_train_is_refused(model: nn.Module, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"model: no parameter of this {type(model).__name__} requires a gradient"):
        layer_groups(model)


def test_lazy_parameters_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"'1\.weight' is not initialized yet: run one forward pass"):
        layer_groups(nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(2)))


class Hiding(nn.Module):
    """Its named_parameters keeps one parameter to itself, and makes one up."""

    def __init__(self) -> None:
        super().__init__()
        self.shown, self.hidden = nn.Linear(3, 2), nn.Linear(2, 2, bias=False)
        self.extra = [Parameter(torch.randn(2, 2))]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        yield from ((f"shown.{name}", param) for name, param in self.shown.named_parameters())
        yield "extra", self.extra[0]


def test_trainable_parameters_in_no_group_are_named(seed: int) -> None:
    model = Hiding()
    with pytest.raises(ValueError, match=r"\['extra', 'hidden\.weight'\] land in no group.*requires_grad_\(False\)"):
        layer_groups(model, others="freeze")
    assert model.shown.bias.requires_grad
    model.hidden.requires_grad_(False)
    model.extra[0].requires_grad_(False)
    assert [row.name for row in layer_groups(model).rows] == ["shown.weight", "shown.bias"]


@pytest.mark.parametrize(
    ("factor", "error"), [(-0.5, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("2", TypeError)], ids=str
)
def test_an_lr_factor_is_checked_where_it_is_used(factor: Any, error: type[Exception], seed: int) -> None:
    optimizer = running()
    before = contents(optimizer)
    with pytest.raises(error, match=rf"lr_factor={factor!r}: must be"):
        optimizer.add_param_group({"params": [("new", parameter(2, 3))], "lr_factor": factor})
    assert same_bits(contents(optimizer), before)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("new", parameter(2, 3))], "lr_factor": factor, "lr": 0.3})
    assert optimizer.param_groups[1]["lr"] == 0.3


def test_a_tensor_lr_is_checked_before_it_is_scaled(seed: int) -> None:
    with pytest.raises(ValueError, match=r"lr=tensor\(-1\.\)"):
        FusedLayca(layer_groups(nn.Linear(2, 3), alpha=0.5), torch.tensor(-1.0))


def test_rmsprops_own_alpha_is_not_taken_for_layer_wise_rates() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"alpha=0\.9 with base='rmsprop'.*FusedLayca\(layer_groups"):
        layer_groups(model, base="rmsprop", alpha=0.9)


def test_a_warning_that_is_an_error_freezes_nothing(seed: int) -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.small = Parameter(torch.randn(9, 9)), nn.Linear(2, 2)

    model = Unknown()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Unknown"):
            layer_groups(model, others="freeze")
    assert all(param.requires_grad for param in model.parameters())
