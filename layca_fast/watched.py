"""Which tensors a RotationMonitor watches, under which names, and how they are spread over processes."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import check_memory, check_parameter, count_layers, named
from .groups import trainable_entries
from .plan import rotates
from .roles import EMBEDDINGS


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Who never imported these has none, and need not wait for the import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@dataclass(frozen=True)
class Watched:
    """One parameter, which holds ``layers`` layers as equal slices of its first dimension."""

    name: str
    param: Tensor
    layers: int

    def local(self) -> Tensor:
        """What this process has of the weights: a plain tensor that shares their memory."""
        param: Any = self.param.detach()
        tensor: Tensor = param.to_local() if is_dtensor(param) else param
        return tensor

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the parameter, where that tensor cannot be read."""
        tensor = self.local()
        check_parameter(tensor, f"parameter {self.name!r}")
        check_memory(tensor, f"parameter {self.name!r}")

    @property
    def layer_names(self) -> list[str]:
        """One name per layer: the parameter's, with an index where it holds several."""
        return [self.name] if self.layers == 1 else [f"{self.name}[{index}]" for index in range(self.layers)]

    def _sharding_dims(self) -> list[int]:
        param: Any = self.param
        return [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]

    @property
    def shard_groups(self) -> list[Any]:
        """The process groups over which the dots of its shards add up, one per mesh dimension that shards it."""
        param: Any = self.param
        return [param.device_mesh.get_group(dim) for dim in self._sharding_dims()] if is_dtensor(param) else []

    @property
    def shard(self) -> tuple[int, ...]:
        """Which of its shards this process has: the same for all that have the same; () where it is whole."""
        param: Any = self.param
        if not is_dtensor(param):
            return ()
        coordinate = param.device_mesh.get_coordinate()
        return tuple(coordinate[dim] for dim in self._sharding_dims())


def _check_placements(name: str, param: Any) -> None:
    """Raise ValueError for a DTensor whose elements are sums over processes, of which none has a weight."""
    if any(placement.is_partial() for placement in param.placements):
        raise ValueError(
            f"parameter {name!r} has placements {tuple(param.placements)}: partial sums are no weights; redistribute "
            "it to Shard or Replicate"
        )


def _is_split_along_layers(param: Any) -> bool:
    return is_dtensor(param) and any(getattr(placement, "dim", None) == 0 for placement in param.placements)


def _watched(name: str, param: Tensor, chunks: int | str) -> Watched:
    if is_dtensor(param):
        _check_placements(name, param)
    # A shard of the first dimension holds parts of layers that nothing marks.
    layers = 1 if _is_split_along_layers(param) else count_layers(param, chunks, f"parameter {name!r}")
    watched = Watched(name, param, layers)
    watched.check()
    return watched


def _of_model(model: nn.Module) -> list[tuple[str, Tensor, int | str | None]]:
    """Every trainable parameter with its chunks: None where it is no layer."""
    # Also types that layer_groups does not know: nothing depends here on what such a tensor is.
    asked = {type(module): None for module in model.modules() if not isinstance(module, EMBEDDINGS)}
    _, entries = trainable_entries(model, asked)
    return [(entry.name, entry.param, entry.chunks) for entry in entries]


def _of_optimizer(optimizer: Optimizer) -> list[tuple[str, Tensor, int | str | None]]:
    """Every parameter with its chunks: None where it does not rotate, or would not under FusedLayca's default."""
    return [
        (name, param, group.get("chunks", 1) if rotates(param, {"rotate": group.get("rotate")}) else None)
        for group, name, param in named(optimizer.param_groups)
    ]


def _chosen(
    found: Sequence[tuple[str, Tensor, int | str | None]], layers: Sequence[str]
) -> list[tuple[str, Tensor, int | str]]:
    for pattern in layers:
        if not any(fnmatchcase(name, pattern) for name, _, _ in found):
            raise ValueError(
                f"layers: {pattern!r} is the name of no parameter here; shell wildcards are allowed, and there are "
                f"{[name for name, _, _ in found]}"
            )
    names = {name for name, _, _ in found if any(fnmatchcase(name, pattern) for pattern in layers)}
    return [(name, param, 1 if chunks is None else chunks) for name, param, chunks in found if name in names]


def _named(model: nn.Module) -> list[tuple[str, Tensor, int | str | None]]:
    """Every floating-point parameter, trainable or not; chunks as in :func:`_of_model`."""
    chunks = {}
    if any(param.requires_grad for param in model.parameters()):
        chunks = {name: chunks for name, _, chunks in _of_model(model)}
    return [(name, p, chunks.get(name)) for name, p in model.named_parameters() if p.is_floating_point()]


def watched_layers(source: nn.Module | Optimizer, layers: Iterable[str] | None) -> list[Watched]:
    """What to watch of a model or an optimizer: see :class:`layca_fast.RotationMonitor`, also for what it raises."""
    if isinstance(layers, str) or not (layers is None or isinstance(layers, Iterable)):
        raise TypeError(f"layers={layers!r}: must be a list of names of parameters, or None for those that rotate")
    if isinstance(source, nn.Module):
        found = _of_model(source) if layers is None else _named(source)
    elif isinstance(source, Optimizer):
        found = _of_optimizer(source)
    else:
        raise TypeError(
            f"model_or_optimizer is a {type(source).__name__}: it must be a torch.nn.Module or a torch.optim.Optimizer"
        )
    if layers is None:
        chosen = [(name, param, chunks) for name, param, chunks in found if chunks is not None]
    else:
        chosen = _chosen(found, list(layers))
    if not chosen:
        raise ValueError(
            f"model_or_optimizer: no parameter of this {type(source).__name__} has two or more dimensions; name those "
            "to watch: layers=['...']"
        )
    return [_watched(name, param, chunks) for name, param, chunks in chosen]


class Reduction:
    """Adds up the dots of layers whose shards lie on several processes, in one collective per mesh dimension."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        members: dict[tuple[int, ...], tuple[list[Any], list[int]]] = {}
        row = 0
        for each in watched:
            groups = each.shard_groups
            if groups:
                # Processes agree on the order, as they do on that of the parameters.
                _, rows = members.setdefault(tuple(map(id, groups)), (groups, []))
                rows.extend(range(row, row + each.layers))
            row += each.layers
        self._members = [(groups, torch.tensor(rows, dtype=torch.int64)) for groups, rows in members.values()]

    def run(self, table: Tensor) -> None:
        """Add up the rows of ``table``, (layers, columns) float64, in place."""
        for number, (groups, rows) in enumerate(self._members):
            rows = rows.to(table.device, non_blocking=True)
            self._members[number] = groups, rows
            part = table.index_select(0, rows)
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
            table.index_copy_(0, rows, part)
