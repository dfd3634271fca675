"""Tiny models, and what the benchmarks make of them."""

import torch

from bench.measure import measure
from bench.providers import Provider, providers
from bench.rows import Row
from bench.shapes import Shape

CPU = torch.device("cpu")
TINY: list[Shape] = [(30, 40), (40,), (8, 3, 3, 3), (1, 1, 16)]

#: Compiling takes seconds to minutes, and ``make bench`` does it.
COMPILED = ("torch.compile", "heavyball")


def eager(base: str) -> list[Provider]:
    return [each for each in providers(base, CPU) if not any(name in each.name for name in COMPILED)]


def tiny_rows(base: str, model: str = "tiny", rounds: int = 3) -> list[Row]:
    return measure(base, model, TINY, rounds, CPU, only=eager(base), tell=lambda _: None)


def named(base: str, name: str) -> Provider:
    return next(each for each in providers(base, CPU) if each.name == name)
