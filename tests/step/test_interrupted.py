"""A step that raises has modified nothing, or has been taken whole, or says what it has left."""

from typing import Any

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.backends import load
from layca_fast.backends.cpu import CpuBackend
from layca_fast.formulas.orthogonal import NewtonSchulz
from layca_fast.step import plan as plans
from layca_fast.step.batch import Batch
from layca_fast.step.learned_radius import LearnedRadii

from ..support import contents, native_backends, parameter, params_of, random_gradients, same_bits, train
from .interrupted_support import Injected, many_batches, twin


class FailingAllocations:
    """The allocation of this number, and no other, fails: of torch's functions that make tensors on the host."""

    NAMES = ("zeros", "empty", "full_like", "empty_like", "zeros_like", "tensor", "full")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.count = 0
        self.number = number
        for name in self.NAMES:
            monkeypatch.setattr(torch, name, self._failing(getattr(torch, name)))

    def _failing(self, function: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.number:
                raise Injected
            return function(*args, **kwargs)

        return allocate


def allocations_of_a_first_step(backend: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        optimizer = many_batches(backend)
        rows = random_gradients(params_of(optimizer), 1)
        failing = FailingAllocations(patch, -1)
        train(optimizer, rows)
        return failing.count


@native_backends
def test_a_first_step_without_memory_modifies_nothing(backend: str, seed: int) -> None:
    """Whichever of its allocations fails; a retry is then the step that an optimizer takes that never failed."""
    allocations = allocations_of_a_first_step(backend)
    assert allocations > 10
    for number in range(1, allocations + 1):
        optimizer = many_batches(backend)
        other = twin(optimizer, backend)
        rows = random_gradients(params_of(optimizer), 2)
        for param, grad in zip(params_of(optimizer), rows[0], strict=True):
            param.grad = grad.clone()
        weights = [param.detach().clone() for param in params_of(optimizer)]
        with pytest.MonkeyPatch.context() as patch:
            FailingAllocations(patch, number)
            with pytest.raises((MemoryError, RuntimeError)) as caught:
                optimizer.step()
        if "failed half-way" in str(caught.value):
            # The torch backend's own temporaries: it has said so.
            assert backend == "torch"
            continue
        assert same_bits([param.detach() for param in params_of(optimizer)], weights), number
        train(optimizer, rows)
        train(other, rows)
        assert same_bits(contents(optimizer), contents(other)), number


def test_memory_is_taken_for_every_batch_before_any_moves(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    optimizer = many_batches("cpu")
    rows = random_gradients(params_of(optimizer), 1)
    reserved: list[Batch] = []
    reserve = CpuBackend.reserve

    def failing(self: CpuBackend, batch: Batch) -> None:
        reserve(self, batch)
        reserved.append(batch)
        if len(reserved) == 3:
            raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(CpuBackend, "reserve", failing)
    weights = [param.detach().clone() for param in params_of(optimizer)]
    with pytest.raises(MemoryError, match="nothing was modified"):
        train(optimizer, rows)
    assert same_bits([param.detach() for param in params_of(optimizer)], weights)
    for param in params_of(optimizer):
        assert all(not state.any() for state in optimizer.state[param].values())


@pytest.mark.parametrize("failing", range(3))
@native_backends
def test_a_failure_between_two_batches_is_told_and_settled(
    backend: str, failing: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What was stepped before it has been stepped whole: its first gradient counts as one, autograd knows."""
    optimizer = many_batches(backend)
    rows = random_gradients(params_of(optimizer), 2)
    kind = type(load(backend))
    call, seen = kind.call, []

    def injected(self: Any, batch: Batch) -> Any:
        seen.append(batch)
        if len(seen) == failing + 1:

            def fail() -> None:
                raise OSError("no")

            return fail
        return call(self, batch)

    versions = [param._version for param in params_of(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr(kind, "call", injected)
        with pytest.raises((OSError, RuntimeError)) as caught:
            train(optimizer, rows[:1])
    if failing or backend == "torch":
        assert "the step failed half-way" in str(caught.value)
    moved = [id(param) for batch in seen[:failing] for param in batch.params]
    for param, version in zip(params_of(optimizer), versions, strict=True):
        assert (param._version > version) == ((id(param) in moved and param.numel() > 0) or id(param) in moved)
    assert all(not slot.fresh for batch in seen[:failing] for slot in batch.slots)
    assert all(slot.fresh for batch in seen[failing:] for slot in batch.slots)


def test_a_plan_that_cannot_be_made_leaves_no_state(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    optimizer = many_batches("cpu")
    made: list[Tensor] = []
    batch = plans.Batch

    def failing(*args: Any) -> Batch:
        made.append(torch.zeros(()))
        if len(made) == 2:
            raise Injected
        return batch(*args)

    monkeypatch.setattr("layca_fast.step.directions.Batch", failing)
    with pytest.raises(Injected):
        train(optimizer, random_gradients(params_of(optimizer), 1))
    assert not optimizer.state


@pytest.mark.parametrize("where", [(NewtonSchulz, "run"), (LearnedRadii, "factors")], ids=["direct", "radii"])
@native_backends
def test_a_failure_between_the_stages_of_a_step_is_told(
    where: tuple[type, str], backend: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The momentum has moved by then, whatever the backend: a second try would advance it twice."""
    param = parameter(6, 4)
    optimizer = FusedLayca([param], 0.1, base="muon", radius="learned", backend=backend)
    train(optimizer, random_gradients([param], 1))
    before = optimizer.state[param]["momentum_buffer"].clone()

    def failing(*_: Any) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(*where, failing)
    with pytest.raises(RuntimeError, match=r"the step failed half-way.*MemoryError: no"):
        train(optimizer, random_gradients([param], 1))
    assert not torch.equal(optimizer.state[param]["momentum_buffer"], before)
