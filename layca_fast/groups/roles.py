"""What a tensor is by the modules that hold it: a layer, or why it is none."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..formulas.options import check_chunks

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

_RNN_SUFFIX = re.compile(r"_l\d+(_reverse)?$")
_BIAS = re.compile(r"(^|_)bias$|^bias_")

#: Module types that the caller wants to rotate; None: packed as in WEIGHTS, else one layer per tensor.
Asked = Mapping[type[nn.Module], int | str | None]

#: (chunks, "") of a tensor that rotates, else (None, reason).
Role = tuple[int | str | None, str]


def asked_types(rotate: Any) -> Asked:
    """The argument ``rotate`` as a mapping; raises TypeError or ValueError for what it cannot be."""
    if isinstance(rotate, (bool, str, type)) or not isinstance(rotate, Iterable):
        raise TypeError(
            f"rotate={rotate!r}: must be a list of module types, or a dict from module type to chunks; layer_groups "
            "itself decides which tensors of other types rotate"
        )
    asked = dict(rotate) if isinstance(rotate, Mapping) else dict.fromkeys(rotate)
    for kind, chunks in asked.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"rotate: {kind!r} is no module type: pass classes such as torch.nn.Linear")
        if issubclass(kind, NORMS):
            raise ValueError(f"rotate: {kind.__name__} is a norm layer, which never rotates: leave it out of rotate")
        if isinstance(rotate, Mapping):
            check_chunks(chunks)
    return asked


def _role(module: nn.Module, leaf: str, param: Tensor, asked: Asked) -> Role:
    """The role of a parameter in one module, which registers it as ``leaf``."""
    if isinstance(module, NORMS):
        return None, "norm layer"
    if _BIAS.search(leaf):
        return None, "bias"
    if param.numel() == 0:
        return None, "empty"
    if param.dim() < 2:
        return None, "vector" if param.dim() == 1 else "scalar"
    if isinstance(module, ParametrizationList):
        wanted = [chunks for kind, chunks in asked.items() if issubclass(kind, ParametrizationList)]
        return (wanted[0] or 1, "") if wanted else (None, "parametrized")
    stem = _RNN_SUFFIX.sub("", leaf) if isinstance(module, nn.RNNBase) else leaf
    packed = next((weights for kind, weights in WEIGHTS.items() if isinstance(module, kind)), {})
    for kind, chunks in asked.items():
        if isinstance(module, kind):
            return packed.get(stem, 1) if chunks is None else chunks, ""
    if isinstance(module, EMBEDDINGS):
        return None, "embedding"
    if stem in packed:
        return packed[stem], ""
    return None, f"unknown {'parameter of' if packed else 'module type'} {type(module).__name__}"


def decide(owners: Sequence[tuple[nn.Module, str]], param: Tensor, asked: Asked) -> Role:
    """The role of a tensor in all the modules that hold it: an embedding anywhere is one, else a layer anywhere is."""
    roles = [_role(module, leaf, param, asked) for module, leaf in owners]
    decisive = [role for role in roles if role[1] == "embedding"] or [role for role in roles if role[0] is not None]
    return (decisive or roles)[0]
