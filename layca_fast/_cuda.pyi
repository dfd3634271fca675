"""Types of the native module of the CUDA backend: see ``csrc/bindings_cuda.cpp``."""

#: Names of the formulas that it has kernels for, each for all types of parameters.
formulas: list[str]

def device_problem() -> str:
    """Why CUDA finds no device to run on; "" where it finds one."""

class BatchView:
    """The tables of one batch, by their addresses on the device, which must stay valid.

    ``stream``: the handle of a CUDA stream of the current device, which must be the tables' one. Calls return at once;
    RuntimeError names a kernel that could not be launched.
    """

    def __init__(
        self,
        *,
        tensors: int,
        hypers: int,
        step_options: int,
        layers: int,
        tiles: int,
        dots: int,
        coefficients: int,
        counts: int,
        partials: int,
        partial_counts: int,
        n_tensors: int,
        n_layers: int,
        n_tiles: int,
        tile: int,
        formula: str,
        dtype: str,
        grad_dtype: str,
        state_dtype: str,
    ) -> None: ...
    def measure(self, stream: int) -> None: ...
    def coefficients(self, stream: int) -> None: ...
    def rotate(self, stream: int) -> None: ...
    def step(self, stream: int) -> None: ...
