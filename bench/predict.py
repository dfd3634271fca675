"""``python -m bench.predict``: memory, communication and time of a step of large models, from counts of bytes.

Prints the tables of docs/scaling.md. Times are predictions: bytes over a bandwidth and a latency that the options give,
of which the defaults are named in the tables' captions.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from math import log2, prod
from typing import Any

import torch

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES, Formula
from layca_fast.state.compensation import HALVES, compute_dtype, is_compensated, state_dtype
from layca_fast.state.spread import At
from layca_fast.step.directions import ELSEWHERE
from layca_fast.step.exchange import owners, work
from layca_fast.step.together import MATRICES, fill

from .shapes import Shape, llama_1b, llama_7b, llama_70b

Options = dict[str, Any]

BASE_OPTIONS: Sequence[tuple[str, Options]] = (
    ("sgd", {}),
    ("sgd, momentum", {"momentum": 0.9}),
    ("adam", {"base": "adam"}),
    ("adam, amsgrad", {"base": "adam", "amsgrad": True}),
    ("muon", {"base": "muon"}),
)

#: (name, type of the parameters, options)
STORAGE: Sequence[tuple[str, torch.dtype, Options]] = (
    ("float32", torch.float32, {}),
    ("bfloat16", torch.bfloat16, {}),
    ("bfloat16, bfloat16 state", torch.bfloat16, {"state_dtype": torch.bfloat16}),
    ("bfloat16, uncompensated", torch.bfloat16, {"compensate": False}),
)

MODELS: Sequence[tuple[str, Callable[[], list[Shape]]]] = (
    ("1B", llama_1b),
    ("7B", llama_7b),
    ("70B", llama_70b),
)

GPUS = (1, 8, 1024)

#: The type that directions are made in there, and travel in.
ON_GPUS = torch.bfloat16

#: Rows from which a matrix has one for each word.
VOCABULARY = 30_000

#: Of a batch that large models are trained with.
TOKENS = 4_000_000


def group_of(options: Options) -> Options:
    """The param group that these options make."""
    optimizer = FusedLayca([torch.ones(2, 2)], 0.01, **options)
    return optimizer.param_groups[0]


def formula_of(group: Options) -> Formula:
    return BASES[group["base"]].formula(group)


def state_bytes(dtype: torch.dtype, group: Options) -> int:
    """Bytes of state per weight, beside 8 per layer (radius) and 4 per tensor where the base counts steps."""
    remainder = 2 if is_compensated(dtype, group) else 0
    return len(formula_of(group).states) * state_dtype(dtype, group).itemsize + remainder


def _passes(weight: int, gradient: int, states: int, reads_grad: bool) -> int:
    measure = weight + gradient + 2 * states
    rotate = 2 * weight + states + gradient * reads_grad
    return measure + rotate


def moved_bytes(dtype: torch.dtype, group: Options) -> int:
    """Bytes that the passes of a step read and write per weight: gradients have the type of the weights.

    Of a direction of whole matrices, what its products read and write is not counted.
    """
    formula, gradient = formula_of(group), dtype.itemsize
    states = len(formula.states) * state_dtype(dtype, group).itemsize
    weight = dtype.itemsize + (2 if is_compensated(dtype, group) else 0)
    if formula.direct is None:
        return _passes(weight, gradient, states, formula.reads_grad)
    step, made = compute_dtype(dtype).itemsize, ON_GPUS.itemsize
    # Zeros are written, and of 16-bit parameters the step is put together of two halves.
    advance = step + _passes(step, gradient, states, formula.reads_grad) + 2 * step * (dtype in HALVES)
    stacked = 2 * (step + made)
    return advance + stacked + _passes(weight, step, 0, True)


def count_layers(shapes: Sequence[Shape]) -> int:
    """Those that rotate by default: matrices, one layer each."""
    return sum(len(shape) > 1 for shape in shapes)


def all_reduce_seconds(gpus: int, sent: float, latency: float, network: float) -> float:
    """A tree's rounds, down and up, and the bytes that a ring would send."""
    return 0.0 if gpus == 1 else 2 * log2(gpus) * latency + 2 * sent * (gpus - 1) / gpus / network


def matrices(shapes: Sequence[Shape]) -> list[Shape]:
    """Those that muon directs: all but the embedding and the head, which have a row for each word of a vocabulary."""
    return [shape for shape in shapes if len(shape) > 1 and shape[0] < VOCABULARY]


def product_flops(rows: int, columns: int) -> int:
    """What the products of five iterations take, in a type of 16 bits: X X', its square, and one with X, in each."""
    small, large = sorted((rows, columns))
    return 5 * (2 * (2 * small * small * large) + 2 * small**3)


def exchanged_bytes(elements: int, gpus: int, itemsize: int) -> float:
    """What each of so many GPUs sends on average, there and back: all but the parts of a matrix's owner."""
    return 2 * itemsize * elements / gpus * (gpus - 1) / gpus


def busiest_flops(shapes: Sequence[Shape], gpus: int) -> tuple[int, int]:
    """(windows, FLOPs of the busiest GPU, added up over windows) where matrices are shared out by FSDP2."""
    ordered = sorted(shapes, key=prod, reverse=True)
    limit = max(ELSEWHERE, MATRICES * prod(ordered[0]))
    windows: dict[int, list[Shape]] = {}
    for shape, window in zip(ordered, fill([-(-prod(shape) // gpus) for shape in ordered], limit), strict=True):
        windows.setdefault(window, []).append(shape)
    total = 0
    for part in windows.values():
        loads: Counter[At] = Counter()
        for shape, owner in zip(part, owners([work(*shape) for shape in part], (gpus,)), strict=True):
            loads[owner] += product_flops(*shape)
        total += max(loads.values())
    return len(windows), total


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def state_table() -> str:
    rows = []
    for name, dtype, more in STORAGE:
        counts = [str(state_bytes(dtype, group_of({**options, **more}))) for _, options in BASE_OPTIONS]
        rows.append([name, *counts])
    return _table(["parameters", *(name for name, _ in BASE_OPTIONS)], rows)


def moved_table() -> str:
    rows = []
    for name, dtype, more in STORAGE:
        counts = [str(moved_bytes(dtype, group_of({**options, **more}))) for _, options in BASE_OPTIONS]
        rows.append([name, *counts])
    return _table(["parameters", *(name for name, _ in BASE_OPTIONS)], rows)


def collective_table() -> str:
    rows = []
    for name, shapes in MODELS:
        layers, weights = count_layers(shapes()), sum(map(prod, shapes()))
        gradients = 2 * weights
        rows.append([name, f"{weights / 1e9:.2f}e9", str(layers), str(24 * layers), f"{24 * layers / gradients:.0e}"])
    return _table(["model", "weights", "layers", "bytes summed per step", "as a part of bfloat16 gradients"], rows)


def time_table(bandwidth: float, latency: float, network: float) -> str:
    dtype, group = torch.bfloat16, group_of({"base": "adam"})
    rows = []
    for name, shapes in MODELS:
        weights, layers = sum(map(prod, shapes())), count_layers(shapes())
        memory = weights * (2 * dtype.itemsize + state_bytes(dtype, group))
        row = [name]
        for gpus in GPUS:
            kernels = weights / gpus * moved_bytes(dtype, group) / bandwidth
            sums = all_reduce_seconds(gpus, 24 * layers, latency, network)
            row.append(f"{1e3 * (kernels + sums):.3g} ({memory / gpus / 1e9:.3g})")
        rows.append(row)
    return _table(["model", *(f"{gpus:,} GPU{'s' * (gpus > 1)}" for gpus in GPUS)], rows)


def products_table() -> str:
    rows = []
    for name, shapes in (MODELS[0], MODELS[-1]):
        directed = matrices(shapes())
        flops = sum(product_flops(*shape) for shape in directed)
        training = 6 * sum(map(prod, shapes())) * TOKENS
        counted = [str(len(directed)), f"{sum(map(prod, directed)) / 1e9:.2f}e9"]
        rows.append([name, *counted, f"{flops:.2e}", f"{100 * flops / training:.1f} %"])
    of_training = f"as a part of training on {TOKENS / 1e6:.0f} million tokens"
    return _table(["model", "matrices", "weights in them", "FLOPs per step", of_training], rows)


def exchange_table(network: float, flops: float) -> str:
    rows = []
    for name, shapes in (MODELS[0], MODELS[-1]):
        directed = matrices(shapes())
        elements, total = sum(map(prod, directed)), sum(product_flops(*shape) for shape in directed)
        for gpus in GPUS[1:]:
            windows, busiest = busiest_flops(directed, gpus)
            sent = exchanged_bytes(elements, gpus, ON_GPUS.itemsize)
            share = [f"{1e3 * busiest / flops:.3g}", f"{busiest / (total / gpus):.2f}"]
            rows.append([name, f"{gpus:,}", str(windows), f"{sent / 1e9:.3g}", f"{1e3 * sent / network:.3g}", *share])
    head = ["model", "GPUs", "windows", "GB sent", "ms of sending", "ms of products, busiest GPU", "÷ even share"]
    return _table(head, rows)


def tables(bandwidth: float, latency: float, network: float, flops: float) -> list[tuple[str, str]]:
    """(caption, table) of everything that is predicted."""
    made = (
        f"adam on bfloat16: milliseconds per step, and GB of weights, gradients and state per GPU, at "
        f"{bandwidth / 1e12:g} TB/s of memory, {latency * 1e6:g} µs per hop and {network / 1e9:g} GB/s of network"
    )
    exchanged = (
        f"muon under FSDP2: each GPU's part of a step, there and back, in bfloat16 at {network / 1e9:g} GB/s of "
        f"network and {flops / 1e12:g} TFLOP/s"
    )
    return [
        ("Bytes of state per weight", state_table()),
        ("Bytes read and written per weight and step", moved_table()),
        ("What the processes sum per step and mesh dimension", collective_table()),
        (made, time_table(bandwidth, latency, network)),
        ("muon: matrix products of a step", products_table()),
        (exchanged, exchange_table(network, flops)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table, as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes/s that a GPU copies (default: H200)")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds per hop of an all-reduce")
    parser.add_argument("--network", type=float, default=5e10, help="bytes/s per GPU between nodes")
    parser.add_argument("--flops", type=float, default=4e14, help="FLOP/s that bfloat16 products reach on a GPU")
    options = parser.parse_args(arguments)
    for caption, table in tables(options.bandwidth, options.latency, options.network, options.flops):
        print(f"**{caption}**\n\n{table}\n")


if __name__ == "__main__":
    main()
