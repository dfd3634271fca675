"""Types of the native module of the CPU backend: see ``csrc/bindings.cpp``."""

from typing import Any

from torch import Tensor

#: Names of the formulas that it has kernels for, each for all types of parameters.
formulas: list[str]

#: The instruction sets that this processor has of those that the kernels were compiled for, the best (default) first.
instruction_sets: list[str]

#: The columns of each table in ``csrc/batch.h``, by the names in ``tables.py``.
columns: dict[str, dict[str, int]]

class BatchView:
    """The tables of one batch, by their addresses, which must stay valid; the structure is read once."""

    def __init__(
        self,
        *,
        tensors: int,
        hypers: int,
        step_options: int,
        layers: int,
        dots: int,
        coefficients: int,
        counts: int,
        partials: int,
        partial_counts: int,
        n_tensors: int,
        n_layers: int,
        tile: int,
        formula: str,
        dtype: str,
        grad_dtype: str,
        state_dtype: str,
        instructions: str | None = None,
    ) -> None: ...
    def measure(self, threads: int) -> None: ...
    def coefficients(self) -> None: ...
    def rotate(self, threads: int) -> None: ...
    def reserve(self, threads: int) -> None: ...
    def step(self, threads: int) -> None: ...

class Layouts:
    """How tensors lay in memory when it was made; ``api`` is torch's DLPack exchange API, a capsule."""

    def __init__(self, api: object, tensors: list[Tensor], owns: bool = False) -> None: ...
    def hold(self, tensors: list[Tensor]) -> bool: ...
    def fetch(self, tensors: list[Tensor], first: int, last: int) -> None: ...
    def fit(self, grads: list[Any], type: type[Tensor], is_neg: Any) -> bytes | None: ...
    def look(
        self, tensors: list[Tensor], name: str, type: type[Tensor], is_neg: Any
    ) -> tuple[list[Any], bytes | None] | None: ...

def entries_hold(entries: list[Any], names: list[str], values: list[Tensor]) -> bool: ...
def same_objects(left: list[Any], right: list[Any]) -> bool: ...
def same_items(entries: dict[Any, Any], keys: list[Any], values: list[Any]) -> bool: ...
def values_are(entries: dict[Any, Any], values: list[Any]) -> bool: ...
def attributes(objects: list[Any], name: str) -> list[Any]: ...
