"""What the torch backend keeps from step to step: as much as it needs, no longer than its batch, and never stale."""

import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.backends.torch_ import TorchBackend, backend, sums
from layca_fast.backends.torch_.arithmetic import Value, empty
from layca_fast.backends.torch_.memory import Pool

from ...support import parameter, random_gradients, same_bits, train

CPU = torch.device("cpu")


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def free(pool: Pool) -> list[Tensor]:
    """The buffers that are kept for later."""
    return [buffer for buffers in pool._free.values() for buffer in buffers]


def pool_of(optimizer: FusedLayca) -> Pool:
    return optimizer._plan.batches[0][1].kept.pool


def trained(params: list[Parameter], steps: int = 2, **options: Any) -> FusedLayca:
    optimizer = FusedLayca(params, 0.1, **{"base": "adam", "backend": "torch", **options})
    train(optimizer, random_gradients(params, steps))
    return optimizer


def test_what_a_batch_keeps_goes_with_it(seed: int, no_collections: None) -> None:
    """At once, and the states that it looked at with it: no circle waits for the garbage collector."""
    optimizer = trained([parameter(4, 3), parameter(4, 3), parameter(700, 700)])
    batch = optimizer._plan.batches[0][1]
    states = [weakref.ref(state) for states in batch.states for state in states]
    known = weakref.ref(batch), weakref.ref(batch.kept)
    del batch
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not any(each() is not None for each in (*known, *states))


def test_memory_is_that_of_what_is_in_use(seed: int) -> None:
    """Of 200 shapes, one after the other, a few small buffers stay."""
    gc.collect()
    params = [parameter(rows, 3) for rows in range(1, 201)]
    pool = pool_of(trained(params))
    assert sum(buffer.nbytes for buffer in free(pool)) < 100 * params[-1].nbytes


def test_memory_goes_with_the_last_optimizer(seed: int) -> None:
    gc.collect()
    first, second = (trained([parameter(300, 5)]) for _ in range(2))
    pool = weakref.ref(pool_of(first))
    assert pool() is pool_of(second)
    assert free(pool_of(second))
    del first, second
    gc.collect()
    assert pool() is None


def test_buffers_come_back_from_other_threads_and_after_errors() -> None:
    pool = Pool()
    held = [empty(pool, (3, 5), torch.float32, CPU)]
    assert not free(pool)
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert len(free(pool)) == 1
    with pytest.raises(RuntimeError):
        _ = Value(pool, torch.ones(3, 5)) + torch.ones(4, 7)
    assert len(free(pool)) == 1
    many = [empty(pool, (3, 5), torch.float32, CPU) for _ in range(100)]
    assert len({value.tensor.data_ptr() for value in many}) == 100
    del many
    assert len(free(pool)) < 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_made_before_memory_is_for_others(
    dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may take it, and write there, while torch sums up."""
    params = [parameter(*shape, dtype=dtype) for shape in ((30, 20), (30, 20), (600, 500))]
    optimizer = trained(params)
    pool, seen = pool_of(optimizer), []

    def row_sums(x: Tensor, real: Any = sums.row_sums) -> Tensor:
        seen.append(x.untyped_storage().data_ptr() in {each.data_ptr() for each in free(pool)})
        return real(x)

    monkeypatch.setattr(sums, "row_sums", row_sums)
    train(optimizer, random_gradients(params, 1))
    assert seen
    assert not any(seen)


LEARNS = {"radius": "learned"}


@pytest.mark.parametrize("options", [{}, LEARNS], ids=str)
def test_parameters_can_be_exchanged(options: dict[str, Any], seed: int) -> None:
    """As ``module.to`` does it under set_swap_module_params_on_conversion; it wants no other references to them."""
    params = [parameter(4, 4), parameter(5), parameter(700, 500), *(parameter(3, 2) for _ in range(3))]
    grads = random_gradients(params, 2)
    optimizer = FusedLayca(params, 0.01, momentum=0.9, backend="torch", **options)
    train(optimizer, grads[:1])
    optimizer.zero_grad()
    others = [Parameter(param.detach().clone()) for param in params]
    for param, other in zip(params, others, strict=True):
        torch.utils.swap_tensors(param, other)
    before = [param.detach().clone() for param in params]
    train(optimizer, grads[1:])
    assert same_bits([other.detach() for other in others], before)
    assert not any(same_bits(param.detach(), old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("options", [{}, LEARNS], ids=str)
def test_parameters_may_leave_their_memory(options: dict[str, Any], seed: int) -> None:
    """Between steps, as where weights are moved away for a while: nothing that is kept holds it."""
    params = [parameter(4, 4), parameter(5), parameter(700, 500), *(parameter(3, 2) for _ in range(3))]
    optimizer = trained(params, **options)
    left = [StorageWeakRef(param.untyped_storage()) for param in params]
    for param in params:
        param.data = torch.zeros(0)
    assert all(storage.expired() for storage in left)
    del optimizer


@pytest.mark.parametrize("verb", ["_rotate_piece", "coefficients", "_measured_again"])
def test_nothing_is_left_of_a_step_that_failed(verb: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose layers have gaps are stepped as copies: those of the next step are made of it."""
    memory = torch.randn(2, 6, 9)
    params = [Parameter(half[:, :7]) for half in memory]
    failing, twin = (FusedLayca([param], 0.1, momentum=0.9, backend="torch") for param in params)
    grads = random_gradients(params[:1], 3)
    for optimizer in (failing, twin):
        train(optimizer, grads[:2])

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, verb, fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            train(failing, grads[1:2])
    with torch.no_grad():
        new = torch.randn(6, 7)
        for optimizer, param in zip((failing, twin), params, strict=True):
            param.copy_(new)
            optimizer.state[param]["momentum_buffer"].copy_(new.flip(0))
            optimizer.state[param]["radius"].fill_(2.0)
    for optimizer in (failing, twin):
        train(optimizer, grads[2:])
    assert same_bits(*(param.detach().clone() for param in params))


def test_parameters_can_be_exchanged_after_a_step_that_failed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [parameter(4, 4), parameter(700, 500)]
    optimizer = trained(params)

    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "coefficients", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            train(optimizer, random_gradients(params, 1))
    optimizer.zero_grad()
    for param in params:
        other = Parameter(torch.zeros_like(param))
        torch.utils.swap_tensors(param, other)
        assert not param.any()


def test_layers_without_a_gradient_are_not_measured_again(seed: int) -> None:
    """Their dots come from other processes, and sigma of them must, too."""
    params = [parameter(4, 3), parameter(5, 3)]
    optimizer = trained(params, momentum=0.0, base="sgd")
    params[0].grad, params[1].grad = params[0].detach() * 2 + 1e-3 * torch.randn(4, 3), None
    plan = optimizer._plan
    batch = plan.batches[0][1]
    batch.take_gradients()
    batch.refresh()
    with torch.no_grad():
        backend.BACKEND.measure(batch)
        batch.dots[1] = torch.tensor([2.0, 2.0, 2.001])
        window = batch.kept.current(batch)
        nearly = torch.ones(2, dtype=torch.bool)
        sigma2 = torch.tensor([1.0, 0.001], dtype=torch.float64)
        again = backend.BACKEND._measured_again(batch, window, sigma2, nearly)
    assert again[1] == 0.001
    assert again[0] != 1.0
