"""``python -m bench.host``: what the host does in a step of tensors on a GPU, timed without one.

The GPU is a stand-in: tables are uploaded as to a GPU, into memory of the host, and launches do nothing. So the times
are those of Python and of the native module alone; of a real step they leave out what CUDA's runtime takes for three or
four launches, for a copy and an event for each table that changed, and for asking which device and stream are current.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import layca_fast
from layca_fast import FusedLayca
from layca_fast.backends.cuda import BACKEND, CudaBackend
from layca_fast.figures.console import print_table
from layca_fast.step.upload import Buffers, Mirror

from .ratios import positive
from .rows import quartiles

#: Microseconds of a step that this is held to, by its number of tensors.
GOALS = {161: 60.0, 2000: 600.0}

#: What is new in a step: nothing (gradients are filled in place), the gradients' addresses, and the rate, too.
CASES = ("same gradients", "new gradients", "new gradients and lr")

#: Where the package's own code lies.
ROOT = str(Path(layca_fast.__file__).parent)

OPTIONS: dict[str, dict[str, Any]] = {"momentum": {"momentum": 0.9}, "adam": {"base": "adam"}}


class _Event:
    """Of a device that is always done."""

    def query(self) -> bool:
        return True

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _View:
    """Kernels that do nothing."""

    def __init__(self, **tables: Any) -> None:
        pass

    def step(self, stream: int) -> None:
        pass


@contextmanager
def stand_in() -> Iterator[None]:
    """Tensors on the CPU take the CUDA backend and are uploaded as to a GPU; no kernel is run."""
    make = Mirror.__init__

    def elsewhere(mirror: Mirror, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        make(mirror, rows, columns, dtype, device)
        mirror._on_host, mirror.device_tensor = False, torch.zeros(rows, columns, dtype=dtype)
        mirror._buffers = Buffers(mirror._guarded_buffer)

    stream = SimpleNamespace(cuda_stream=0)
    with (
        patch.object(Mirror, "__init__", elsewhere),
        patch.object(Mirror, "_pinned_buffer", lambda mirror: torch.zeros_like(mirror._host)),
        patch.object(BACKEND._views, "native", SimpleNamespace(BatchView=_View)),
        patch.object(CudaBackend, "missing", lambda backend: None),
        patch.object(CudaBackend, "refuses", lambda backend, device: None),
        patch.object(torch.cuda, "Event", _Event),
        patch.object(torch.cuda, "device", lambda device: nullcontext()),
        patch.object(torch.cuda, "current_stream", lambda device=None: stream),
    ):
        yield


class Host:
    """An optimizer of so many small tensors, half of them matrices, past its first steps."""

    def __init__(self, tensors: int, options: dict[str, Any], case: str) -> None:
        self._params = [torch.nn.Parameter(torch.ones(8, 8) if i % 2 else torch.ones(8)) for i in range(tensors)]
        self._grads: list[list[Tensor]] = [[torch.ones_like(param) for param in self._params] for _ in range(2)]
        self._optimizer = FusedLayca(self._params, 0.01, backend="cuda", **options)
        self._case, self._steps = case, 0
        for _ in range(3):
            self.prepare()
            self.step()

    def prepare(self) -> None:
        """What backward and a scheduler do before a step."""
        if self._case != "same gradients" or self._steps == 0:
            for param, grad in zip(self._params, self._grads[self._steps % 2], strict=True):
                param.grad = grad
        if self._case == "new gradients and lr":
            for group in self._optimizer.param_groups:
                group["lr"] = 0.01 / (1 + self._steps % 7)
        self._steps += 1

    def step(self) -> None:
        self._optimizer.step()


def timed(host: Host, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of so many steps."""
    taken = []
    for _ in range(rounds):
        host.prepare()
        start = clock()
        host.step()
        taken.append(clock() - start)
    return taken


def calls_of(host: Host) -> int:
    """How many functions, Python's and C's, the package calls in a step: the same number at every run.

    What torch does around a step is left out, and what its functions call inside: hooks, profilers and compilers add to
    that, whoever in the process has used them.
    """
    host.prepare()
    count = 0

    def is_ours(frame: FrameType | None) -> bool:
        return frame is not None and frame.f_code.co_filename.startswith(ROOT)

    def called(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        # Of a function in C, the frame is that of who calls it.
        count += is_ours(frame) if event == "c_call" else event == "call" and (is_ours(frame) or is_ours(frame.f_back))

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(called)
    try:
        host.step()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=300, help="steps of each row (default: %(default)s)")
    args = parser.parse_args(argv)
    rows = []
    with stand_in():
        for tensors, goal in GOALS.items():
            for name, options in OPTIONS.items():
                for case in CASES:
                    host = Host(tensors, options, case)
                    times = timed(host, args.rounds, time.perf_counter)
                    first, middle, third = (1e6 * each for each in quartiles(times))
                    work = 1e6 * quartiles(timed(host, args.rounds, time.process_time))[1]
                    found = [f"{middle:.0f} ({first:.0f}-{third:.0f})", f"{work:.0f}", f"{goal:.0f}"]
                    rows.append([str(tensors), name, case, *found, str(calls_of(host))])
    columns = ["tensors", "base", "new in the step", "µs (quartiles)", "µs of processor", "goal", "calls"]
    print_table("Host time of a step of tensors on a GPU, launches left out", columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
