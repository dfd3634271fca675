"""What a RotationMonitor keeps of weights, so that later ones can be compared with them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..state.layout import scalar_device
from .pairs import Pairs, home_of
from .projection import Projection, largest_prime
from .watched import Watched

#: Values of the argument ``keep``.
KEEPS = ("device", "cpu", "bfloat16", "sketch")


def _layout(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    return [(each.data_ptr(), each.shape, each.stride(), each.dtype, each.device) for each in tensors]


class _Locals:
    """What this process has of the weights, checked again whenever their memory is another."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self._watched = watched
        self._shapes = [each.param.shape for each in watched]
        self._checked: list[tuple[object, ...]] = []

    def take(self) -> list[Tensor]:
        for each, shape in zip(self._watched, self._shapes, strict=True):
            if each.param.shape != shape:
                raise ValueError(
                    f"parameter {each.name!r} has shape {tuple(each.param.shape)}, and had {tuple(shape)} when the "
                    "monitor was made: weights of other shapes have no angle; record where it is whole, or make "
                    "another monitor"
                )
        tensors = [each.local() for each in self._watched]
        layout = _layout(tensors)
        if layout != self._checked:
            for each in self._watched:
                each.check()
            self._checked = layout
        return tensors


class View(Protocol):
    """The form in which weights are compared: as they are, or projected."""

    def take(self) -> tuple[list[Tensor], Tensor | None]:
        """The present weights, and their squared norms, (layers,) float64, where the dots do not give them."""

    def memory(self, tensor: Tensor) -> Tensor:
        """Memory to keep a copy of one of the tensors of :meth:`take` in."""


class Whole:
    """The weights as they are, of which copies are kept as ``keep`` says."""

    def __init__(self, watched: Sequence[Watched], keep: str) -> None:
        self._locals = _Locals(watched)
        self._keep = keep

    def take(self) -> tuple[list[Tensor], Tensor | None]:
        return self._locals.take(), None

    def memory(self, tensor: Tensor) -> Tensor:
        # In the same order of dimensions, so that both are walked as one run of memory.
        if self._keep == "cpu" and tensor.device.type != "cpu":
            return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        short = self._keep == "bfloat16" and tensor.element_size() > 2
        return torch.empty_like(tensor, dtype=torch.bfloat16 if short else tensor.dtype)


class Sketched:
    """A projection of each layer onto at most ``size`` numbers: see projection.py."""

    def __init__(self, watched: Sequence[Watched], size: int, seed: int) -> None:
        self._watched = watched
        self._locals = _Locals(watched)
        self._projection = Projection(largest_prime(size), seed)
        self._sketches = [self._new_sketch(each, each.local()) for each in watched]

    def _new_sketch(self, each: Watched, weight: Tensor) -> Tensor:
        length = self._projection.length(weight, each.layers)
        return torch.empty(each.layers, length, dtype=torch.float32, device=scalar_device(weight.device))

    def take(self) -> tuple[list[Tensor], Tensor | None]:
        squares = []
        weights = self._locals.take()
        home = home_of(weights)
        for index, (each, weight) in enumerate(zip(self._watched, weights, strict=True)):
            if self._sketches[index].device != scalar_device(weight.device):
                self._sketches[index] = self._new_sketch(each, weight)
            found = self._projection.run(weight, each.layer_names, each.shard, self._sketches[index])
            squares.append(found.to(home, non_blocking=True))
        return self._sketches, torch.cat(squares)

    def memory(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor)


class Reference:
    """Copies of the weights at one time, compared with the weights of later times."""

    def __init__(self, view: View, layers: Sequence[int], backend: str) -> None:
        self._view = view
        self._layers = layers
        self._backend = backend
        self.kept: list[Tensor] = []
        #: How the weights lay when memory was taken for copies of them, and when they were last compared.
        self._copied: list[tuple[object, ...]] = []
        self._made_for: list[tuple[object, ...]] = []
        self._pairs: Pairs | None = None
        #: Squared norms of the layers when they were copied, summed over shards, (layers,) float64.
        self.squares = torch.zeros(0, dtype=torch.float64, device="cpu")

    def set(self, weights: Sequence[Tensor]) -> None:
        """Copy the weights, into the memory of the last copies where there are any."""
        layout = _layout(weights)
        if not self.kept or layout != self._copied:
            self.kept = [self._view.memory(weight) for weight in weights]
            self._copied, self._pairs = layout, None
        for kept, weight in zip(self.kept, weights, strict=True):
            kept.copy_(weight, non_blocking=True)

    def dots(self, weights: Sequence[Tensor]) -> Tensor:
        """<w,w>, <w,v> and <v,v> of each layer, w the weights and v the copies: (layers, 3) float64."""
        layout = _layout(weights)
        if self._pairs is None or layout != self._made_for:
            if self._made_for:
                self._refit(weights)
            self._pairs = Pairs(weights, self.kept, self._layers, self._backend)
            self._made_for = layout
        return self._pairs.measure()

    def _refit(self, weights: Sequence[Tensor]) -> None:
        """Bring the copies to where the weights are now, in their order of dimensions; what they hold stays."""
        self.wait()
        for index, (kept, weight) in enumerate(zip(self.kept, weights, strict=True)):
            fresh = self._view.memory(weight)
            if (fresh.device, fresh.stride()) != (kept.device, kept.stride()):
                self.kept[index] = fresh.to(kept.dtype).copy_(kept)

    def restore(self, saved: Sequence[Tensor], squares: Tensor) -> None:
        """Take over copies that were saved, and their squared norms."""
        self.wait()
        for index, (kept, tensor) in enumerate(zip(self.kept, saved, strict=True)):
            if kept.dtype != tensor.dtype:
                # The weights were cast since they were copied.
                self.kept[index], self._pairs = torch.empty_like(kept, dtype=tensor.dtype), None
            self.kept[index].copy_(tensor)
        self.squares = squares.to(self.squares.device, torch.float64, copy=True)

    def wait(self) -> None:
        """Wait for copies to and from host memory that are under way: the host may then touch it."""
        for device in {layout[-1] for layout in self._made_for if getattr(layout[-1], "type", "") == "cuda"}:
            torch.cuda.synchronize(device)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        # Tables of addresses, and the backend's module: neither is worth a copy, or can have one.
        return {**self.__dict__, "_pairs": None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.kept)
