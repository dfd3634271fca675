"""A RotationMonitor of models in which some tensors are no layers, or cannot be measured: what it says can be done."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from layca_fast import RotationMonitor


class WithOdd(nn.Module):
    """A layer, and beside it a tensor that cannot be measured."""

    def __init__(self, odd: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.odd = nn.Parameter(odd)


UNREADABLE: dict[str, Callable[[], Tensor]] = {
    "complex": lambda: torch.randn(3, 3, dtype=torch.cfloat),
    "8 bits": lambda: torch.randn(3, 3).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("source", [lambda model: model, lambda model: torch.optim.SGD(model.named_parameters(), 0.1)])
@pytest.mark.parametrize("odd", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_one_tensor_does_not_refuse_the_model(odd: Any, source: Any, seed: int) -> None:
    made = source(WithOdd(odd()))
    with pytest.warns(UserWarning, match=r"1 of 2 layers out.*layers=\['layer\.weight'\].*parameter 'odd'") as said:
        monitor = RotationMonitor(made)
    assert monitor.names == ["layer.weight"]
    # The way out that the warning names.
    names = re.search(r"layers=(\[.*?\])", str(said[0].message))
    assert names is not None
    assert RotationMonitor(made, layers=re.findall(r"'(.*?)'", names[1])).names == ["layer.weight"]


@pytest.mark.parametrize("odd", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_one_that_is_named_is_refused(odd: Any, seed: int) -> None:
    with pytest.raises(TypeError, match="parameter 'odd'"):
        RotationMonitor(WithOdd(odd()), layers=["odd"])


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


NO_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "an embedding": lambda: nn.Embedding(4, 3),
    "a norm layer": lambda: nn.LayerNorm((4, 3)),
    "vectors": lambda: nn.LayerNorm(3),
}


@pytest.mark.parametrize("make", NO_LAYERS.values(), ids=NO_LAYERS.keys())
def test_a_model_without_layers_can_be_watched_as_the_message_says(make: Any, seed: int) -> None:
    model = make()
    with pytest.raises(ValueError, match="name those to watch") as raised:
        RotationMonitor(model)
    names = re.search(r"layers=(\[.*\])", str(raised.value))
    assert names is not None
    chosen = re.findall(r"'(.*?)'", names[1])
    monitor = RotationMonitor(model, layers=chosen)
    assert monitor.names == chosen
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with monitor.attach(optimizer):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    # A bias of zeros has no angle.
    assert float(monitor.curves.rotation[-1].nan_to_num().max()) > 0


def test_weight_norm_by_hooks_is_watched(seed: int) -> None:
    assert "weight_v" in RotationMonitor(old_weight_norm(nn.Linear(4, 3))).names
