"""What an attached optimizer costs in memory, and when it gives it back."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layca_fast import attach
from layca_fast.attach.exchange import BLOCK_ON_CPU

from ..support import parameter, params_of, random_gradients, train


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that torch's operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _storages(self, values: Any) -> list[torch.UntypedStorage]:
        return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, Tensor)]

    def _forget(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.live -= size


def test_the_extra_memory_is_one_copy_of_the_rotating_weights(seed: int) -> None:
    params = [parameter(3 * BLOCK_ON_CPU // 1000, 1000), parameter(700, 900), parameter(2000)]
    frozen = parameter(1000, 1000).requires_grad_(False)
    optimizer = SGD([*params, frozen], 0.02, foreach=False)
    attach(optimizer, backend="cpu")
    for param in params:
        param.grad = torch.randn_like(param)
    rotating = sum(4 * param.numel() for param in params[:2])
    scratch = 4 * BLOCK_ON_CPU
    with Allocations() as allocations:
        for _ in range(3):
            optimizer.step()
    # What is left is tables: a row for each tensor and tile.
    assert rotating <= allocations.live <= allocations.peak <= rotating + scratch + 2**17


@pytest.mark.parametrize("removed", [False, True])
def test_an_optimizer_that_nobody_holds_is_freed_at_once(removed: bool, seed: int) -> None:
    """Its state may be twice the model: it must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        optimizer = AdamW([parameter(6, 5)], lr=0.1)
        handle = attach(optimizer)
        train(optimizer, random_gradients(params_of(optimizer), 2))
        if removed:
            handle.remove()
        state, gone = weakref.ref(optimizer.state[params_of(optimizer)[0]]["exp_avg"]), weakref.ref(optimizer)
        del optimizer
        assert gone() is None
        assert state() is None
        handle.remove()
    finally:
        gc.enable()


def test_removing_gives_the_copies_back(seed: int) -> None:
    optimizer = SGD([parameter(300, 200)], 0.1)
    handle = attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert handle._shadow is not None
    copies = [weakref.ref(each) for each in handle._shadow._copies]
    assert copies
    handle.remove()
    assert [each() for each in copies] == [None]
