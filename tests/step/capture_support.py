"""Replays without a GPU, for the tests of captured steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from layca_fast import FusedLayca
from layca_fast.step.batch import Batch
from layca_fast.step.unscaling import LossScale
from layca_fast.step.upload import Mirror

from ..support import contents, params_of, same_bits, train


def record(optimizer: FusedLayca, capturing: Callable[[bool], None]) -> Callable[[], None]:
    """Take a step as a capture would see it; what is returned does to the device what a replay would."""
    tables: list[Tensor] = []
    fetched: list[tuple[Batch, LossScale | None]] = []
    fetch = Batch.fetch

    def fetching(batch: Batch, loss_scale: LossScale | None) -> None:
        fetched.append((batch, loss_scale))
        fetch(batch, loss_scale)

    with pytest.MonkeyPatch.context() as patch:
        # A graph keeps the gradients' memory, and a copy of the table with their addresses.
        patch.setattr(Batch, "release", lambda batch: None)
        patch.setattr(Mirror, "record", lambda mirror: tables.append(mirror.device_tensor.clone()))
        patch.setattr(Batch, "fetch", fetching)
        capturing(True)
        optimizer.step()
        capturing(False)
    batches = optimizer._plan.batches

    @torch.no_grad()
    def replay() -> None:
        for (batch, loss_scale), table in zip(fetched, tables, strict=True):
            batch.tensors.copy_(table)
            batch.fetch(loss_scale)
        for backend, batch in batches:
            batch.call(backend)()

    return replay


def compare_replays(
    captured: FusedLayca, eager: FusedLayca, rows: Iterable[Sequence[Tensor]], capturing: Callable[[bool], None]
) -> Iterator[None]:
    """Step both with every row of gradients, ``captured`` by a recording of its first; same bits after each."""
    replay = None
    for row in rows:
        for param, grad in zip(params_of(captured), row, strict=True):
            param.grad.copy_(grad)
        if replay is None:
            replay = record(captured, capturing)
        else:
            replay()
        train(eager, [row])
        assert same_bits(contents(captured), contents(eager))
        yield
