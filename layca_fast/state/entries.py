"""What an optimizer's state holds for the tensors that need none: nothing, as in torch; only checkpoints say so.

torch.distributed.checkpoint loads strictly by default: a trainable parameter without an entry, beside others that have
one (a radius), is an error to it. An empty entry in the state itself would be lost by some of its paths, and taken for
a state that was made by whoever tests for emptiness.
"""

from collections.abc import MutableMapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..messages import labelled


def with_all_entries(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """The state_dict ``saved`` with an empty entry for every trainable parameter without state, if any has state."""
    state: dict[Any, Any] = saved["state"]
    keys = chain.from_iterable(group["params"] for group in saved["param_groups"])
    owners = [param for _, _, param in labelled(optimizer.param_groups)]
    lacking: dict[Any, Any] = {
        key: {} for key, param in zip(keys, owners, strict=False) if param.requires_grad and key not in state
    }
    return {**saved, "state": {**state, **lacking}} if state and lacking else saved


def drop_empty(state: MutableMapping[Tensor, Any]) -> None:
    """Take the entries that say nothing out of an optimizer's state, in place."""
    for param in [param for param, entry in state.items() if isinstance(entry, dict) and not entry]:
        del state[param]
