"""The host's side of a step: it allocates nothing, notices every change, and leaves other threads running."""

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import UserDict
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast import FusedLayca, watch
from layca_fast.backends import load
from layca_fast.watch import Layouts, addresses

from .support import clones, copy_of, native_backends, parameter, params_of, random_gradients, same_bits, train

BASES = ({"momentum": 0.9}, {"base": "adam"}, {"base": "rmsprop", "centered": True})
every_base = pytest.mark.parametrize("options", BASES, ids=str)


def many(options: dict[str, Any], backend: str = "cpu") -> FusedLayca:
    """An optimizer of 60 tensors in two groups, past its first steps."""
    params = [parameter(*shape, backend=backend) for shape in ((9, 8), (30,), (4, 3, 3)) * 20]
    groups = [{"params": params[:30]}, {"params": params[30:], "lr": 0.02}]
    optimizer = FusedLayca(groups, 0.01, backend=backend, **options)
    train(optimizer, random_gradients(params, 3))
    return optimizer


class Recorder(TorchDispatchMode):
    """The names of all operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own step reports itself to the profiler.
        if func.namespace != "profiler":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@every_base
def test_a_step_on_the_same_gradients_runs_nothing_but_the_kernels(options: dict[str, Any], seed: int) -> None:
    optimizer = many(options)
    with Recorder() as recorder:
        for _ in range(3):
            optimizer.step()
    assert recorder.names == []


@every_base
def test_new_gradients_cost_one_column_of_addresses(options: dict[str, Any], seed: int) -> None:
    """Which is written into the table that is there: nothing that makes a tensor with memory of its own is run."""
    optimizer = many(options)
    for param in params_of(optimizer):
        param.grad = torch.randn_like(param)
    with Recorder() as recorder:
        optimizer.step()
    assert set(recorder.names) <= {"aten::slice.Tensor", "aten::select.int", "aten::copy_", "aten::detach"}


@every_base
def test_memory_does_not_grow_over_1000_steps(options: dict[str, Any], seed: int) -> None:
    optimizer = many(options)
    gradients = random_gradients(params_of(optimizer), 1)[0]

    def steps(count: int) -> None:
        for _ in range(count):
            for param, grad in zip(params_of(optimizer), gradients, strict=True):
                param.grad = grad.clone()
            optimizer.step()
            optimizer.zero_grad()

    steps(10)
    gc.collect()
    tracemalloc.start()
    try:
        before, objects = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
        steps(1000)
        gc.collect()
        grown, more = tracemalloc.get_traced_memory()[0] - before, len(gc.get_objects()) - objects
    finally:
        tracemalloc.stop()
    # One object of 56 bytes kept per step would be 56 kB; pytest and the interpreter keep a little themselves.
    assert grown < 30_000
    assert more < 100


def replace_parameter_memory(optimizer: FusedLayca) -> None:
    for param in params_of(optimizer):
        param.data = param.data.clone()


def drop_some_gradients(optimizer: FusedLayca) -> None:
    for param in params_of(optimizer)[::7]:
        param.grad = None


def transpose_in_place(optimizer: FusedLayca) -> None:
    """The same address, size and shape in another order; the gradient keeps the old one."""
    for param in params_of(optimizer):
        if param.shape == (8, 8):
            param.data = param.data.t()


def reorder_groups(optimizer: FusedLayca) -> None:
    optimizer.param_groups.reverse()


def move_a_parameter_to_the_other_group(optimizer: FusedLayca) -> None:
    first, second = optimizer.param_groups
    second["params"].append(first["params"].pop())


def add_a_parameter(optimizer: FusedLayca) -> None:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 20).view(4, 5))
    param.grad = torch.ones_like(param).tril()
    optimizer.param_groups[0]["params"].append(param)


def replace_state(optimizer: FusedLayca) -> None:
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {name: value.clone() for name, value in state.items()}


def replace_state_memory(optimizer: FusedLayca) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


CHANGES = (
    replace_parameter_memory,
    drop_some_gradients,
    transpose_in_place,
    reorder_groups,
    move_a_parameter_to_the_other_group,
    add_a_parameter,
    replace_state,
    replace_state_memory,
)


@pytest.fixture(params=["C++", "Python"])
def watching(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to look at tensors: C++'s is there with the native module and with torch >= 2.10."""
    if request.param == "Python":
        monkeypatch.setattr(watch, "_native", None)
    else:
        assert watch._native is not None
        if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
            pytest.skip("this torch does not describe its tensors in C")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@every_base
def test_what_changes_between_steps_is_noticed(options: dict[str, Any], change: Any, seed: int, watching: None) -> None:
    """Beside an optimizer that makes its plan anew at every step."""
    params = [parameter(*shape) for shape in ((8, 8), (30,), (4, 3, 3)) * 4]
    twins = clones(params)
    quick, careful = (
        FusedLayca([{"params": each[:6]}, {"params": each[6:], "lr": 0.02}], 0.01, backend="cpu", **options)
        for each in (params, twins)
    )
    for step, row in enumerate(random_gradients(params, 4)):
        for param, twin, grad in zip(params, twins, row, strict=True):
            param.grad, twin.grad = grad.clone(), grad.clone()
        if step == 2:
            change(quick)
            change(careful)
        careful._plan = None
        quick.step()
        careful.step()
    for ours, theirs in zip(params_of(quick), params_of(careful), strict=True):
        assert same_bits(ours.detach(), theirs.detach())
        assert same_bits(copy_of(dict(quick.state[ours])), copy_of(dict(careful.state[theirs])))


def big_step() -> FusedLayca:
    optimizer = FusedLayca([parameter(3000, 3000)], 0.01, momentum=0.9, backend="cpu")
    train(optimizer, [[torch.randn(3000, 3000)]])
    return optimizer


def test_other_python_threads_run_during_the_kernels(seed: int) -> None:
    """With the interpreter's lock held, the other thread would stand still for the whole step."""
    optimizer = big_step()
    (backend, batch) = optimizer._plan.batches[0]
    batch.take_gradients()
    batch.refresh()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    interval = sys.getswitchinterval()
    # Longer than the steps, so that the other thread runs only where the lock is given away.
    sys.setswitchinterval(60)
    try:
        thread.start()
        during = 0
        for _ in range(20):
            start = time.perf_counter()
            backend.step(batch)
            end = time.perf_counter()
            during += sum(start < tick < end for tick in list(ticks))
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join()
    assert during > 0


@native_backends
def test_threads_with_optimizers_of_their_own_get_the_bits_of_one(backend: str, seed: int) -> None:
    """Each larger than what one thread does alone, so that their teams run side by side."""
    starts = [torch.randn(300, 400) for _ in range(4)]
    gradients = [[[torch.randn(300, 400)] for _ in range(5)] for _ in starts]

    def run(start: Tensor, rows: list[list[Tensor]], results: dict[int, Tensor], index: int) -> None:
        optimizer = FusedLayca([start.clone().requires_grad_()], 0.03, base="adam", backend=backend)
        train(optimizer, rows)
        results[index] = params_of(optimizer)[0].detach()

    alone: dict[int, Tensor] = {}
    together: dict[int, Tensor] = {}
    for index, (start, rows) in enumerate(zip(starts, gradients, strict=True)):
        run(start, rows, alone, index)
    threads = [
        threading.Thread(target=run, args=(start, rows, together, index))
        for index, (start, rows) in enumerate(zip(starts, gradients, strict=True))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same_bits(alone, dict(sorted(together.items())))


def _step_in_a_child(results: Any) -> None:
    # Of torch's and OpenMP's threads only the one that forked is left here.
    torch.set_num_threads(1)
    torch.manual_seed(5)
    param = torch.randn(400, 300).requires_grad_()
    optimizer = FusedLayca([param], 0.03, momentum=0.9, backend="cpu")
    train(optimizer, [[torch.randn(400, 300)] for _ in range(3)])
    results.put(float(param.detach().double().sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_worker_may_step(seed: int) -> None:
    """As in a DataLoader's workers, after the parent has run its own team of threads."""
    train(big_step(), [[torch.randn(3000, 3000)]])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    worker = context.Process(target=_step_in_a_child, args=(results,))
    worker.start()
    from_child = results.get(timeout=60)
    worker.join(timeout=60)
    assert worker.exitcode == 0
    here = multiprocessing.get_context("spawn").Queue()
    threads = torch.get_num_threads()
    try:
        _step_in_a_child(here)
    finally:
        torch.set_num_threads(threads)
    assert from_child == here.get(timeout=60)


PROGRAM = """
import torch
from layca_fast import FusedLayca
torch.manual_seed(3)
param = torch.randn(700, 500).requires_grad_()
optimizer = FusedLayca([param], 0.03, base="adam", backend="cpu")
for _ in range(3):
    param.grad = torch.randn_like(param)
    optimizer.step()
print(torch.get_num_threads(), param.detach().double().sum().item().hex())
"""


def test_one_openmp_thread_gives_the_bits_of_several(seed: int) -> None:
    printed = []
    for threads in ("1", "2"):
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", PROGRAM]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
        printed.append(run.stdout.split())
    assert [count for count, _ in printed] == ["1", "2"]
    assert printed[0][1] == printed[1][1]


def test_the_kernels_follow_torchs_number_of_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = big_step()
    asked: list[int] = []
    backend = load("cpu")
    view = backend._view(optimizer._plan.batches[0][1])

    class Spy:
        def step(self, threads: int) -> None:
            asked.append(threads)
            view.step(threads)

    monkeypatch.setattr(backend, "_view", lambda batch: Spy())
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 2, 3]


def test_memory_that_is_read_as_another_type_is_noticed(seed: int, watching: None) -> None:
    """An allocator may give the address of a tensor to its successor, so the address alone tells nothing."""
    tensors = [torch.randn(4, 4), torch.randn(6)]
    layouts = Layouts(tensors)
    assert layouts.hold()
    changes = (
        lambda tensor: tensor.view(torch.int32),
        lambda tensor: tensor[:2],
        lambda tensor: tensor.t(),
    )
    for change in changes:
        before = tensors[0].data
        address = before.data_ptr()
        tensors[0].data = change(before)
        assert tensors[0].data_ptr() == address
        assert not layouts.hold()
        tensors[0].data = before
        assert layouts.hold()


def freed(tensor: Tensor) -> Tensor:
    """A copy without memory, as sharded training leaves parameters between their uses."""
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def of_another_kind(tensor: Tensor) -> list[Any]:
    """Gradients that kernels must not read as they read ``tensor``."""
    return [
        None,
        tensor.double(),
        tensor.t(),
        tensor[:2],
        tensor.to_sparse(),
        torch._neg_view(tensor),
        torch.nn.Parameter(tensor),
        tensor.to("meta"),
        freed(tensor),
    ]


@pytest.mark.parametrize("kind", range(9))
def test_gradients_fit_only_if_they_lie_as_their_tensors(kind: int, seed: int, watching: None) -> None:
    tensors = [torch.randn(6), torch.randn(4, 4), torch.randn(())]
    layouts = Layouts(tensors)
    grads: list[Any] = [torch.randn_like(tensor) for tensor in tensors]
    assert layouts.fit(grads) == addresses(grads)
    grads[1] = of_another_kind(grads[1])[kind]
    # Not part of the assertion, which would print the freed one.
    found = layouts.fit(grads)
    assert found is None


def test_what_python_code_raises_in_between_is_raised(seed: int, watching: None) -> None:
    class Interrupting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.is_neg:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    optimizer = many({"momentum": 0.9})
    before = copy_of(params_of(optimizer))
    with Interrupting(), pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert same_bits(before, params_of(optimizer))


def test_state_in_another_mapping_is_watched_too(seed: int, watching: None) -> None:
    optimizer = many({"momentum": 0.9})
    param = params_of(optimizer)[0]
    optimizer.state[param] = UserDict(optimizer.state[param])
    optimizer.step()
    plan = optimizer._plan
    optimizer.step()
    assert optimizer._plan is plan
    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    optimizer.step()
    assert optimizer._plan is not plan


def test_attributes_are_those_of_a_list_that_stays() -> None:
    class Growing:
        @property
        def grad(self) -> None:
            objects.append(self)

    objects: list[Any] = [Growing(), Growing()]
    assert import_module("layca_fast._cpu").attributes(objects, "grad") == [None, None]

    class Shrinking:
        @property
        def grad(self) -> None:
            objects.clear()

    objects[:] = [Shrinking(), Shrinking()]
    with pytest.raises(RuntimeError, match="shorter"):
        import_module("layca_fast._cpu").attributes(objects, "grad")
