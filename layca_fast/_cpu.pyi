"""Types of the native module of the CPU backend: see ``csrc/bindings.cpp``."""

#: Names of the formulas that it has kernels for, each for float32 and float64.
formulas: list[str]

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
    ) -> None: ...
    def measure(self, threads: int) -> None: ...
    def coefficients(self) -> None: ...
    def rotate(self, threads: int) -> None: ...
    def step(self, threads: int) -> None: ...
