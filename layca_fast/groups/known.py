"""What is known of the modules of other packages, none of which need be there: one line for each fact.

A fact names what a module has around it (its own name, those of its neighbours, sizes that they tell) where that is
enough, and module types, by module and name, only where it is not. What packs several layers must add up, else it is
one layer, and the plan says so.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..formulas.chunks import COLUMNS, MATRICES, Chunks
from .place import Place

#: Module types that keep their weights as (in, out).
TRANSPOSED = {("transformers.pytorch_utils", "Conv1D"), ("transformers.modeling_utils", "Conv1D")}

#: Types of norm layers, routers, and stacks of experts, by their names.
NORM = re.compile(r"Norm([1-3]d)?(Gated)?$")
ROUTER = re.compile(r"(Router|Gating)$|(?i:moe)\w*Gate$")
EXPERTS = re.compile(r"Experts?$")

#: Parameters that modules of all kinds hold themselves, by their names, and why they do not rotate.
RAW: Sequence[tuple[re.Pattern[str], str]] = (
    (re.compile(r"(^|_)(pos|position|positions|positional)(_|$)|pos_?emb|(^|_)rel_pos"), "positional table"),
    (re.compile(r"tokens?$"), "token"),
    (re.compile(r"(^|_)embed(ding)?s?$"), "embedding by its name"),
    (re.compile(r"^A_log$"), "decay rates of a state space"),
)

#: Names of modules that start at zero in order to grow, and what they are.
GROWING: Mapping[str, str] = {
    "lora_B": "LoRA's B, which starts at zero",
    "lora_embedding_A": "LoRA's A of an embedding, which starts at zero",
}

#: Projections whose parts lie interleaved, head by head: in which modules, by the start of their types' own, and names.
INTERLEAVED: Sequence[tuple[str, re.Pattern[str]]] = (
    ("", re.compile(r"^(query_key_value|kv_b_proj|in_proj_qkvz|in_proj_ba)$")),
    ("transformers.models.codegen.", re.compile(r"^qkv_proj$")),
    ("transformers.models.deberta.", re.compile(r"^in_proj$")),
    ("transformers.models.gpt_bigcode.", re.compile(r"^c_attn$")),
    ("transformers.models.minimax.", re.compile(r"^qkv_proj$")),
    ("timm.models.efficientformer", re.compile(r"^qkv$")),
    ("timm.models.levit", re.compile(r"^qkv$")),
    ("timm.models.tiny_vit", re.compile(r"^qkv$")),
)

#: What the plan says of those, and where a name speaks of parts whose sizes nothing tells.
BY_HEAD = "its parts lie interleaved, so as one layer"
PACKED, PERHAPS = "packed, but of which sizes is unknown, so as one layer", "may be packed, so as one layer"

#: How many outputs go to each part of a packed projection with so many in all and so many inputs; None: unknown.
Sizes = Callable[[Place, int, int], tuple[int, ...] | None]


class Fact(NamedTuple):
    """Packed projections: what their modules are called, their parts, and their sizes.

    ``unsized``: what the plan says where nothing tells the sizes; "": then it is an ordinary layer.
    """

    names: re.Pattern[str]
    parts: tuple[str, ...]
    sizes: Sizes
    unsized: str = PACKED


def _inputs_of(module: nn.Module | None) -> int | None:
    """How many inputs a Linear, of whatever package, has."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    transposed = is_transposed(type(module))
    return int(weight.shape[0 if transposed else 1])


def is_transposed(kind: type) -> bool:
    """Whether modules of this type keep their weights as (in, out)."""
    return any((each.__module__, each.__qualname__) in TRANSPOSED for each in kind.__mro__)


#: What takes the outputs of an attention, and so says how many the queries are.
_OUT = ("o_proj", "out_proj", "c_proj", "proj", "projection", "Wo", "to_out", "dense")


def _told(place: Place, *names: str) -> int | None:
    """A number that the module above, or its config, has under one of these names."""
    module = None if place.above is None else place.above.module
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None


def _attention(place: Place, outputs: int, inputs: int) -> tuple[int, ...] | None:
    """Query, key and value, one after the other; keys and values may have fewer heads than queries."""
    beside = place.beside()
    told = next((size for size in (_inputs_of(beside.get(name)) for name in _OUT) if size is not None), inputs)
    if outputs == 3 * told:
        return (told,) * 3
    heads = _told(place, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
    width = _told(place, "head_dim", "head_size")
    if heads is not None and width is not None and outputs == told + 2 * heads * width:
        return told, heads * width, heads * width
    return None


def _half_of_what(*takers: str) -> Sizes:
    """Two halves, of which their product, or one of them, goes on to the Linear of this name."""

    def sizes(place: Place, outputs: int, inputs: int) -> tuple[int, ...] | None:
        taken = [_inputs_of(place.beside().get(name)) for name in takers]
        return (outputs // 2,) * 2 if any(size is not None and outputs == 2 * size for size in taken) else None

    return sizes


def _key_and_value(place: Place, outputs: int, inputs: int) -> tuple[int, ...] | None:
    """Two halves, where the query beside them, or what takes the attention's outputs, is as wide as each."""
    queries = [getattr(place.beside().get(name), "weight", None) for name in ("q", "q_proj", "q_attn", "to_q", "query")]
    widths = [weight.shape[1 if is_transposed(type(place.module)) else 0] for weight in queries if weight is not None]
    return (outputs // 2,) * 2 if any(outputs == 2 * width for width in widths) else None


def _as_told(*names: str) -> Sizes:
    """Sizes that the module above has under these names."""

    def sizes(place: Place, outputs: int, inputs: int) -> tuple[int, ...] | None:
        told = tuple(_told(place, name) or 0 for name in names)
        return told if 0 not in told and sum(told) == outputs else None

    return sizes


QKV, KV, GLU = ("query", "key", "value"), ("key", "value"), ("gate", "up")

#: Linear layers that pack several; the first fact that gives sizes holds.
FACTS: Sequence[Fact] = (
    Fact(re.compile(r"^(c_attn|kv|kv_proj|to_kv)$"), KV, _key_and_value, PERHAPS),
    Fact(re.compile(r"^(c_attn|Wqkv|(to_)?qkv(_proj|_linear)?)$"), QKV, _attention),
    Fact(re.compile(r"^in_proj_qkv$"), QKV, _as_told("key_dim", "key_dim", "value_dim")),
    Fact(re.compile(r"^kv_a_proj_with_mqa$"), ("latent", "rotary"), _as_told("kv_lora_rank", "qk_rope_head_dim")),
    Fact(re.compile(r"^gate_up_proj$"), GLU, _half_of_what("down_proj")),
    Fact(re.compile(r"^w12$"), GLU, _half_of_what("w3")),
    Fact(re.compile(r"^(Wi|fc1|weights_in)$"), GLU, _half_of_what("Wo", "fc2", "weights_out"), ""),
    Fact(re.compile(r"^in_proj$"), ("hidden", "gate"), _half_of_what("out_proj"), PERHAPS),
)

#: Stacks of experts, (experts, out, in): parameters or modules that hold gate and up, and those that take half as many.
GATE_UP, DOWN = ("gate_up_proj", "input_linear"), ("down_proj", "output_linear")


class Packing(NamedTuple):
    """The layers that a tensor packs: ``chunks``, the names of the parts, and a word for the plan."""

    chunks: Chunks
    parts: tuple[str, ...] = ()
    reason: str = ""


def _described(parts: Sequence[str], sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return ", ".join(parts)
    return ", ".join(f"{part} ({size})" for part, size in zip(parts, sizes, strict=True))


def packing_of(place: Place, weight: Tensor) -> Packing | None:
    """What a weight (out, in), or (in, out) of a transposed type, packs; None where nothing says that it does."""
    # Sharding makes types of its own of those that it wraps.
    around = () if place.above is None else type(place.above.module).__mro__
    homes = {"", *(kind.__module__ for kind in around)}
    if any(names.search(place.name) and any(each.startswith(start) for each in homes) for start, names in INTERLEAVED):
        return Packing(1, reason=BY_HEAD)
    facts = [fact for fact in FACTS if fact.names.search(place.name)]
    if weight.dim() == 2:
        transposed = is_transposed(type(place.module))
        outputs, inputs = (int(size) for size in (reversed(weight.shape) if transposed else weight.shape))
        for fact in facts:
            sizes = fact.sizes(place, outputs, inputs)
            if sizes is not None and all(sizes):
                split = len(sizes) if len(set(sizes)) == 1 else sizes
                chunks: Chunks = (COLUMNS, split) if transposed else split
                return Packing(chunks, fact.parts, _described(fact.parts, sizes))
    return next((Packing(1, reason=fact.unsized) for fact in reversed(facts) if fact.unsized), None)


def _experts_in(module: nn.Module) -> int | None:
    """How many experts a module holds, as a list or as stacks of weights."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module)
    stacks = [param for param in module.parameters(recurse=False) if param.dim() == 3]
    told = getattr(module, "num_experts", None)
    return int(stacks[0].shape[0]) if stacks else told if isinstance(told, int) else None


def is_router(place: Place, weight: Tensor) -> bool:
    """Whether a weight is in a router, which says how much of each expert there is.

    By the type of its module or of the one above, or as a neighbour of as many experts as it has outputs.
    """
    inner = [each for each in (place, place.above) if each is not None and each.above is not None]
    if any(ROUTER.search(type(each.module).__name__) for each in inner):
        return True
    beside = place.beside()
    experts = [each for name, each in beside.items() if name == "experts" or EXPERTS.search(type(each).__name__)]
    return weight.dim() == 2 and any(_experts_in(each) == weight.shape[0] for each in experts)


def growing(place: Place, leaf: str) -> str | None:
    """What a tensor is that starts at zero in order to grow, or None: an adapter's."""
    names = (leaf, place.name, "" if place.above is None else place.above.name)
    return next((GROWING[name] for name in names if name in GROWING), None)


def raw(leaf: str) -> str | None:
    """Why a parameter that its module holds itself does not rotate, as far as its name says it."""
    return next((reason for names, reason in RAW if names.search(leaf)), None)


def stack_of(place: Place, leaf: str, weight: Tensor) -> Packing | None:
    """A parameter (experts, out, in) of a module that holds experts, each a layer, gate and up apart; else None."""
    module = place.module
    told = getattr(module, "num_experts", None)
    if weight.dim() < 3 or 1 in weight.shape[-2:]:
        return None
    if not EXPERTS.search(type(module).__name__) and weight.shape[0] != told:
        return None
    experts = weight.shape[:-2].numel()
    each: Chunks = experts if weight.dim() == 3 else MATRICES
    if leaf not in GATE_UP and place.name not in GATE_UP:
        return Packing(each, reason="experts")
    beside = place.beside()
    downs = [getattr(module, name, getattr(beside.get(name), "weight", None)) for name in DOWN]
    shapes = [down.shape[-2:] for down in downs if isinstance(down, Tensor) and down.dim() == weight.dim()]
    halves = any(tuple(weight.shape[-2:]) == (2 * inner, outer) for outer, inner in shapes)
    if halves and getattr(module, "is_concatenated", True):
        return Packing((MATRICES, 2), GLU, f"gate and up of {experts} experts")
    return Packing(each, reason="experts, gate and up as one" if leaf in GATE_UP else "experts")
