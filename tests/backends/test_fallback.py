"""The torch backend, where a faster one was to be expected, is not taken in silence."""

import warnings

import pytest
import torch

from layca_fast import FusedLayca, backends
from layca_fast.backends import _tell_of_fallback, load

from ..support import parameter


@pytest.fixture
def nothing_native(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "cuda", "triton"):
        monkeypatch.setattr(type(load(name)), "missing", lambda self: "g++ was not found")
    _tell_of_fallback.cache_clear()


def stepped(**options: str) -> FusedLayca:
    weight = parameter(3, 4)
    optimizer = FusedLayca([weight], 0.1, **options)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    return optimizer


def test_the_first_step_says_why_and_no_other_does(nothing_native: None, seed: int) -> None:
    with pytest.warns(UserWarning, match=r"the torch backend .* than cpu would: cpu: g\+\+ was not found\.") as caught:
        stepped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped()
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert backends()["cpu"].reason == "g++ was not found"


def test_who_asks_for_torch_and_what_runs_natively_is_not_warned(nothing_native: None, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stepped(backend="torch")


def test_a_device_that_only_torch_serves_is_no_reason_to_warn(nothing_native: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tell_of_fallback(torch.device("mps"))
