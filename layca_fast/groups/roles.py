"""What a tensor is by the modules that hold it: a layer, or why it is none."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..formulas.chunks import COLUMNS, Chunks, as_tuples, check_chunks, parts_of

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

#: Module types that keep their weights as (in, out), by module and name: the packages need not be there.
TRANSPOSED = {("transformers.pytorch_utils", "Conv1D"), ("transformers.modeling_utils", "Conv1D")}

_RNN_SUFFIX = re.compile(r"_l\d+(_reverse)?$")
_BIAS = re.compile(r"(^|_)bias$|^bias_")

#: Modules and module types that the caller decides on; False: they do not rotate; None: packed as in WEIGHTS, else one
#: layer per tensor.
Asked = Mapping[Any, Chunks | None]


class Role(NamedTuple):
    """``chunks`` of a tensor that rotates, with a word on it or ""; else None, with the reason.

    ``unknown``: the module type that is to blame where nobody has said whether the tensor is a layer.
    """

    chunks: Chunks | None
    reason: str = ""
    unknown: type[nn.Module] | None = None


def is_transposed(kind: type) -> bool:
    """Whether modules of this type keep their weights as (in, out)."""
    return any((each.__module__, each.__qualname__) in TRANSPOSED for each in kind.__mro__)


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


def _role(module: nn.Module, leaf: str, param: Tensor, asked: Asked) -> Role:
    """The role of a parameter in one module, which registers it as ``leaf``."""
    if isinstance(module, NORMS):
        return Role(None, "norm layer")
    if _BIAS.search(leaf):
        return Role(None, "bias")
    if param.numel() == 0:
        return Role(None, "empty")
    if param.dim() < 2:
        return Role(None, "vector" if param.dim() == 1 else "scalar")
    if isinstance(module, ParametrizationList):
        is_asked, chunks = asked_of(module, asked)
        return Role(chunks or 1) if is_asked and chunks is not False else Role(None, "parametrized")
    stem = _RNN_SUFFIX.sub("", leaf) if isinstance(module, nn.RNNBase) else leaf
    packed = next((weights for kind, weights in WEIGHTS.items() if isinstance(module, kind)), {})
    is_asked, chunks = asked_of(module, asked)
    if chunks is False:
        return Role(None, "as rotate says")
    if is_transposed(type(module)):
        if is_asked and chunks not in (None, 1):
            return Role(chunks, "stored as (in, out)")
        return Role(1, "stored as (in, out), so as one layer")
    if is_asked:
        return Role(packed.get(stem, 1) if chunks is None else chunks)
    if isinstance(module, EMBEDDINGS):
        return Role(None, "embedding")
    if stem in packed:
        return Role(packed[stem])
    kind = type(module)
    return Role(None, f"unknown {'parameter of' if packed else 'module type'} {kind.__name__}", kind)


def decide(owners: Sequence[tuple[nn.Module, str]], param: Tensor, asked: Asked) -> Role:
    """The role of a tensor in all the modules that hold it: an embedding anywhere is one, else a layer anywhere is.

    But where the caller has said of any of them that it does not rotate, it does not.
    """
    roles = [_role(module, leaf, param, asked) for module, leaf in owners]
    kept_out = [role for role in roles if role.reason == "as rotate says"]
    embeddings = [role for role in roles if role.reason == "embedding"]
    return (kept_out or embeddings or [role for role in roles if role.chunks is not None] or roles)[0]
