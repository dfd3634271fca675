"""layer_groups: which tensors of a model rotate, decided by module type, and the paper's layer-wise rates."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Size, Tensor, nn

from ..formulas.bases import scaled_rate
from ..formulas.chunks import Chunks
from ..formulas.options import check_choice, check_lr, misspelt
from ..formulas.plain import plain, with_plain
from ..messages import warn_caller
from .entries import Entry, decide_on_head, set_aside_vectors, trainable_entries
from .left_out import doubt
from .others import check_others_base, split_options
from .plan import LayerGroups, Row
from .roles import EMBEDDINGS, asked_types
from .zeros import check_zeros, rotating_later, set_aside_zeros

OTHERS = ("train", "freeze")

#: Keys of a group that only ``layer_groups`` may set.
RESERVED = ("params", "param_names", "chunks", "chunk_names", "lr_factor")


def _check_alpha(alpha: Any) -> None:
    if not isinstance(alpha, Real):
        raise TypeError(f"alpha={alpha!r}: must be a number between -1 and 1")
    if not -1.0 < float(alpha) < 1.0:
        raise ValueError(
            f"alpha={alpha!r}: must lie strictly between -1 (the first layers turn fastest) and 1 (the last do); "
            "0 gives every layer the same rate"
        )


def lr_factors(layers: int, alpha: float) -> list[float]:
    """The paper's layer-wise rates as multiples of lr, for ``layers`` tensors in forward order (arXiv 1806.01603).

    Tensor l of L gets (1 + alpha)^(5 l/(L-1)) for alpha <= 0, so that the first turn fastest, and
    (1 - alpha)^(5 (L-1-l)/(L-1)) for alpha > 0, so that the last do. A single one gets 1. Raises TypeError or
    ValueError outside of -1 < alpha < 1.
    """
    _check_alpha(alpha)
    base, span = 1.0 - abs(float(alpha)), max(layers - 1, 1)
    factors = [base ** (5 * distance / span) for distance in range(layers)]
    return factors if alpha <= 0 else factors[::-1]


def _training(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of the plan says of the group that its tensor is in."""
    lr = group.get("lr")
    if isinstance(lr, Tensor):
        # To read it from a device would wait for that.
        lr = float(lr) if lr.device.type == "cpu" else None
    rule = group.get("rule", "layca") if group["rotate"] else None
    return {"base": group.get("base"), "rule": rule, "lr": lr}


def _rotating_groups(
    entries: Sequence[Entry], factors: Sequence[float], lr: float | Tensor | None, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, Chunks | None, tuple[str, ...], Any], dict[str, Any]] = {}
    # Nothing decays on a sphere: another optimizer's own default must not step in.
    shared = {**options, "weight_decay": 0.0} if "weight_decay" in options else options
    for entry, factor in zip(entries, factors, strict=True):
        key = factor, entry.chunks, entry.parts, entry.joins_at
        if key not in groups:
            rate = {} if lr is None else {"lr": scaled_rate(lr, factor)}
            ours = {"params": [], "rotate": True, "chunks": entry.chunks, "lr_factor": factor}
            names = {"chunk_names": entry.parts} if entry.parts else {}
            groups[key] = {**ours, **names, **rate, **shared, **rotating_later(entry.joins_at, shared)}
        groups[key]["params"].append((entry.name, entry.param))
    return list(groups.values())


def _check_complete(groups: Iterable[Mapping[str, Any]], trainable: Mapping[Tensor, str]) -> None:
    """Raise ValueError, naming them, for trainable parameters that are not in exactly one group."""
    placed = Counter(param for group in groups for _, param in group["params"])
    wrong = [name for param, name in trainable.items() if placed[param] != 1]
    if wrong:
        raise ValueError(
            f"trainable parameters {wrong} land in no group: model.named_parameters() and what the model's modules "
            "register do not agree on them. Register each in a module and have named_parameters() yield it, or call "
            "requires_grad_(False) on it"
        )


def _freeze(entries: Iterable[Entry], zeros: Sequence[Entry]) -> None:
    if zeros:
        warnings.warn(
            "others='freeze' freezes weights that are all zero, or have a layer of zeros: "
            f"{[entry.name for entry in zeros]} will never train. Initialize them, or use others='train'",
            stacklevel=3,
        )
    for entry in entries:
        entry.param.requires_grad_(False)
        entry.param.grad = None
        entry.reason += ", frozen"


def _check_arguments(
    model: Any,
    lr: Any,
    alpha: Any,
    others: Any,
    others_lr: Any,
    others_base: Any,
    embeddings: Any,
    head: Any,
    names: Any,
    zeros: Any,
    joins_at: Any,
    options: Mapping[str, Any],
) -> None:
    """Raise TypeError or ValueError for what ``layer_groups`` cannot take."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: it must be a torch.nn.Module, whose module types decide")
    _check_alpha(alpha)
    check_choice({"others": others}, "others", OTHERS)
    check_choice({"embeddings": embeddings}, "embeddings", (False, True))
    check_choice({"head": head}, "head", (None, False, True))
    check_choice({"names": names}, "names", (False, True))
    check_zeros(zeros, joins_at)
    for name, rate in (("lr", lr), ("others_lr", others_lr)):
        if rate is not None:
            check_lr(rate, name)
    if others == "freeze" and others_lr is not None:
        raise ValueError(
            f"others_lr={others_lr!r}: others='freeze' trains no others; leave others_lr out, or use others='train'"
        )
    for name in RESERVED:
        if name in options:
            raise TypeError(f"{name}={options[name]!r}: layer_groups sets it itself; leave it out")
    check_others_base(others_base, others)
    options_here = ("alpha", "others", "others_lr", "others_base", "embeddings", "head", "names", "zeros")
    message = misspelt(options, options_here)
    if message is not None:
        raise TypeError(message)
    if options.get("base") == "rmsprop" and alpha != 0:
        raise ValueError(
            f"alpha={alpha!r} with base='rmsprop': here alpha sets layer-wise rates, and RMSprop has its own. "
            "Give base, and its alpha, to the optimizer: FusedLayca(layer_groups(...), base='rmsprop', alpha=...)"
        )


def layer_groups(
    model: nn.Module,
    lr: float | Tensor | None = None,
    alpha: float = 0.0,
    others: str = "train",
    others_lr: float | Tensor | None = None,
    others_base: str | None = None,
    embeddings: bool = False,
    head: bool | None = None,
    rotate: Iterable[type[nn.Module] | nn.Module] | Mapping[Any, Any] = (),
    names: bool = True,
    zeros: str = "others",
    joins_at: float | Callable[[Size], float] | None = None,
    **options: Any,
) -> LayerGroups:
    """Param groups in which the weights of the model's layers rotate, and nothing else; ``print`` shows the plan.

    Rotating: the weights of Linear, Bilinear, Conv1d to 3d and ConvTranspose1d to 3d; MultiheadAttention's packed
    ``in_proj_weight`` as 3 layers; the weights of RNN, LSTM, GRU and their cells as one layer per gate; those of
    transformers' Conv1D, stored as (in, out); stacks of experts, each expert a layer. A Linear that packs query, key
    and value, gate and up, or the like, is cut into these where what is around it tells their sizes, which need not be
    equal (``chunks``, with ``chunk_names``); else it is one layer, and the plan says so, as is a packed Conv1D, whose
    parts are columns (see ``rotate``).

    The others: biases, norm layers, embeddings, positional tables, tokens, routers of experts, LoRA's B, the head over
    a vocabulary (see ``head``), vectors (at most one dimension longer than 1: a Linear with one output has one),
    parametrized weights (weight_norm and the like, unless asked for), weights of which a layer is all zero (see
    ``zeros``), and whatever modules of unknown types hold (see ``rotate``). Parameters with requires_grad=False are
    left out. A tied tensor counts once, under its first name; it rotates if any module that shares it makes it rotate,
    but one that is an embedding anywhere is an embedding.

    Zeros are looked for now: call it before trained weights are loaded, as for the run that is resumed. Warns where
    nothing rotates, and where unknown types hold more than a tenth of the weights that could.

    Args:
        model: any module, wrapped (DDP, torch.compile) or not. Names are those of ``model.named_parameters()``.
        lr: the rotation rate. None leaves it to the optimizer: its own lr, or the paper's recommendation. What moves
            the best one, and what does not: docs/learning_rate.md.
        alpha: layer-wise rates, -1 < alpha < 1: see :func:`lr_factors`. Positions count rotating tensors in the order
            in which the modules are defined, a packed tensor as one. Each rotating group holds its ``lr_factor``; with
            ``lr=None``, FusedLayca multiplies its lr by it, and any other optimizer ignores it: give those an lr.
            Schedulers that multiply keep the ratios; those that set rates (OneCycleLR) need a list with one per group.
        others: "train" them by the plain base step, or "freeze" them, as the official code does: **modifies the model**
            (requires_grad=False, grad=None), so call it before DDP wraps the model. They stay in a group with lr=0.
            Weights of zeros are frozen, too, with a warning, since they never train then.
        others_lr: the lr of the others; None: ``lr``, or under ``others_base`` what the optimizer says for that base.
            Only for others="train".
        others_base: the base of the others, such as "adam" beside base="muon"; None: that of ``options``. The last
            Linear of a model without a vocabulary is then one of the others, too. Options go to the base that has
            them; those that both have, to ``base``.
        embeddings: whether Embedding and EmbeddingBag weights rotate, each as one layer, and with them a tied head.
        head: whether what makes the logits rotates. None: not if they are over a vocabulary, tied to an embedding or
            not; the last Linear of a model without one does, as a layer, but under ``others_base``. False: neither
            does. True: both do, a tied head with its embedding. ``rotate``, which may name the head, has the last word.
            Over a vocabulary: the model's ``get_output_embeddings()``; else a matrix of the shape of an embedding's
            table (of no positions or types), if it is the only one or the last matrix of the model; else the last
            matrix, if it is a Linear's with as many outputs as an embedding has entries.
        rotate: module types, or modules of the model with all inside of them, of which every tensor that is no vector,
            biases apart, rotates besides; as a dict, with the ``chunks`` of each (as FusedLayca takes them), or False
            for what is not to rotate, such as a head without normalisation. Also for the types above.
        names: whether the groups name their parameters, for messages. Then torch's own optimizers take no group without
            names later, as callbacks add them that unfreeze layers (FusedLayca does): pass False for those.
        zeros: what becomes of weights of which a layer is all zero, and of LoRA's B: "others", or "rotate-later": they
            take plain base steps at their group's lr, without decay, until the norm of the layer has reached
            ``joins_at``, and rotate from then on, at that norm. With alpha they count among those that rotate.
        joins_at: for zeros="rotate-later", the norm from which on such a layer rotates: a number > 0, or a function of
            its shape, a ``torch.Size`` of (rows, all else).
        options: put into every group (base, momentum, radius, ...); ``weight_decay`` into that of the others, and 0
            into those that rotate.

    Returns:
        A list of dicts that any torch optimizer takes (torch >= 2.6). Rotating tensors with the
        same factor and chunks share a group; the others come last.

    Raises:
        TypeError, ValueError: for arguments out of range, lazy parameters that are not initialized, no trainable
            parameter at all, and trainable parameters that would land in no group; before anything is modified.
    """
    lr, alpha, others_lr, joins_at = plain(lr), plain(alpha), plain(others_lr), plain(joins_at)
    options = with_plain(options)
    _check_arguments(
        *(model, lr, alpha, others, others_lr, others_base, embeddings, head, names, zeros, joins_at), options
    )
    ours, theirs = split_options(options, others_base)
    asked = asked_types(rotate)
    if embeddings:
        asked = {**asked, **{kind: 1 for kind in EMBEDDINGS if kind not in asked}}

    trainable, entries = trainable_entries(model, asked)
    decide_on_head(entries, model, asked, head, last=head is not None or others_base is not None)
    set_aside_vectors(entries)
    set_aside = set_aside_zeros(entries, joins_at)
    rotating = [entry for entry in entries if entry.chunks is not None]
    rest = [entry for entry in entries if entry.chunks is None]
    factors = lr_factors(len(rotating), alpha)
    groups = _rotating_groups(rotating, factors, lr, ours)
    if rest:
        rate = 0.0 if others == "freeze" else lr if others_lr is None and others_base is None else others_lr
        own = {} if rate is None else {"lr": rate}
        groups.append({"params": [(entry.name, entry.param) for entry in rest], "rotate": False, **own, **theirs})
    _check_complete(groups, trainable)
    left_out = sum(not param.requires_grad for param in model.parameters())

    turning = sum(entry.param.numel() for entry in rotating)
    message = doubt(model, turning, [(entry.unknown, entry.param) for entry in rest if entry.unknown is not None])
    if message is not None:
        # Where warnings are errors, nothing is frozen yet.
        warn_caller(message)
    if others == "freeze":
        _freeze(rest, set_aside)
    factor_of = dict(zip((entry.param for entry in rotating), factors, strict=True))
    group_of = {param: group for group in groups for _, param in group["params"]}
    rows = [
        Row(
            *(entry.name, tuple(entry.param.shape), entry.layers, factor_of.get(entry.param), entry.reason),
            **_training(group_of[entry.param]),
            joins_at=entry.joins_from,
        )
        for entry in entries
    ]
    if not names:
        for group in groups:
            group["params"] = [param for _, param in group["params"]]
    return LayerGroups(groups, rows, left_out)
