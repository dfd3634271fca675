"""Which tensors a RotationMonitor watches, under which names, and how they are spread over processes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from ..compat import is_fake
from ..formulas.chunks import Chunks, as_tuples
from ..groups.entries import trainable_entries
from ..groups.roles import EMBEDDINGS
from ..messages import named, warn_caller
from ..state.checks import check_memory, check_parameter, cut_for
from ..state.cut import LayerNames
from ..state.members import rotates
from ..state.others import attached, option
from ..state.sharding import Piece, is_sharded, local_of, sharding_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


#: Of types whose tensors are layers only where they are asked for.
NO_LAYERS = (*EMBEDDINGS, ParametrizationList)


@dataclass(frozen=True)
class Watched:
    """One parameter, or of one that is cut into pieces the piece of a layer. ``layer_names`` has one per layer.

    ``groups``: the processes over which the dots of its shards add up, a group per dimension of the mesh.
    """

    name: str
    param: Tensor
    layer_names: tuple[str, ...]
    piece: Piece
    groups: "tuple[ProcessGroup, ...]"

    @property
    def layers(self) -> int:
        """How many it holds: rows of ``local().reshape(layers, -1)``."""
        return len(self.layer_names)

    def local(self) -> Tensor:
        """What this process has of the weights: a plain tensor that shares their memory."""
        return self.piece.of(local_of(self.param).detach())

    def check(self) -> None:
        """Raise TypeError or ValueError, naming the parameter, where that tensor cannot be read."""
        check_parameter(self.param, f"parameter {self.name!r}")
        check_memory(self.param, f"parameter {self.name!r}")

    @property
    def shard(self) -> tuple[int, ...]:
        """Which of its shards this process has: the same for all that have the same; () where it is whole."""
        if not is_sharded(self.param):
            return ()
        coordinate = self.param.device_mesh.get_coordinate()
        placements = enumerate(self.param.placements)
        return tuple(coordinate[dim] for dim, each in placements if not each.is_replicate()) if coordinate else ()


@dataclass(frozen=True)
class _Found:
    """A parameter that may be watched: ``chunks`` is None where it is no layer."""

    name: str
    param: Tensor
    chunks: Chunks | None
    chunk_names: Sequence[str] | None = None


def _watched(found: _Found) -> list[Watched]:
    name, param = found.name, found.param
    label = f"parameter {name!r}"
    check_parameter(param, label)
    if is_fake(param):
        raise TypeError(f"{label} is a FakeTensor, without numbers to measure: make the monitor outside of that mode")
    check_memory(param, label)
    cut = cut_for(
        param, {"chunks": 1 if found.chunks is None else found.chunks, "chunk_names": found.chunk_names}, label
    )
    names = tuple(f"{name}{suffix}" for suffix in LayerNames(cut, found.chunk_names).suffixes(cut.layers))
    sharding = sharding_of(param, cut, label, know_all=True)
    pieces = [(names[piece.first : piece.first + piece.layers], piece) for piece in sharding.pieces]
    return [Watched(name, param, some, piece, sharding.groups) for some, piece in pieces]


def _of_model(model: nn.Module) -> list[_Found]:
    """Every trainable parameter."""
    # Also types that layer_groups does not know: nothing depends here on what such a tensor is.
    asked = {type(module): None for module in model.modules() if not isinstance(module, NO_LAYERS)}
    _, entries = trainable_entries(model, asked)
    return [_Found(entry.name, entry.param, entry.chunks, entry.parts or None) for entry in entries]


def _is_layer(param: Tensor, rotate: Any) -> bool:
    # A matrix of one row is watched, too, though by default it does not rotate.
    return param.dim() >= 2 if rotate is None else rotates(param, {"rotate": rotate})


def _of_optimizer(optimizer: Optimizer) -> list[_Found]:
    """Every parameter: a layer where it rotates, or would under FusedLayca's default.

    Names that several groups have, as those of two models do, begin with the number of the group.
    """
    ours = attached(optimizer)
    numbers = {id(group): number for number, group in enumerate(optimizer.param_groups)}
    found = list(named(optimizer.param_groups))
    times = Counter(name for _, name, _ in found)
    return [
        _Found(
            name if times[name] == 1 else f"{numbers[id(group)]}.{name}",
            param,
            as_tuples(option(optimizer, group, "chunks", ours.get("chunks", 1)))
            if _is_layer(param, option(optimizer, group, "rotate", ours.get("rotate")))
            else None,
            option(optimizer, group, "chunk_names", None),
        )
        for group, name, param in found
    ]


def _chosen(found: Sequence[_Found], layers: Sequence[str]) -> list[_Found]:
    for pattern in layers:
        if not any(fnmatchcase(each.name, pattern) for each in found):
            raise ValueError(
                f"layers: {pattern!r} is the name of no parameter here; shell wildcards are allowed, and there are "
                f"{[each.name for each in found]}"
            )
    names = {each.name for each in found if any(fnmatchcase(each.name, pattern) for pattern in layers)}
    return [each for each in found if each.name in names]


def _named(model: nn.Module) -> list[_Found]:
    """Every floating-point parameter, trainable or not; chunks as in :func:`_of_model`."""
    trainable = any(param.requires_grad for param in model.parameters())
    known = {each.name: each for each in _of_model(model)} if trainable else {}
    return [
        known.get(name, _Found(name, p, None))
        for name, p in model.named_parameters()
        if p.is_floating_point() or p.is_complex()
    ]


def replaced(source: nn.Module | Optimizer, watched: Sequence[Watched]) -> list[str]:
    """Names of parameters that ``source`` has no longer: they stand still, as if training did nothing."""
    if isinstance(source, Optimizer):
        present = {id(param) for group in source.param_groups for param in group["params"]}
    else:
        present = {id(param) for param in source.parameters()}
    return list(dict.fromkeys(each.name for each in watched if id(each.param) not in present))


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
    chosen = [each for each in found if each.chunks is not None] if layers is None else _chosen(found, list(layers))
    if not chosen:
        raise ValueError(f"model_or_optimizer: {_why_none(source, found)}")
    if layers is None:
        chosen = _readable(chosen)
    return [each for one in chosen for each in _watched(one)]


def _why_none(source: nn.Module | Optimizer, found: Sequence[_Found]) -> str:
    """What to say, and to do, where nothing is a layer by itself."""
    kind = type(source).__name__
    matrices = [each.name for each in found if each.param.dim() >= 2]
    names = matrices or [each.name for each in found]
    start = f"no parameter of this {kind} has two or more dimensions"
    if matrices:
        start = f"no parameter of this {kind} is watched unless it is named: those of two or more dimensions are not "
        start += "layers by themselves, but parametrized, embeddings or of norm layers, or have rotate=False"
    return f"{start}; name those to watch: layers={names}" if names else f"{start}: give it a parameter that is trained"


def _readable(chosen: Sequence[_Found]) -> list[_Found]:
    """Those of a type that can be measured; warns of the rest. TypeError where there are none."""
    kept, errors = [], []
    for each in chosen:
        try:
            check_parameter(each.param, f"parameter {each.name!r}")
        except TypeError as error:
            errors.append(error)
        else:
            kept.append(each)
    if errors and not kept:
        raise errors[0]
    if errors:
        warn_caller(
            f"RotationMonitor leaves {len(errors)} of {len(chosen)} layers out, which it cannot measure; name those to "
            f"watch to silence this: layers={[each.name for each in kept]}. The first is: {errors[0]}"
        )
    return kept
