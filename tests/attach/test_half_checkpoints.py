"""What is kept of attached optimizers of 16-bit parameters: checkpoints, copies, and the plain optimizer again."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from layca_fast import attach, detach

from ..support import clones, contents, copy_of, parameter, params_of, random_gradients, same_bits, train
from .support import ALL_OPTIMIZERS, every_half, every_optimizer, new_params, of_halves

BF16, F32 = torch.bfloat16, torch.float32


def through_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_half
@every_optimizer
def test_a_killed_run_resumes_bit_for_bit(name: str, dtype: torch.dtype, seed: int) -> None:
    """Nothing of the state is cast, though torch would make everything the parameter's type."""
    optimizer = ALL_OPTIMIZERS[name](new_params(name, dtype), lr=0.03)
    attach(optimizer, chunks="all")
    gradients = random_gradients(params_of(optimizer), 5)
    train(optimizer, gradients[:3])
    saved = through_file([optimizer.state_dict(), [param.detach() for param in params_of(optimizer)]])
    before = copy_of(saved)
    loaded = ALL_OPTIMIZERS[name](new_params(name, dtype), lr=0.5)
    attach(loaded, chunks="all")
    # In the middle of a run of its own, which the loaded state must end.
    train(loaded, gradients[:1])
    with torch.no_grad():
        for param, weight in zip(params_of(loaded), saved[1], strict=True):
            param.copy_(weight)
    loaded.load_state_dict(saved[0])
    # torch casts the states of what does not rotate, as that of the plain optimizer.
    turning = [i for i, param in enumerate(params_of(optimizer)) if param.dim() > 1]
    assert same_bits(*([contents(each)[i][2] for i in turning] for each in (loaded, optimizer)))
    assert same_bits(saved, before), "the caller's dict was modified"
    for each in (optimizer, loaded):
        train(each, gradients[3:])
    assert same_bits(*([contents(each)[i] for i in turning] for each in (loaded, optimizer)))


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"]
)
@every_optimizer
def test_a_copy_is_attached_and_goes_its_own_way(name: str, through: Any, seed: int) -> None:
    optimizer = ALL_OPTIMIZERS[name](new_params(name, BF16), lr=0.03)
    attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 4)
    train(optimizer, gradients[:2])
    other = through(optimizer)
    saved = contents(optimizer)
    train(other, gradients[2:])
    assert same_bits(contents(optimizer), saved), "the copy shares memory with its source"
    train(optimizer, gradients[2:])
    assert same_bits(contents(other), contents(optimizer))


@every_half
@every_optimizer
def test_detaching_gives_the_plain_optimizer_back(name: str, dtype: torch.dtype, seed: int) -> None:
    """With a state of its own types: its moments of 16-bit parameters are of 16 bits."""
    make = ALL_OPTIMIZERS[name]
    optimizer = make(new_params(name, dtype), lr=0.03)
    attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 4)
    train(optimizer, gradients[:2])
    detach(optimizer)
    plain = make(clones(params_of(optimizer)), lr=0.03)
    train(plain, gradients[:2])
    with torch.no_grad():
        for param, weight in zip(params_of(plain), params_of(optimizer), strict=True):
            param.copy_(weight)
    for ours, theirs in zip(params_of(optimizer), params_of(plain), strict=True):
        found, expected = optimizer.state.get(ours, {}), plain.state.get(theirs, {})
        assert list(found) == list(expected)
        for key, value in found.items():
            if isinstance(value, Tensor):
                assert (value.dtype, value.shape) == (expected[key].dtype, expected[key].shape), key
                expected[key].copy_(value)
            else:
                expected[key] = value
    for each in (optimizer, plain):
        train(each, gradients[2:])
    assert same_bits(contents(optimizer), contents(plain))


def test_a_foreign_checkpoint_of_16_bits_is_taken_over(seed: int) -> None:
    plain = AdamW([parameter(6, 5, dtype=BF16)], 0.02)
    train(plain, random_gradients(params_of(plain), 2))
    optimizer = AdamW(clones(params_of(plain)), 0.02)
    attach(optimizer)
    optimizer.load_state_dict(plain.state_dict())
    train(optimizer, random_gradients(params_of(plain), 1))
    (param,) = params_of(optimizer)
    assert optimizer.state[param]["exp_avg"].dtype == F32
    assert float(optimizer.state[param]["step"]) == 3
    assert optimizer.state[param]["remainder"].view(torch.int16).any()


@pytest.mark.parametrize(
    "wrong", [torch.zeros(6, 5), torch.zeros(5, 6, dtype=BF16), 3.0], ids=["cast", "shape", "number"]
)
def test_a_remainder_that_is_none_is_refused(wrong: Any, seed: int) -> None:
    optimizer = of_halves()
    train(optimizer, random_gradients(params_of(optimizer), 1))
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "remainder": wrong}
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"state_dict: 'remainder'.*parameter 0 of group 0"):
        optimizer.load_state_dict(saved)
    assert same_bits(contents(optimizer), before)
    train(optimizer, random_gradients(params_of(optimizer), 1))


def test_a_run_of_another_type_is_loaded_in_its_own_types(seed: int) -> None:
    """From float32 to bfloat16 and back: moments stay as they are, radii too."""
    for first, second in ((F32, BF16), (BF16, F32)):
        runs = []
        for dtype in (first, second):
            optimizer = AdamW([parameter(6, 5, dtype=dtype)], 0.02)
            attach(optimizer)
            runs.append(optimizer)
        train(runs[0], random_gradients(params_of(runs[0]), 2))
        runs[1].load_state_dict(through_file(runs[0].state_dict()))
        train(runs[1], random_gradients(params_of(runs[1]), 1))
        (old,), (new,) = runs[0].state.values(), runs[1].state.values()
        assert same_bits(old["radius"], new["radius"])
        assert new["exp_avg"].dtype == F32
        assert ("remainder" in new) == (second == BF16)
