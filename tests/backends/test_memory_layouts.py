"""Parameters, gradients and states wherever they lie in memory: right results, and not a byte touched beside them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.state.compensation import HALVES

from ..support import (
    assert_close,
    clones,
    contents,
    copy_of,
    device_of,
    every_backend,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)

#: Every type can hold it.
SENTINEL = -12288.0


every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


@dataclass(frozen=True)
class Layout:
    """A view into a larger piece of memory: offset and strides count elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    chunks: Any = 1
    rotate: bool | None = None

    def view(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.shape, self.strides, self.offset)


class Arena:
    """Memory full of a sentinel with one tensor of ``layout`` inside it."""

    def __init__(self, layout: Layout, values: Tensor) -> None:
        reach = sum(stride * (size - 1) for stride, size in zip(layout.strides, layout.shape, strict=True))
        self.memory = torch.full((layout.offset + reach + 64,), SENTINEL, dtype=values.dtype, device=values.device)
        self.view = layout.view(self.memory)
        self.view.copy_(values)
        self._outside = torch.ones(self.memory.shape, dtype=torch.bool, device=values.device)
        layout.view(self._outside).fill_(False)

    def is_intact(self) -> bool:
        """Whether every element outside the tensor still is the sentinel."""
        return bool((self.memory[self._outside] == SENTINEL).all())


DENSE = (
    Layout("contiguous", (6, 8), (8, 1), offset=16),
    Layout("misaligned by one element, odd sizes", (5, 7), (7, 1), offset=1),
    Layout("misaligned by three elements", (3, 5, 7), (35, 7, 1), offset=3),
    Layout("a scalar between others", (), (), offset=5),
    Layout("a vector", (37,), (1,), offset=2),
    Layout("transposed", (6, 8), (1, 6), offset=2),
    Layout("channels_last", (4, 3, 5, 2), (30, 1, 6, 3), offset=1),
    Layout("dimensions in another order", (3, 4, 5), (4, 1, 12), offset=7),
    Layout("strides of dimensions of size 1 mean nothing", (1, 7, 1), (99, 1, 50), offset=3, rotate=True),
    Layout("chunks at odd addresses", (6, 5), (5, 1), offset=1, chunks=3),
    Layout("a layer per row at odd addresses", (6, 5), (5, 1), offset=3, chunks="all"),
    Layout("channels_last in chunks", (4, 3, 5, 2), (30, 1, 6, 3), offset=1, chunks=2),
    Layout("unequal parts at odd addresses", (6, 5), (5, 1), offset=1, chunks=(1, 3, 2)),
    Layout("channels_last in unequal parts", (4, 3, 5, 2), (30, 1, 6, 3), offset=1, chunks=(1, 3)),
    Layout("stacked matrices, each transposed", (2, 3, 4, 5), (60, 20, 1, 4), offset=3, chunks="matrices"),
    Layout("matrices in halves", (3, 4, 5), (20, 5, 1), offset=1, chunks=("matrices", 2)),
    Layout("columns one after the other", (6, 5), (1, 6), offset=3, chunks="columns"),
    Layout("unequal parts of columns one after the other", (6, 5), (1, 6), offset=3, chunks=("columns", (2, 3))),
)

GAPPED = (
    Layout("rows with gaps between them", (6, 5), (8, 1), offset=2),
    Layout("every second element", (6, 5), (10, 2), offset=1),
    Layout("a narrowed dimension in the middle", (3, 2, 4), (28, 4, 1), offset=5),
    Layout("a gapped vector that does not rotate", (9,), (3,), offset=1),
    Layout("transposed, in chunks", (6, 8), (1, 6), offset=2, chunks=2),
    Layout("transposed, a layer per row", (6, 8), (1, 6), offset=2, chunks="all"),
    Layout("channels_last with the first dimension inside, in chunks", (4, 3, 2), (1, 8, 4), offset=3, chunks=4),
    Layout("rows with gaps, in chunks", (6, 5), (8, 1), offset=2, chunks=3),
    Layout("transposed, in unequal parts", (6, 8), (1, 6), offset=2, chunks=(1, 5)),
    Layout("stacked matrices in another order", (3, 2, 4, 5), (20, 60, 5, 1), offset=1, chunks="matrices"),
    Layout("transposed matrices in halves", (3, 4, 5), (20, 1, 4), offset=1, chunks=("matrices", 2)),
    Layout("columns of rows", (6, 5), (5, 1), offset=1, chunks="columns"),
    Layout("unequal columns of rows", (6, 5), (5, 1), offset=1, chunks=("columns", (2, 3))),
    Layout("columns with gaps between them", (6, 5), (1, 8), offset=2, chunks="columns"),
)


def check_layout(layout: Layout, backend: str, dtype: torch.dtype, home: torch.device) -> None:
    """Train a view of ``layout``, gradient and momentum in arenas of their own, beside a contiguous copy."""
    options: dict[str, Any] = {"chunks": layout.chunks, "rotate": layout.rotate, "momentum": 0.9, "nesterov": True}
    values = torch.randn(layout.shape, dtype=dtype).to(home)
    half = dtype in HALVES
    arenas = [
        Arena(layout, each) for each in (values, torch.zeros_like(values, dtype=torch.float32 if half else dtype))
    ]
    param = Parameter(arenas[0].view)
    optimizer = FusedLayca([param], 0.1, backend=backend, **options)
    plain = FusedLayca([Parameter(values.float() if half else values.clone())], 0.1, backend="torch", **options)
    given = {"momentum_buffer": arenas[1].view}
    if half:
        arenas.append(Arena(layout, torch.zeros_like(values)))
        given["remainder"] = arenas[2].view
    optimizer.state[param].update(given)
    for _ in range(3):
        grad = torch.randn(layout.shape, dtype=dtype).to(home)
        train(plain, [[grad.float() if half else grad]])
        arenas.append(Arena(layout, grad))
        param.grad = arenas[-1].view
        optimizer.step()
        assert torch.equal(arenas[-1].view, grad)
    # What was set by hand is no fresh buffer, but dampening is 0, so it starts alike.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    if half:
        (twin,) = params_of(plain)
        assert relative_distance(optimizer.effective_weight(param), twin) <= tolerance
        assert (
            relative_distance(optimizer.state[param]["momentum_buffer"], plain.state[twin]["momentum_buffer"]) <= 1e-6
        )
    else:
        assert_close(optimizer, plain, tolerance)
    assert all(optimizer.state[param][name] is view for name, view in given.items()), "moved without need"
    assert param.data_ptr() == arenas[0].view.data_ptr()
    assert all(arena.is_intact() for arena in arenas)


@every_dtype
@pytest.mark.parametrize("layout", DENSE, ids=lambda layout: layout.name)
@every_backend
def test_dense_memory_in_any_order_at_any_address(backend: str, layout: Layout, dtype: torch.dtype, seed: int) -> None:
    check_layout(layout, backend, dtype, device_of(backend))


@every_dtype
@pytest.mark.parametrize("layout", GAPPED, ids=lambda layout: layout.name)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_memory_with_gaps_is_trained_by_torch(backend: str, layout: Layout, dtype: torch.dtype, seed: int) -> None:
    check_layout(layout, backend, dtype, torch.device("cpu"))


@pytest.mark.parametrize("layout", GAPPED, ids=lambda layout: layout.name)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_memory_with_gaps_is_refused_by_kernels_asked_for_by_name(backend: str, layout: Layout, seed: int) -> None:
    arena = Arena(layout, torch.randn(layout.shape).to(device_of(backend)))
    good, param = parameter(3, 4, backend=backend), Parameter(arena.view)
    optimizer = FusedLayca([("good", good), ("gapped", param)], 0.1, chunks=1, momentum=0.9, backend=backend)
    optimizer.param_groups[0]["chunks"] = layout.chunks if layout.chunks in (1, "all") else 1
    if layout.chunks not in (1, "all"):
        optimizer = FusedLayca([("gapped", param)], 0.1, chunks=layout.chunks, momentum=0.9, backend=backend)
    for each in params_of(optimizer):
        each.grad = torch.randn_like(each)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=rf"'gapped'.*backend='{backend}'.*backend='auto' or 'torch'.*contiguous"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    assert arena.is_intact()


@every_dtype
@native_backends
def test_every_offset(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Vector loads, their heads and their tails: 41 offsets, with parameter, state and gradient misaligned alike."""
    for offset in range(41):
        layout = Layout(f"offset {offset}", (5, 3 + offset), (3 + offset, 1), offset=offset)
        check_layout(layout, backend, dtype, device_of(backend))


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda grad: grad.t().contiguous().t(),
    "with gaps": lambda grad: torch.stack([grad, grad + 1], -1)[..., 0],
    "misaligned": lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view_as(grad),
    "expanded": lambda grad: grad[:1].expand_as(grad),
    "lazily negated": lambda grad: torch._neg_view(-grad),
    "part of a graph": lambda grad: grad.clone().requires_grad_() * 1,
}


@pytest.mark.parametrize("laid_out", GRADIENTS.values(), ids=GRADIENTS.keys())
@every_backend
def test_a_gradient_may_lie_otherwise_than_its_parameter(
    backend: str, laid_out: Callable[[Tensor], Tensor], seed: int
) -> None:
    """Bit for bit what a contiguous gradient of the same values gives."""
    params = [parameter(6, 5, backend=backend), parameter(6, 5, backend=backend)]
    odd = FusedLayca(params, 0.1, momentum=0.9, nesterov=True, backend=backend)
    odd.add_param_group({"params": [parameter(6, 5, backend=backend)], "momentum": 0.0, "nesterov": False})
    params = params_of(odd)
    plain_params = clones(params)
    plain = FusedLayca(plain_params[:2], 0.1, momentum=0.9, nesterov=True, backend=backend)
    plain.add_param_group({"params": plain_params[2:], "momentum": 0.0, "nesterov": False})
    for row in random_gradients(params, 2):
        grads = [laid_out(grad) for grad in row]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        train(plain, [[grad.detach().resolve_neg().clone(memory_format=torch.contiguous_format) for grad in grads]])
        before = copy_of(grads)
        odd.step()
        assert same_bits(copy_of(grads), before)
    assert [same_bits(x[::2], y[::2]) for x, y in zip(contents(odd), contents(plain), strict=True)] == [True] * 3


EMPTY = ((0,), (0, 4), (4, 0), (2, 0, 3))


@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"chunks": "all"}], ids=["default", "rotate", "chunks"])
@every_backend
def test_empty_tensors_are_carried_along(backend: str, options: dict[str, Any], seed: int) -> None:
    """They have no direction and no norm, take part in nothing, and disturb nothing."""
    full = [parameter(4, 3, backend=backend), parameter(3, 3, backend=backend)]
    empty = [parameter(*shape, backend=backend) for shape in EMPTY]
    optimizer = FusedLayca([full[0], *empty, full[1]], 0.1, momentum=0.9, backend=backend, **options)
    alone = FusedLayca(clones(full), 0.1, momentum=0.9, backend=backend, **options)
    grads = random_gradients(params_of(optimizer), 3)
    train(optimizer, grads)
    train(alone, [[row[0], row[-1]] for row in grads])
    after = contents(optimizer)
    assert same_bits([after[0], after[-1]], contents(alone))
    for param in empty:
        state = optimizer.state[param]
        assert state["momentum_buffer"].shape == param.shape
        assert not state.get("radius", torch.zeros(1)).any()
        stats = optimizer.rotation_stats()[param]
        assert all(not count.any() for count in (stats.no_direction, stats.broken, stats.non_finite))
    other = FusedLayca(clones(params_of(optimizer)), 0.1, momentum=0.9, backend=backend, **options)
    other.load_state_dict(optimizer.state_dict())
    train(other, grads[:1])


@every_backend
def test_only_empty_tensors(backend: str, seed: int) -> None:
    params = [parameter(*shape, backend=backend) for shape in EMPTY]
    optimizer = FusedLayca(params, 0.1, momentum=0.9, backend=backend)
    train(optimizer, random_gradients(params, 2))


@every_backend
def test_scalars_and_single_weights_have_nowhere_to_turn(backend: str, seed: int) -> None:
    """One weight spans no angle: it rotates nowhere, bit for bit, and that is counted; as a plain tensor it trains."""
    params = [parameter(backend=backend), parameter(1, 1, backend=backend), parameter(backend=backend)]
    groups = [{"params": params[:2], "rotate": True}, {"params": params[2:]}]
    optimizer = FusedLayca(groups, 0.25, momentum=0.5, backend=backend)
    before = copy_of(params)
    grads = random_gradients(params, 2)
    train(optimizer, grads)
    after = copy_of(params)
    assert same_bits(after[:2], before[:2])
    assert [optimizer.rotation_stats()[param].no_direction.tolist() for param in params] == [[2], [2], [0]]
    expected = before[2] - 0.25 * grads[0][2] - 0.25 * (0.5 * grads[0][2] + grads[1][2])
    assert math.isclose(float(after[2]), float(expected), rel_tol=1e-5, abs_tol=1e-6)
