"""The native CPU backend: C++ kernels that keep a layer in cache between measure and rotate."""

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from ..batch import Batch
from .base import Backend

if TYPE_CHECKING:
    from .._cpu import BatchView

#: Tables of a batch that the kernels walk.
TABLES = (
    *("tensors", "hypers", "step_options", "layers"),
    *("dots", "coefficients", "counts", "partials", "partial_counts"),
)


#: Types of what the tables point to.
DTYPES = ("dtype", "grad_dtype", "state_dtype")


def _import_native() -> tuple[ModuleType | None, str | None]:
    """The native module, or None and the reason why it is missing: what stopped its build, if that is known."""
    try:
        return import_module("layca_fast._cpu"), None
    except ImportError as error:
        note = Path(__file__).parents[1] / "_build.json"
        built = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        reason = built.get("cpu") or error
        return None, f"the native module is not there: {reason}"


class CpuBackend(Backend):
    """Layers that fit in a core's cache are done whole by one thread; larger ones are shared by all threads.

    Runs on ``torch.get_num_threads()`` threads, which are those that torch itself uses where both were compiled with
    GNU OpenMP. Denormal numbers count as zero for the duration of a call.
    """

    name = "cpu"
    tile = 4096
    #: Of those in ``_cpu.instruction_sets``; None: the best. Batches that were stepped before keep to theirs.
    instructions: str | None = None

    def __init__(self) -> None:
        self._native, self._reason = _import_native()
        # One for each type of gradients that a batch has had.
        self._views: WeakKeyDictionary[Batch, dict[torch.dtype, BatchView]] = WeakKeyDictionary()

    def missing(self) -> str | None:
        return self._reason

    def refuses(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it runs on CPU tensors only"

    def _view(self, batch: Batch) -> "BatchView":
        views = self._views.setdefault(batch, {})
        view = views.get(batch.grad_dtype)
        if view is None:
            if self._native is None:
                raise RuntimeError(f"backend='cpu' cannot run: {self._reason}")
            # The tables stay where they are for the life of the batch; only what they hold changes.
            view = self._native.BatchView(
                **{name: getattr(batch, name).data_ptr() for name in TABLES},
                n_tensors=len(batch.slots),
                n_layers=batch.n_layers,
                tile=batch.tile,
                formula=batch.formula.name,
                **{name: str(getattr(batch, name)).removeprefix("torch.") for name in DTYPES},
                instructions=self.instructions,
            )
            views[batch.grad_dtype] = view
        return view

    def measure(self, batch: Batch) -> None:
        self._view(batch).measure(torch.get_num_threads())

    def coefficients(self, batch: Batch) -> None:
        self._view(batch).coefficients()

    def rotate(self, batch: Batch) -> None:
        self._view(batch).rotate(torch.get_num_threads())

    def step(self, batch: Batch) -> None:
        self._view(batch).step(torch.get_num_threads())


BACKEND = CpuBackend()
