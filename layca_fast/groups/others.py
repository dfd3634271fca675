"""Two bases for one model: which options are whose, and the head, which goes with the others."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..formulas.options import find_base
from ..state.layout import is_vector
from .roles import EMBEDDINGS

#: Options of a group that say how a tensor rotates.
OF_ROTATION = ("rule", "radius", "joins_at")


#: Names of embeddings that no logits are over: of positions, segments and the like.
_NO_VOCABULARY = re.compile(r"pos|wpe|type|segment", re.I)


def _matrix(param: Tensor) -> bool:
    return param.dim() == 2 and not is_vector(param)


def head_of(model: nn.Module, any_last: bool = False) -> Tensor | None:
    """The weight that makes the logits over a vocabulary, or None if nothing looks like it.

    What the model itself calls its output embeddings (``get_output_embeddings()``, as transformers have it); else a
    matrix, of whatever module that is no embedding, of the shape of an embedding's table, if it is the only one or the
    model's last matrix in the order of definition; else that last one, if it is a Linear's with as many outputs as an
    embedding has entries. ``any_last``: else the last Linear of all. Embeddings of positions and types do not count.
    """
    for module in model.modules():
        own = getattr(module, "get_output_embeddings", None)
        head = own() if callable(own) else None
        if isinstance(getattr(head, "weight", None), Tensor):
            return head.weight  # type: ignore[no-any-return, union-attr]
    named = dict(model.named_modules())
    embeddings = {name: module for name, module in named.items() if isinstance(module, EMBEDDINGS)}
    tables = [module.weight for name, module in embeddings.items() if not _NO_VOCABULARY.search(name)]
    others = (module for name, module in named.items() if name not in embeddings)
    matrices = [param for module in others for param in nn.Module.parameters(module, recurse=False) if _matrix(param)]
    linears = [module.weight for module in named.values() if isinstance(module, nn.Linear)]
    if tables and matrices:
        last = matrices[-1]
        alike = [matrix for matrix in matrices if any(matrix.shape == table.shape for table in tables)]
        if alike and (len(alike) == 1 or alike[-1] is last):
            return alike[-1]
        if any(last is each for each in linears) and any(last.shape[0] == table.shape[0] for table in tables):
            return last
    return linears[-1] if any_last and linears else None


def split_options(options: Mapping[str, Any], others_base: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """``options`` for the groups that rotate, and for the others, which have a base of their own.

    What only the others' base has is theirs, what only the rotating base has is not. What both have, such as eps,
    is the rotating base's: the others keep their default. Raises ValueError where a base directs matrices only and
    nothing says what trains the rest.
    """
    base = find_base(options.get("base", "sgd"))
    if others_base is None:
        if "base" in options and base.formula({**base.options, **options}).direct is not None:
            raise ValueError(
                f"base={base.name!r} directs whole matrices, and the others are none: name their base, "
                "others_base='adam'"
            )
        return dict(options), dict(options)
    theirs = find_base(others_base)
    ours = {name: value for name, value in options.items() if name not in theirs.options or name in base.options}
    for_all = {name: value for name, value in options.items() if name not in base.options and name not in OF_ROTATION}
    return ours, {**for_all, "base": others_base}


def check_others_base(others_base: Any, others: str) -> None:
    """Raise ValueError for a base of the others that there is none of, or that cannot train them."""
    if others_base is None:
        return
    base = find_base(others_base)
    if base.formula(base.options).direct is not None:
        raise ValueError(f"others_base={others_base!r} directs whole matrices, and the others are none: use 'adam'")
    if others == "freeze":
        raise ValueError(f"others_base={others_base!r}: others='freeze' trains no others; leave it out")
