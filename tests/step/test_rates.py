"""The rates in the tables are those of the groups, whatever they were before and wherever a step was interrupted."""

import math
from typing import Any

import pytest
import torch

from layca_fast import FusedLayca
from layca_fast.formulas.tables import Hyper
from layca_fast.step import upload
from layca_fast.step.upload import Mirror

from ..support import native_backends, norm_of, parameter, params_of, random_gradients, train
from .host_support import many


def rates_of(optimizer: FusedLayca) -> list[float]:
    """In the table, of each group."""
    (table,) = [batch.hypers for _, batch in optimizer._plan.batches]
    return table[::2, Hyper.LR].tolist()


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def after_writing(mirror: Mirror, values: Any, real: Any = Mirror.set_all) -> None:
    real(mirror, values)
    raise KeyboardInterrupt


INTERRUPTS = {
    "before the table is written": (Mirror, "set_all", interrupt),
    "after it is written": (Mirror, "set_all", after_writing),
    "before it is remembered": (upload, "list", interrupt),
}


@pytest.mark.parametrize(("where", "name", "how"), INTERRUPTS.values(), ids=INTERRUPTS)
def test_a_rate_that_is_put_back_after_an_interrupt_is_the_rate_again(
    where: Any, name: str, how: Any, seed: int
) -> None:
    """Put back as the very object that was there when the last whole step was taken."""
    optimizer = many({"momentum": 0.9})
    train(optimizer, random_gradients(params_of(optimizer), 2))
    first, second = optimizer.param_groups
    before = first["lr"], second["lr"]
    first["lr"] = 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, how, raising=False)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    first["lr"] = before[0]
    optimizer.step()
    assert rates_of(optimizer) == list(before)
    second["lr"] = 0.25
    optimizer.step()
    assert rates_of(optimizer) == [before[0], 0.25]


@native_backends
@pytest.mark.parametrize("rate", [0.0, 0.02, torch.tensor(0.02)], ids=["0", "a float", "another tensor"])
def test_a_rate_after_one_that_only_the_device_knew(backend: str, rate: Any, seed: int) -> None:
    """With capturable a tensor is copied into the table, past what the host remembers of it."""
    matrix = parameter(6, 5, backend=backend)
    optimizer = FusedLayca([matrix], torch.tensor(0.1), backend=backend, capturable=True)
    train(optimizer, random_gradients([matrix], 2))
    optimizer.param_groups[0]["lr"] = rate
    before = matrix.detach().clone()
    train(optimizer, random_gradients([matrix], 1))
    # In float64, from the chord between the two directions.
    chord = norm_of(matrix.double() / norm_of(matrix) - before.double() / norm_of(before))
    assert 2 * math.asin(chord / 2) == pytest.approx(math.atan(float(rate)), rel=1e-4, abs=1e-6)
