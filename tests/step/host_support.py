"""An optimizer of many tensors, and what torch runs in a step: for the tests of what the host does."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from layca_fast import FusedLayca

from ..support import parameter, random_gradients, train

BASES = ({"momentum": 0.9}, {"base": "adam"}, {"base": "rmsprop", "centered": True})
every_base = pytest.mark.parametrize("options", BASES, ids=str)


def many(options: dict[str, Any], backend: str = "cpu") -> FusedLayca:
    """An optimizer of 60 tensors in two groups, past its first steps."""
    params = [parameter(*shape, backend=backend) for shape in ((9, 8), (30,), (4, 3, 3)) * 20]
    groups = [{"params": params[:30]}, {"params": params[30:], "lr": 0.02}]
    optimizer = FusedLayca(groups, 0.01, backend=backend, **options)
    train(optimizer, random_gradients(params, 3))
    return optimizer


class Recorder(TorchDispatchMode):
    """The names of all operations that torch runs, but for those that only tell a mode, as this is, of writes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # torch's own step reports itself to the profiler.
        announces = func.name() == "aten::copy_" and args[0] is args[1]
        if func.namespace != "profiler" and not announces:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))
