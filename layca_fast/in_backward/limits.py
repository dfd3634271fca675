"""What stepping inside of backward cannot work with."""

import gc
from collections.abc import Mapping
from typing import Any

from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel


def check_not_replicated(params: Mapping[Tensor, Any]) -> None:
    """Raise RuntimeError if a DistributedDataParallel reduces the gradient of one of ``params``.

    Its reducer runs after the hooks of a parameter, so every rank would step by the gradient of its own data. Nothing
    on a parameter says so; the modules that do are looked for among all objects, which takes about 0.1 s.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    for module in gc.get_objects():
        if not issubclass(type(module), DistributedDataParallel):
            continue
        if any(param in params for param in module.module.parameters()):
            raise RuntimeError(
                "step_in_backward() cannot work under DistributedDataParallel: it averages gradients after they are "
                "handed to the hooks, so the replicas would diverge, and it keeps memory for all of them in its "
                "buckets. Use FSDP2 (torch.distributed.fsdp.fully_shard), or remove() the handle and take ordinary "
                "steps"
            )
