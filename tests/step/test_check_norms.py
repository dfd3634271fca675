"""The guard: a norm that is not that of its sphere is found by name, at the step that finds it or in the weights."""

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from layca_fast import FusedLayca, NormDriftError, RotationMonitor, attach
from layca_fast.commands.cases import BASE_OPTIONS

from ..support import every_backend, native_backends, parameter, random_gradients, shapes_for, train


def halve(tensor: Tensor) -> None:
    """What other code does to weights."""
    with torch.no_grad():
        tensor.mul_(0.5)


def several(backend: str = "torch", **options: Any) -> tuple[list[nn.Parameter], FusedLayca]:
    params = [parameter(5, 4, backend=backend), parameter(6, 4, backend=backend), parameter(7, backend=backend)]
    named = list(zip(("first", "packed", "bias"), params, strict=True))
    groups = [{"params": named[:1]}, {"params": named[1:2], "chunks": 3}, {"params": named[2:]}]
    return params, FusedLayca(groups, 0.1, backend=backend, **options)


@pytest.mark.parametrize("options", [{}, {"radius": "learned"}, {"radius": 2.5}], ids=str)
@every_backend
def test_a_norm_that_fell_by_half_is_found_at_the_step_that_finds_it(
    backend: str, options: dict[str, Any], seed: int
) -> None:
    params, optimizer = several(backend, momentum=0.9, **options)
    for _ in range(3):
        train(optimizer, random_gradients(params, 1))
        drifts = optimizer.check_norms(above=1e-5)
        assert [(name, len(drift)) for name, drift in drifts.items()] == [("first", 1), ("packed", 3)]
        assert optimizer.check_norms(at="now").worst()[1] == pytest.approx(0.0, abs=1e-6)
    halve(params[1][2:4])
    now = optimizer.check_norms(at="now")
    assert now.worst() == ("packed[1]", pytest.approx(-0.5, abs=1e-6))
    with pytest.raises(NormDriftError, match=r"^1 of 4 layers.*as the weights are now: packed\[1\] -0\.5 as norm"):
        now.raise_if(above=1e-3)
    # The last step found nothing yet.
    optimizer.check_norms(above=1e-3)
    train(optimizer, random_gradients(params, 1))
    with pytest.raises(NormDriftError, match=r"^1 of 4 layers.*as the last step found them: packed\[1\] -0\.5 as norm"):
        optimizer.check_norms(above=1e-3)
    assert list(optimizer.check_norms().above(1e-3)) == ["packed[1]"]
    assert "packed[1]  -5.0e-01" in str(optimizer.check_norms()).splitlines()[1]
    # And has put it back.
    optimizer.check_norms(above=1e-3, at="now")
    train(optimizer, random_gradients(params, 1))
    optimizer.check_norms(above=1e-5)


@pytest.mark.parametrize("options", BASE_OPTIONS, ids=str)
@native_backends
def test_no_step_of_any_base_is_taken_for_a_drift(backend: str, options: dict[str, Any], seed: int) -> None:
    params = [parameter(*shape, backend=backend) for shape in shapes_for(options, ((20, 30), (9, 5)))]
    optimizer = FusedLayca(params, 0.05, backend=backend, **options)
    for row in random_gradients(params, 4):
        train(optimizer, [row])
        optimizer.check_norms(above=1e-5)
        optimizer.check_norms(above=1e-5, at="now")


@native_backends
def test_weights_and_state_of_two_checkpoints_are_found_before_and_at_the_first_step(backend: str, seed: int) -> None:
    params, optimizer = several(backend)
    train(optimizer, random_gradients(params, 2))
    others, resumed = several(backend)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"no step was taken yet.*at='now'"):
        resumed.check_norms()
    with pytest.raises(NormDriftError, match="as the weights are now"):
        resumed.check_norms(above=1e-3, at="now")
    train(resumed, random_gradients(others, 1))
    with pytest.raises(NormDriftError, match="as the last step found them"):
        resumed.check_norms(above=1e-3)
    with torch.no_grad():
        for ours, theirs in zip(others, params, strict=True):
            ours.copy_(theirs)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.check_norms(above=1e-5, at="now")


@native_backends
def test_what_has_nothing_to_compare_with_is_nan(backend: str, seed: int) -> None:
    """radius="current", a layer that waits, one without a radius yet, and one that has just reached a given radius."""
    params = [parameter(4, 3, backend=backend) for _ in range(4)]
    groups = [
        {"params": [("current", params[0])], "radius": "current"},
        {"params": [("waits", params[1])], "joins_at": 1e6},
        {"params": [("given", params[2])], "radius": 9.0},
        {"params": [("usual", params[3])]},
    ]
    optimizer = FusedLayca(groups, 0.0, backend=backend)

    def compared(at: str = "step") -> set[str]:
        return {name for name, drift in optimizer.check_norms(at=at).items() if not bool(drift.isnan().all())}

    train(optimizer, random_gradients(params, 1))
    assert compared() == compared("now") == set()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(optimizer, random_gradients(params, 1))
    assert compared() == {"usual"}
    assert compared("now") == {"usual", "given"}
    train(optimizer, random_gradients(params, 1))
    assert compared() == compared("now") == {"usual", "given"}
    optimizer.check_norms(above=1e-5)
    halve(params[2])
    train(optimizer, random_gradients(params, 1))
    assert list(optimizer.check_norms().above(1e-3)) == ["given"]


@native_backends
def test_steps_without_gradients_and_skipped_steps_say_nothing(backend: str, seed: int) -> None:
    params, optimizer = several(backend, unscale_in_step=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    train(optimizer, random_gradients(params, 1))
    train(optimizer, [[None, None, None]])
    optimizer.check_norms(above=1e-5)
    optimizer.found_inf.fill_(1.0)
    train(optimizer, random_gradients(params, 1))
    optimizer.check_norms(above=1e-5)


@pytest.mark.parametrize(("value", "drift"), [(0.0, -1.0), (math.nan, math.inf), (math.inf, math.inf)])
@native_backends
def test_weights_that_were_set_to_zero_or_are_not_finite_are_drifts(
    backend: str, value: float, drift: float, seed: int
) -> None:
    params, optimizer = several(backend)
    train(optimizer, random_gradients(params, 1))
    params[0].data.fill_(value)
    assert optimizer.check_norms(at="now").worst() == ("first", drift)
    train(optimizer, random_gradients(params, 1))
    assert optimizer.check_norms().worst() == ("first", drift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@native_backends
def test_sixteen_bits_count_with_their_remainder(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Rounded to their type, norms of layers this small would be off by far more."""
    param = parameter(3, 4, backend=backend, dtype=dtype)
    optimizer = FusedLayca([("weight", param)], 0.05, backend=backend)
    for row in random_gradients([param], 3):
        train(optimizer, [row])
        optimizer.check_norms(above=1e-5)
        optimizer.check_norms(above=1e-5, at="now")
    halve(param)
    assert optimizer.check_norms(at="now").worst() == ("weight", pytest.approx(-0.5, abs=1e-2))


@pytest.mark.parametrize("lies", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("chunks", [1, 3])
def test_norms_of_now_are_right_however_weights_lie(chunks: int, lies: torch.memory_format, seed: int) -> None:
    param = nn.Parameter(torch.randn(6, 5, 3, 2).to(memory_format=lies))
    optimizer = FusedLayca([("weight", param)], 0.1, chunks=chunks, backend="torch")
    train(optimizer, random_gradients([param], 1))
    param.data[4:].mul_(2)
    drift = optimizer.check_norms(at="now")["weight"]
    radii = optimizer.state[param]["radius"]
    norms = torch.stack([part.detach().double().norm() for part in param.chunk(chunks)])
    torch.testing.assert_close(drift, norms / radii - 1, rtol=1e-9, atol=1e-12)


@native_backends
def test_nothing_is_read_before_somebody_asks(backend: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """To read a number is to wait for a GPU."""
    params, optimizer = several(backend)
    train(optimizer, random_gradients(params, 1))

    def waits(*args: Any) -> Any:
        raise AssertionError("this would wait for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
            patch.setattr(Tensor, name, waits)
        drifts = [optimizer.check_norms(at=at) for at in ("step", "now")]
    assert all(abs(each.worst()[1]) < 1e-6 for each in drifts)


@native_backends
def test_steps_in_backward_are_guarded(backend: str, seed: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = FusedLayca(model.named_parameters(), 0.1, backend=backend)
    optimizer.step_in_backward()
    for number in range(3):
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
        assert list(optimizer.check_norms().above(1e-3)) == (["2.weight"] if number == 2 else [])
        if number == 1:
            halve(model.get_parameter("2.weight"))


@native_backends
def test_an_attached_optimizer_is_guarded_by_its_handle(backend: str, seed: int) -> None:
    params = [parameter(5, 4, backend=backend), parameter(6, 3, backend=backend)]
    optimizer = SGD([("first", params[0]), ("second", params[1])], 0.1, momentum=0.9)
    handle = attach(optimizer, backend=backend)
    with pytest.raises(RuntimeError, match="no step was taken yet"):
        handle.check_norms()
    train(optimizer, random_gradients(params, 2))
    handle.check_norms(above=1e-5)
    halve(params[1])
    assert handle.check_norms(at="now").worst() == ("second", pytest.approx(-0.5, abs=1e-6))
    train(optimizer, random_gradients(params, 1))
    with pytest.raises(NormDriftError, match=r"1 of 2 layers.*second -0\.5"):
        handle.check_norms(above=1e-3)
    saved = copy.deepcopy(optimizer.state_dict())
    halve(params[0])
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="no step was taken yet"):
        handle.check_norms()
    assert handle.check_norms(at="now").worst()[0] == "first"
    handle.remove()
    with pytest.raises(RuntimeError, match="this handle was removed"):
        handle.check_norms()


@pytest.mark.parametrize("above", [-1.0, math.nan, "1e-3", True])
def test_a_limit_that_is_none_is_refused(above: Any, seed: int) -> None:
    params, optimizer = several()
    train(optimizer, random_gradients(params, 1))
    with pytest.raises(ValueError, match=r"above=.*must be a finite number >= 0"):
        optimizer.check_norms(above=above)
    with pytest.raises(ValueError, match="at='later' is unknown"):
        optimizer.check_norms(at="later")
    with pytest.raises(ValueError, match=r"check_norms=.*must be a finite number >= 0"):
        RotationMonitor(optimizer, check_norms=above)


@pytest.mark.parametrize("attached", [False, True], ids=["FusedLayca", "attached SGD"])
def test_a_monitor_raises_at_the_step_though_it_records_every_tenth(attached: bool, seed: int) -> None:
    params = [parameter(5, 4), parameter(6, 3)]
    named = [("first", params[0]), ("second", params[1])]
    optimizer: torch.optim.Optimizer = SGD(named, 0.1) if attached else FusedLayca(named, 0.1)
    if attached:
        attach(optimizer)
    with RotationMonitor(optimizer, every=10, check_norms=1e-3).attach(optimizer) as monitor:
        train(optimizer, random_gradients(params, 2))
        halve(params[0])
        with pytest.raises(NormDriftError, match=r"first -0\.5"):
            train(optimizer, random_gradients(params, 1))
        assert monitor.step == 3
        train(optimizer, random_gradients(params, 1))


def test_a_monitor_warns_once_for_each_layer(seed: int) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = FusedLayca(model.named_parameters(), 0.1)
    monitor = RotationMonitor(model, check_norms=1e-3, on_drift="warn")
    monitor.guard(optimizer, None)

    def step() -> list[str]:
        train(optimizer, random_gradients([*model.parameters()], 1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            monitor.record()
        assert all(warning.filename == __file__ for warning in caught)
        return [str(warning.message) for warning in caught]

    assert step() == []
    for name, told in (("0.weight", 1), ("0.weight", 0), ("2.weight", 1)):
        halve(model.get_parameter(name))
        messages = step()
        assert len(messages) == told
        assert all(f"{name} -0.5" in message for message in messages)
    copies = pickle.loads(pickle.dumps(monitor))
    with pytest.raises(TypeError, match="knows no optimizer"):
        copies.record()


def test_a_monitor_says_where_there_is_nothing_to_compare_with(seed: int) -> None:
    model = nn.Linear(4, 5)
    with pytest.raises(TypeError, match=r"check_norms=0\.001: this monitor knows no optimizer.*guard"):
        RotationMonitor(model, check_norms=1e-3).record()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="SGD rotates nothing"):
        RotationMonitor(optimizer, check_norms=1e-3).record()
    with pytest.raises(ValueError, match="on_drift='stop' is unknown"):
        RotationMonitor(model, on_drift="stop")
