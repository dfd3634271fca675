"""The torch backend on devices whose numbers the host must not wait for, and under a foreign default device."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast import FusedLayca
from layca_fast.backends.torch_ import TorchBackend, backend, base, cleaning, runs
from layca_fast.commands.cases import BASE_OPTIONS

from ...support import clones, contents, parameter, random_gradients, same_bits, shapes_for, train

#: What hands a number of the device to the host, or a list of the host to the device. (A copy of what lies in pinned
#: memory need not wait; none is made in a step.)
WAITING = {"_local_scalar_dense", "nonzero", "lift_fresh", "lift", "equal", "is_nonzero", "masked_select"}


class NeverWaiting(TorchDispatchMode):
    """Refuses operations for which the host would wait, or which a capture would refuse, if tensors were a GPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITING, name
        if name in ("index", "index_put_", "index_put"):
            assert not any(isinstance(each, Tensor) and each.dtype == torch.bool for each in args[1]), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are taken as where no number can be read."""
    for module in (backend, runs):
        monkeypatch.setattr(module, "can_look", lambda batch: False)
    for module in (base, cleaning):
        monkeypatch.setattr(module, "is_seen_finite", lambda x: False)
    step = TorchBackend.step

    def watched(self: TorchBackend, batch: Any) -> None:
        with NeverWaiting():
            step(self, batch)

    monkeypatch.setattr(TorchBackend, "step", watched)


FEW = ({"momentum": 0.9, "nesterov": True}, {"base": "adam", "amsgrad": True})


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    "options",
    [*FEW, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in BASE_OPTIONS)],
    ids=str,
)
def test_a_step_never_waits_and_is_the_same(
    options: dict[str, Any], capturable: bool, seed: int, request: pytest.FixtureRequest
) -> None:
    """In its first step, and when gradients come and go, too."""
    shapes = shapes_for(options, ((4, 3), (4, 3), (5,), (6, 40)))
    params = [parameter(*shape) for shape in shapes]
    rows: list[list[Any]] = [list(row) for row in random_gradients(params, 4)]
    rows[1][0] = None
    rows[2][3][0] = float("inf")
    params.append(parameter(*shapes[0], dtype=torch.bfloat16))
    rows = [[*row, torch.randn(shapes[0])] for row in rows]
    ends = []
    for fixture in (None, "blind"):
        if fixture is not None:
            request.getfixturevalue(fixture)
        optimizer = FusedLayca(clones(params), 0.1, backend="torch", capturable=capturable, **options)
        train(optimizer, rows)
        ends.append(contents(optimizer))
    assert same_bits(*ends)


def test_foreign_defaults_change_no_bit_of_a_stack(seed: int) -> None:
    """Nor of layers that are measured again: "meta" computes nothing, and refuses what lies elsewhere."""
    params = [parameter(4, 3), parameter(4, 3), parameter(2, 700, 300)]
    grads = [[param.detach() + 1e-3 * torch.randn_like(param) for param in params] for _ in range(2)]
    for row in grads:
        row[0] = torch.randn(4, 3)
    optimizers = [FusedLayca(clones(params), 0.1, chunks=2, backend="torch") for _ in range(2)]
    train(optimizers[0], grads)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            train(optimizers[1], grads)
    finally:
        torch.set_default_dtype(before)
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))
