"""A tensor with at most one dimension longer than 1 is a vector, and does not rotate unless it is asked to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList

from layca_fast import FusedLayca, attach, layer_groups
from layca_fast.reference import reference_step

from ..support import (
    clones,
    every_backend,
    params_of,
    random_gradients,
    relative_distance,
    resting,
    same_bits,
    train,
    turning,
)

VECTORS = ((), (1,), (5,), (5, 1), (1, 5), (1, 1), (7, 1, 1), (1, 7, 1), (1, 1, 1, 3))
MATRICES = ((2, 2), (5, 2), (1, 5, 2), (3, 1, 4), (2, 1, 1, 2))

every_vector = pytest.mark.parametrize("shape", VECTORS, ids=str)
every_matrix = pytest.mark.parametrize("shape", MATRICES, ids=str)


def turns(shape: tuple[int, ...], backend: str, **options: Any) -> bool:
    """Whether it does, as the specification has it, too."""
    optimizer = FusedLayca([Parameter(torch.randn(shape))], 0.1, backend=backend, **options)
    (param,) = params_of(optimizer)
    weight = param.detach().double()
    (row,) = random_gradients([param], 1)
    train(optimizer, [row])
    reference_step(weight, row[0].double(), {}, lr=0.1, **options)
    assert relative_distance(param, weight) < 1e-6
    return "radius" in optimizer.state.get(param, {})


@every_vector
@every_backend
def test_vectors_of_any_number_of_dimensions_do_not_turn(backend: str, shape: tuple[int, ...], seed: int) -> None:
    assert not turns(shape, backend)
    if torch.Size(shape).numel() > 1:
        assert turns(shape, backend, rotate=True)


@every_matrix
@every_backend
def test_everything_else_turns(backend: str, shape: tuple[int, ...], seed: int) -> None:
    assert turns(shape, backend)
    assert not turns(shape, backend, rotate=False)


def test_attach_draws_the_same_line(seed: int) -> None:
    params = [Parameter(torch.randn(shape)) for shape in (*VECTORS, *MATRICES)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    attach(optimizer)
    train(optimizer, random_gradients(params, 1))
    assert [bool(optimizer.state.get(param)) for param in params] == [False] * len(VECTORS) + [True] * len(MATRICES)


def test_the_plan_says_so(seed: int) -> None:
    model = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 3), nn.Conv1d(3, 3, 1, groups=3), nn.Linear(3, 1))
    assert list(turning(layer_groups(model))) == ["1.weight"]
    reasons = resting(layer_groups(model))
    assert [reasons[f"{index}.weight"] for index in (0, 2, 3)] == ["vector"] * 3
    assert "no: vector" in str(layer_groups(model))


@every_backend
def test_a_vector_that_has_stopped_turning_resumes(backend: str, seed: int) -> None:
    """Its checkpoint holds the radius that it goes back to when it turns again."""
    params = [Parameter(torch.randn(5, 1)), Parameter(torch.randn(3, 4))]
    optimizer = FusedLayca(clones(params), 0.1, momentum=0.9, rotate=True, backend=backend)
    rows = random_gradients(params, 9)
    train(optimizer, rows[:3])
    optimizer.param_groups[0]["rotate"] = None
    train(optimizer, rows[3:5])
    resumed = FusedLayca(clones(params_of(optimizer)), 0.1, momentum=0.9, backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    for each in (optimizer, resumed):
        train(each, rows[5:7])
        each.param_groups[0]["rotate"] = True
        train(each, rows[7:])
        assert float(params_of(each)[0].detach().norm()) == pytest.approx(float(params[0].detach().norm()), rel=1e-6)
    for ours, theirs in zip(params_of(optimizer), params_of(resumed), strict=True):
        assert same_bits(ours, theirs)


def parametrized() -> nn.Sequential:
    made = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 5)),
        parametrizations.spectral_norm(nn.Linear(5, 5)),
        parametrizations.orthogonal(nn.Linear(5, 5)),
        nn.Linear(5, 2),
    )
    made(torch.randn(8, 6))
    return made


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    for _ in range(30):
        optimizer.zero_grad()
        loss: Tensor = (model(torch.randn(16, 6)) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return loss


def test_the_recipes_for_parametrized_weights(seed: int) -> None:
    """Of docs/migrating.md: by default none of their tensors turns; asked, the directions do, and no gain."""
    model = parametrized()
    assert list(turning(layer_groups(model))) == ["3.weight"]
    groups = layer_groups(model, rotate=[ParametrizationList], lr=0.02)
    assert list(turning(groups)) == [
        "0.parametrizations.weight.original1",
        "1.parametrizations.weight.original",
        "2.parametrizations.weight.original",
        "3.weight",
    ]
    assert resting(groups)["0.parametrizations.weight.original0"] == "vector"
    optimizer = FusedLayca(groups)
    before = [each.detach().clone() for each in model.parameters()]
    assert torch.isfinite(trained(model, optimizer))
    for old, (name, new) in zip(before, model.named_parameters(), strict=True):
        new = new.detach()
        if name.endswith(("original1", "1.parametrizations.weight.original")):
            assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-6)
            assert not torch.equal(new, old)
