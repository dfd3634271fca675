"""What a tensor is by the modules that hold it: a layer, or why it is none."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..formulas.chunks import COLUMNS, Chunks, as_tuples, check_chunks, parts_of
from ..state.layout import is_vector
from .known import NORM, QKV, growing, is_router, is_transposed, packing_of, raw, stack_of
from .place import Place

#: Which weights of a module type rotate, and how many layers each packs along its first dimension. RNN weights go
#: without the suffix that counts layers and directions.
WEIGHTS: Mapping[type[nn.Module], Mapping[str, int]] = {
    nn.Linear: {"weight": 1},
    nn.Bilinear: {"weight": 1},
    nn.Conv1d: {"weight": 1},
    nn.Conv2d: {"weight": 1},
    nn.Conv3d: {"weight": 1},
    nn.ConvTranspose1d: {"weight": 1},
    nn.ConvTranspose2d: {"weight": 1},
    nn.ConvTranspose3d: {"weight": 1},
    nn.MultiheadAttention: {"in_proj_weight": 3, "q_proj_weight": 1, "k_proj_weight": 1, "v_proj_weight": 1},
    nn.RNN: {"weight_ih": 1, "weight_hh": 1},
    nn.GRU: {"weight_ih": 3, "weight_hh": 3},
    nn.LSTM: {"weight_ih": 4, "weight_hh": 4, "weight_hr": 1},
    nn.RNNCell: {"weight_ih": 1, "weight_hh": 1},
    nn.GRUCell: {"weight_ih": 3, "weight_hh": 3},
    nn.LSTMCell: {"weight_ih": 4, "weight_hh": 4},
}

#: What the parts of those are called.
PARTS: Mapping[type[nn.Module], Mapping[int, tuple[str, ...]]] = {
    nn.MultiheadAttention: {3: QKV},
    nn.GRU: {3: ("reset", "update", "new")},
    nn.GRUCell: {3: ("reset", "update", "new")},
    nn.LSTM: {4: ("input", "forget", "cell", "output")},
    nn.LSTMCell: {4: ("input", "forget", "cell", "output")},
}

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

_RNN_SUFFIX = re.compile(r"_l\d+(_reverse)?$")
_BIAS = re.compile(r"(^|_)bias$|^bias_")

#: Modules and module types that the caller decides on; False: they do not rotate; None: packed as in WEIGHTS, else one
#: layer per tensor.
Asked = Mapping[Any, Chunks | None]


class Role(NamedTuple):
    """``chunks`` of a tensor that rotates, with a word on it or ""; else None, with the reason.

    ``unknown``: the module type that is to blame where nobody has said whether the tensor is a layer. ``parts``: the
    names of what ``chunks`` cuts, where they have some. ``grows``: whether it is known to start at zero.
    """

    chunks: Chunks | None
    reason: str = ""
    unknown: type[nn.Module] | None = None
    parts: tuple[str, ...] = ()
    grows: bool = False


def _check_not_cut(kind: type, chunks: Any) -> None:
    if is_transposed(kind) and chunks not in (1, False) and parts_of(chunks)[0] != COLUMNS:
        raise ValueError(
            f"rotate: chunks={chunks!r} would cut the weights of {kind.__name__} along their inputs, as they are "
            "stored as (in, out): cut their outputs, ('columns', n), or leave the number out, and each weight rotates "
            "as one layer"
        )


def asked_types(rotate: Any) -> Asked:
    """The argument ``rotate`` as a mapping; raises TypeError or ValueError for what it cannot be."""
    if isinstance(rotate, (bool, str, type)) or not isinstance(rotate, Iterable):
        raise TypeError(
            f"rotate={rotate!r}: must be a list of module types or modules, or a dict from those to chunks or False; "
            "layer_groups itself decides which tensors of other modules rotate"
        )
    given = dict(rotate) if isinstance(rotate, Mapping) else dict.fromkeys(rotate)
    asked: dict[type[nn.Module] | nn.Module, Chunks | None] = {}
    for key, chunks in given.items():
        kind = key if isinstance(key, type) else type(key)
        if not issubclass(kind, nn.Module):
            raise TypeError(f"rotate: {key!r} is no module type and no module: pass classes such as torch.nn.Linear")
        if isinstance(rotate, Mapping) and chunks is not False:
            check_chunks(chunks)
            chunks = as_tuples(chunks)
        if issubclass(kind, NORMS) and chunks is not False:
            raise ValueError(f"rotate: {kind.__name__} is a norm layer, which never rotates: leave it out of rotate")
        if chunks is not None:
            _check_not_cut(kind, chunks)
        # A module stands for all inside of it, but for those that are named themselves.
        inside = key.modules() if isinstance(key, nn.Module) else ()
        asked.update({each: chunks for each in inside if each is not key and each not in given})
        asked[key] = chunks
    return asked


def asked_of(module: nn.Module, asked: Asked) -> tuple[bool, Chunks | None]:
    """Whether the caller has decided on this module, by itself or by its type, and how."""
    if module in asked:
        return True, asked[module]
    kinds = (kind for kind in asked if isinstance(kind, type) and isinstance(module, kind))
    found = next(kinds, None)
    return found is not None, None if found is None else asked[found]


def _vector(module: nn.Module, param: Tensor) -> Role:
    if NORM.search(type(module).__name__):
        return Role(None, "norm layer")
    return Role(None, "scalar" if param.dim() == 0 else "vector")


def _layer(place: Place, stem: str, param: Tensor, packed: Mapping[str, int]) -> Role:
    """The role of what rotates, cut into as many layers as the module packs in it."""
    packing = packing_of(place, param) if stem == "weight" else None
    if packing is not None:
        if parts_of(packing.chunks)[0] == COLUMNS:
            # No kernel walks columns, and the torch backend took 27 times the processor time of one layer (Adam, 768 x
            # 2304): who wants them asks for them.
            return Role(1, f"{packing.reason} as one layer, for they are columns")
        return Role(packing.chunks, packing.reason, parts=packing.parts)
    if is_transposed(type(place.module)):
        return Role(1, "stored as (in, out)")
    chunks = packed.get(stem, 1)
    names = next((parts.get(chunks, ()) for kind, parts in PARTS.items() if isinstance(place.module, kind)), ())
    return Role(chunks, ", ".join(names), parts=names)


def _as_asked(place: Place, stem: str, param: Tensor, chunks: Chunks) -> Role:
    """The role of what the caller has cut, with the names of its parts where it packs just these."""
    packing = packing_of(place, param) if stem == "weight" else None
    if packing is not None and packing.chunks == chunks:
        return Role(chunks, packing.reason, parts=packing.parts)
    return Role(chunks, "stored as (in, out)" if is_transposed(type(place.module)) else "")


def _role(place: Place, leaf: str, param: Tensor, asked: Asked) -> Role:
    """The role of a parameter in one module, which registers it as ``leaf``."""
    module, kind = place.module, type(place.module)
    if isinstance(module, NORMS):
        return Role(None, "norm layer")
    if _BIAS.search(leaf):
        return Role(None, "bias")
    if param.numel() == 0:
        return Role(None, "empty")
    if param.dim() < 2:
        return _vector(module, param)
    if isinstance(module, ParametrizationList):
        is_asked, chunks = asked_of(module, asked)
        return Role(chunks or 1) if is_asked and chunks is not False else Role(None, "parametrized")
    stem = _RNN_SUFFIX.sub("", leaf) if isinstance(module, nn.RNNBase) else leaf
    packed = next((weights for known, weights in WEIGHTS.items() if isinstance(module, known)), {})
    is_asked, chunks = asked_of(module, asked)
    if chunks is False:
        return Role(None, "as rotate says")
    if is_asked:
        stack = stack_of(place, leaf, param) if chunks is None else None
        if stack is not None:
            return Role(stack.chunks, stack.reason, parts=stack.parts)
        if chunks is not None:
            return _as_asked(place, stem, param, chunks)
        return _layer(place, stem, param, packed)
    if isinstance(module, EMBEDDINGS):
        return Role(None, "embedding")
    if is_router(place, param):
        return Role(None, "router")
    reason = growing(place, leaf)
    if reason is not None:
        return Role(None, reason, grows=True)
    if stem in packed or is_transposed(kind):
        return _layer(place, stem, param, packed)
    stack = stack_of(place, leaf, param)
    if stack is not None:
        return Role(stack.chunks, stack.reason, parts=stack.parts)
    reason = raw(leaf)
    if reason is not None:
        return Role(None, reason)
    if is_vector(param):
        return _vector(module, param)
    return Role(None, f"unknown {'parameter of' if packed else 'module type'} {kind.__name__}", kind)


def decide(owners: Sequence[tuple[Place, str]], param: Tensor, asked: Asked) -> Role:
    """The role of a tensor in all the modules that hold it: an embedding anywhere is one, else a layer anywhere is.

    But where the caller has said of any of them that it does not rotate, it does not.
    """
    roles = [_role(place, leaf, param, asked) for place, leaf in owners]
    kept_out = [role for role in roles if role.reason == "as rotate says"]
    embeddings = [role for role in roles if role.reason == "embedding"]
    return (kept_out or embeddings or [role for role in roles if role.chunks is not None] or roles)[0]
