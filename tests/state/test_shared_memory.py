"""Tensors that share memory without being one object would move twice: an error that names both, before anything does.

In the ordinary step, inside of backward, and in steps that ``attach`` turns; views that do not touch stay right.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from layca_fast import FusedLayca, attach

from ..support import clones, contents, every_backend, native_backends, params_of, random_gradients, same_bits, train

Pair = tuple[Tensor, Tensor]


def tied_by_data() -> Pair:
    first, second = Parameter(torch.randn(6, 4)), Parameter(torch.randn(6, 4))
    second.data = first.data
    return first, second


def overlapping() -> Pair:
    flat = torch.randn(30)
    return Parameter(flat[:20].view(5, 4)), Parameter(flat[18:30].view(3, 4))


def view_inside() -> Pair:
    matrix = torch.randn(6, 4)
    return Parameter(matrix), Parameter(matrix[2:4])


def transposed() -> Pair:
    matrix = torch.randn(6, 4)
    return Parameter(matrix), Parameter(matrix.t())


def columns_that_meet() -> Pair:
    matrix = torch.randn(6, 7)
    return Parameter(matrix[:, :4]), Parameter(matrix[:, 3:])


def other_type() -> Pair:
    flat = torch.randn(24)
    return Parameter(flat.view(torch.float64).view(3, 4)), Parameter(flat[22:].view(1, 2))


def inside_of_a_vector() -> Pair:
    matrix = torch.randn(6, 4)
    return Parameter(matrix), Parameter(matrix.view(-1)[5:9])


SHARING: dict[str, Callable[[], Pair]] = {
    "the same data": tied_by_data,
    "a partial overlap": overlapping,
    "a view inside another": view_inside,
    "a transposed view": transposed,
    "columns that meet": columns_that_meet,
    "another type": other_type,
    "a vector inside a matrix": inside_of_a_vector,
}

every_sharing = pytest.mark.parametrize("make", SHARING.values(), ids=SHARING.keys())


def named(pair: Pair) -> list[tuple[str, Tensor]]:
    # Neither is next to the other in the order of the parameters.
    return [("embedding", pair[0]), ("between", Parameter(torch.randn(3, 3))), ("head", pair[1])]


def refused(optimizer: torch.optim.Optimizer, step: Callable[[], Any], *names: str) -> None:
    before = contents(optimizer)
    with pytest.raises(ValueError, match="share memory") as raised:
        step()
    assert all(repr(name) in str(raised.value) for name in names), str(raised.value)
    assert same_bits(contents(optimizer), before)


def fill(params: list[Tensor]) -> None:
    for param in params:
        param.grad = torch.randn_like(param)


@every_sharing
@every_backend
def test_the_first_step_names_both(backend: str, make: Callable[[], Pair], seed: int) -> None:
    backend = "torch" if make is columns_that_meet else backend
    optimizer = FusedLayca(named(make()), 0.1, momentum=0.9, backend=backend)
    fill(params_of(optimizer))
    refused(optimizer, optimizer.step, "embedding", "head")
    assert not optimizer.state


@native_backends
def test_memory_that_is_shared_later_is_found(backend: str, seed: int) -> None:
    optimizer = FusedLayca(named((Parameter(torch.randn(6, 4)), Parameter(torch.randn(6, 4)))), 0.1, backend=backend)
    embedding, _, head = params_of(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    head.data = embedding.data
    fill(params_of(optimizer))
    refused(optimizer, optimizer.step, "embedding", "head")
    head.data = embedding.data.clone()
    train(optimizer, random_gradients(params_of(optimizer), 1))


@native_backends
def test_a_parameter_that_a_group_holds_twice_is_found(backend: str, seed: int) -> None:
    """Appended by hand, where add_param_group cannot see it."""
    param = Parameter(torch.randn(6, 4))
    optimizer = FusedLayca([("matrix", param)], 0.1, backend=backend)
    optimizer.param_groups[0]["params"].append(param)
    fill([param])
    refused(optimizer, optimizer.step, "matrix")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "radius"])
@native_backends
def test_states_that_share_memory_are_found(backend: str, name: str, seed: int) -> None:
    """One tensor for two parameters would advance twice a step."""
    optimizer = FusedLayca(named((Parameter(torch.randn(6, 4)), Parameter(torch.randn(6, 4)))), 0.1, base="adam")
    params = params_of(optimizer)
    train(optimizer, random_gradients(params, 2))
    optimizer.state[params[2]][name] = optimizer.state[params[0]][name]
    fill(params)
    refused(optimizer, optimizer.step, "embedding", "head", name)


@every_backend
def test_views_that_do_not_touch_step_as_copies_do(backend: str, seed: int) -> None:
    flat = torch.randn(70)
    views = [Parameter(flat[:24].view(6, 4)), Parameter(flat[24:45].view(3, 7)), Parameter(flat[45:70])]
    copies = clones(views)
    rows = random_gradients(views, 3)
    for params in (views, copies):
        train(FusedLayca(params, 0.1, momentum=0.9, backend=backend), rows)
    assert same_bits([each.detach().clone() for each in views], [each.detach() for each in copies])


def test_columns_of_one_matrix_step_as_copies_do(seed: int) -> None:
    """Their addresses interleave, and no byte is in both."""
    matrix = torch.randn(6, 9)
    views = [Parameter(matrix[:, :4]), Parameter(matrix[:, 4:6]), Parameter(matrix[:, 6:])]
    copies = clones(views)
    rows = random_gradients(views, 3)
    for params in (views, copies):
        train(FusedLayca(params, 0.1, momentum=0.9, backend="torch"), rows)
    assert same_bits([each.detach().contiguous() for each in views], [each.detach().contiguous() for each in copies])


def test_what_is_frozen_may_share(seed: int) -> None:
    trained, frozen = tied_by_data()
    frozen.requires_grad_(False)
    optimizer = FusedLayca([trained, frozen], 0.1)
    train(optimizer, [[torch.randn(6, 4), None]] * 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.between, self.head = (nn.Linear(5, 5, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.between(self.embedding(x)).relu()).square().sum()
        return made


def test_inside_of_backward_nothing_has_moved_either(seed: int) -> None:
    model = Tied()
    model.head.weight.data = model.embedding.weight.data
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = FusedLayca(model.named_parameters(), 0.1)
    with optimizer.step_in_backward(), pytest.raises(ValueError, match=r"'embedding\.weight'.*'head\.weight'.*share"):
        model(torch.randn(3, 5)).backward()
    assert same_bits([param.detach().clone() for param in model.parameters()], before)


def test_inside_of_backward_later_sharing_is_found(seed: int) -> None:
    model = Tied()
    optimizer = FusedLayca(model.named_parameters(), 0.1)
    with optimizer.step_in_backward():
        model(torch.randn(3, 5)).backward()
        optimizer.step()
        model.head.weight.data = model.embedding.weight.data
        before = model.head.weight.detach().clone()
        with pytest.raises(ValueError, match=r"share memory"):
            model(torch.randn(3, 5)).backward()
        assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize("rotate", [None, False], ids=["both rotate", "one does not"])
@every_sharing
def test_attach_names_both(make: Callable[[], Pair], rotate: bool | None, seed: int) -> None:
    embedding, between, head = named(make())
    groups = [{"params": [embedding, between]}, {"params": [head], "rotate": rotate}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    attach(optimizer, backend="torch")
    fill(params_of(optimizer))
    refused(optimizer, optimizer.step, "embedding", "head")


@pytest.mark.parametrize("rotate", [None, False], ids=["both rotate", "one does not"])
def test_attach_finds_memory_that_is_shared_later(rotate: bool | None, seed: int) -> None:
    embedding, between, head = named((Parameter(torch.randn(6, 4)), Parameter(torch.randn(6, 4))))
    groups = [{"params": [embedding, between]}, {"params": [head], "rotate": rotate}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    head[1].data = embedding[1].data
    fill(params_of(optimizer))
    refused(optimizer, optimizer.step, "embedding", "head")
