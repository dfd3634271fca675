"""What the backends in compiled modules share: the view of a batch that its kernels keep."""

from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

from ..state.native import import_native
from ..step.batch import Batch

View = TypeVar("View")

#: Types of what the tables point to.
DTYPES = ("dtype", "grad_dtype", "state_dtype")

#: Tables of a batch that all kernels walk.
TABLES = (
    *("tensors", "hypers", "step_options", "layers"),
    *("dots", "coefficients", "counts", "partials", "partial_counts"),
)


class Views(Generic[View]):
    """The views that a native module has of batches, made at the first step of each and dropped with it."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.native, self.reason = import_native(backend)
        # One for each type of gradients that a batch has had.
        self._views: WeakKeyDictionary[Batch, dict[torch.dtype, View]] = WeakKeyDictionary()

    def known(self, batch: Batch) -> View | None:
        """The view of ``batch`` for the gradients that it has now, if there is one."""
        views = self._views.get(batch)
        return None if views is None else views.get(batch.grad_dtype)

    def of(self, batch: Batch, **more: Any) -> View:
        """The view of ``batch``; ``more``: what the module wants to know beside the tables that all walk."""
        views = self._views.setdefault(batch, {})
        view = views.get(batch.grad_dtype)
        if view is None:
            if self.native is None:
                raise RuntimeError(f"backend={self.backend!r} cannot run: {self.reason}")
            # The tables stay where they are for the life of the batch; only what they hold changes.
            view = self.native.BatchView(
                **{name: getattr(batch, name).data_ptr() for name in TABLES},
                **more,
                n_tensors=len(batch.slots),
                n_layers=batch.n_layers,
                tile=batch.tile,
                formula=batch.formula.name,
                **{name: str(getattr(batch, name)).removeprefix("torch.") for name in DTYPES},
            )
            views[batch.grad_dtype] = view
        return view
