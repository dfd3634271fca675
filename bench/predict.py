"""``python -m bench.predict``: memory, communication and time of a step of large models, from counts of bytes.

Prints the tables of docs/scaling.md. Times are predictions: bytes over a bandwidth and a latency that the options give,
of which the defaults are named in the tables' captions.
"""

import argparse
from collections.abc import Callable, Sequence
from math import log2, prod
from typing import Any

import torch

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES, Formula
from layca_fast.state.compensation import is_compensated, state_dtype

from .shapes import Shape, llama_1b, llama_7b, llama_70b

Options = dict[str, Any]

BASE_OPTIONS: Sequence[tuple[str, Options]] = (
    ("sgd", {}),
    ("sgd, momentum", {"momentum": 0.9}),
    ("adam", {"base": "adam"}),
    ("adam, amsgrad", {"base": "adam", "amsgrad": True}),
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


def moved_bytes(dtype: torch.dtype, group: Options) -> int:
    """Bytes that the two passes of a step read and write per weight: gradients have the type of the weights."""
    formula, weight = formula_of(group), dtype.itemsize
    states = len(formula.states) * state_dtype(dtype, group).itemsize
    remainder = 2 if is_compensated(dtype, group) else 0
    measure = weight + remainder + weight + 2 * states
    rotate = 2 * (weight + remainder) + states + weight * formula.reads_grad
    return measure + rotate


def count_layers(shapes: Sequence[Shape]) -> int:
    """Those that rotate by default: matrices, one layer each."""
    return sum(len(shape) > 1 for shape in shapes)


def all_reduce_seconds(gpus: int, sent: float, latency: float, network: float) -> float:
    """A tree's rounds, down and up, and the bytes that a ring would send."""
    return 0.0 if gpus == 1 else 2 * log2(gpus) * latency + 2 * sent * (gpus - 1) / gpus / network


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


def tables(bandwidth: float, latency: float, network: float) -> list[tuple[str, str]]:
    """(caption, table) of everything that is predicted."""
    made = (
        f"adam on bfloat16: milliseconds per step, and GB of weights, gradients and state per GPU, at "
        f"{bandwidth / 1e12:g} TB/s of memory, {latency * 1e6:g} µs per hop and {network / 1e9:g} GB/s of network"
    )
    return [
        ("Bytes of state per weight", state_table()),
        ("Bytes read and written per weight and step", moved_table()),
        ("What the processes sum per step and mesh dimension", collective_table()),
        (made, time_table(bandwidth, latency, network)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table, as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes/s that a GPU copies (default: H200)")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds per hop of an all-reduce")
    parser.add_argument("--network", type=float, default=5e10, help="bytes/s per GPU between nodes")
    options = parser.parse_args(arguments)
    for caption, table in tables(options.bandwidth, options.latency, options.network):
        print(f"**{caption}**\n\n{table}\n")


if __name__ == "__main__":
    main()
