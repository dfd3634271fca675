"""Modes of torch that watch what is done to tensors, and what kernels that write by addresses must tell them."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ..compat import tracing_modes

_AS_IT_IS = nullcontext()


def check_modes() -> None:
    """Raise RuntimeError where a mode is on under which real tensors must not be written, or the trace would lack it.

    The torch backend is no way out: it reads numbers back, as torch's optimizers do not.
    """
    for mode in tracing_modes():
        raise RuntimeError(
            f"real tensors cannot be stepped inside of {type(mode).__name__}, which must not let them change or could "
            "not record it: take the step outside of it, or, to try one out, make model and optimizer inside of "
            "FakeTensorMode"
        )


def announce(tensors: Iterable[Tensor]) -> None:
    """Let every mode see that these are about to be written, by a copy of each to itself, which changes no bit."""
    for tensor in tensors:
        tensor.copy_(tensor)


def out_of_inference() -> AbstractContextManager[None]:
    """For making what is kept from step to step: what inference mode makes, no step outside of it may write to."""
    return _ordinary() if torch.is_inference_mode_enabled() else _AS_IT_IS


@contextmanager
def _ordinary() -> Iterator[None]:
    # To leave inference mode switches gradients on.
    with torch.inference_mode(False), torch.no_grad():
        yield
