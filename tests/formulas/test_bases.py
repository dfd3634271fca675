"""Base optimizers beside those of torch.optim: plain steps, state, and what torch would do with odd numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES

from ..support import (
    assert_close,
    clones,
    every_backend,
    native_backends,
    parameter,
    params_of,
    random_gradients,
    relative_distance,
    same_bits,
    train,
)

SHAPES = ((6, 5), (7,), (4, 3, 2), (), (33, 65))
LR = 0.02


@dataclass(frozen=True)
class Peer:
    """A base with options, and the optimizer of torch that takes the same plain steps under the same names."""

    base: str
    torch: type[Optimizer]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.base} {dict(self.options)}"


PEERS = (
    Peer("sgd", SGD, {}),
    Peer("sgd", SGD, {"momentum": 0.9, "dampening": 0.3}),
    Peer("sgd", SGD, {"momentum": 0.8, "nesterov": True}),
    Peer("rmsprop", RMSprop, {}),
    Peer("rmsprop", RMSprop, {"alpha": 0.9, "eps": 1e-4, "momentum": 0.8}),
    Peer("rmsprop", RMSprop, {"alpha": 0.8, "eps": 1e-3, "centered": True}),
    Peer("rmsprop", RMSprop, {"alpha": 0.8, "eps": 1e-3, "centered": True, "momentum": 0.7}),
    Peer("adagrad", Adagrad, {}),
    Peer("adagrad", Adagrad, {"eps": 1e-3, "initial_accumulator_value": 0.2}),
    Peer("adam", Adam, {}),
    Peer("adam", Adam, {"betas": (0.7, 0.95), "eps": 1e-3}),
    Peer("adam", Adam, {"betas": (0.0, 0.9), "eps": 1e-5, "amsgrad": True}),
)
every_peer = pytest.mark.parametrize("peer", PEERS, ids=str)


def plain(params: list[Tensor], peer: Peer, backend: str, **more: Any) -> FusedLayca:
    return FusedLayca(params, LR, base=peer.base, rotate=False, backend=backend, **peer.options, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_peer
@every_backend
def test_plain_steps_and_state_are_those_of_torch(backend: str, peer: Peer, dtype: torch.dtype, seed: int) -> None:
    ours = [parameter(*shape, backend=backend, dtype=dtype) for shape in SHAPES]
    theirs = clones(ours)
    optimizer, other = plain(ours, peer, backend), peer.torch(theirs, lr=LR, **peer.options)
    gradients = random_gradients(ours, 4 if backend == "triton" else 100)
    train(optimizer, gradients)
    train(other, gradients)
    assert_close(optimizer, other, 1e-6 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("peer", [*PEERS, Peer("adam", AdamW, {"betas": (0.8, 0.9), "amsgrad": True})], ids=str)
@native_backends
def test_decay_is_decoupled_under_every_base(backend: str, peer: Peer, seed: int) -> None:
    """As AdamW has it; beside the others, whose own decay enters the gradient, it is taken off the weights by hand."""
    decay = 0.3
    ours = [parameter(*shape, backend=backend, dtype=torch.float64) for shape in SHAPES]
    theirs = clones(ours)
    optimizer = plain(ours, peer, backend, weight_decay=decay)
    decoupled = peer.torch is AdamW
    other = peer.torch(theirs, lr=LR, weight_decay=decay if decoupled else 0.0, **peer.options)
    for row in random_gradients(ours, 40):
        train(optimizer, [row])
        if not decoupled:
            for param in theirs:
                param.data.mul_(1 - LR * decay)
        train(other, [row])
    assert_close(optimizer, other, 1e-13)


def test_names_and_defaults_are_those_of_torch() -> None:
    for peer in PEERS:
        theirs = peer.torch([Parameter(torch.ones(1))], lr=0.1).defaults
        for name, value in BASES[peer.base].options.items():
            assert theirs[name] == value, (peer.base, name)


@every_peer
@native_backends
def test_a_run_may_go_over_from_torch_in_its_middle(backend: str, peer: Peer, seed: int) -> None:
    theirs = [parameter(*shape, backend=backend, dtype=torch.float64) for shape in SHAPES]
    other = peer.torch(theirs, lr=LR, **peer.options)
    train(other, random_gradients(theirs, 5))
    optimizer = plain(clones(theirs), peer, backend)
    with pytest.warns(UserWarning, match="hyperparameters"):
        optimizer.load_state_dict(other.state_dict())
    gradients = random_gradients(theirs, 10)
    train(optimizer, gradients)
    train(other, gradients)
    assert_close(optimizer, other, 1e-13)


@native_backends
def test_steps_are_counted_per_parameter_with_a_gradient(backend: str, seed: int) -> None:
    """Bias corrections are those of the parameter's own steps, as in torch, whenever its first gradient came."""
    ours = [parameter(4, 3, backend=backend), parameter(5, backend=backend), parameter(0, 2, backend=backend)]
    theirs = clones(ours)
    options = {"betas": (0.9, 0.99), "eps": 1e-4}
    optimizer = FusedLayca(ours, LR, base="adam", rotate=False, backend=backend, **options)
    other = Adam(theirs, lr=LR, **options)
    rows = random_gradients(ours, 9)
    for i, row in enumerate(rows):
        row[1] = None if i % 3 else row[1]
    train(optimizer, rows)
    train(other, rows)
    assert [float(optimizer.state[param]["step"]) for param in ours] == [9.0, 3.0, 9.0]
    assert_close(optimizer, other, 1e-6)


@pytest.mark.parametrize("base", [peer.base for peer in PEERS[3::4]] + ["lion", "sgd_amom"])
@every_backend
def test_state_is_made_at_lr_0_and_keeps_its_keys(backend: str, base: str, seed: int) -> None:
    """What loads checkpoints makes the state by such a step."""
    params = [parameter(4, 3, backend=backend), parameter(5, backend=backend)]
    optimizer = FusedLayca(params, 0.0, base=base, backend=backend)
    before = [param.detach().clone() for param in params]
    train(optimizer, random_gradients(params, 1))
    keys = [set(optimizer.state[param]) for param in params]
    assert same_bits(before, [param.detach() for param in params])
    optimizer.param_groups[0]["lr"] = 0.1
    train(optimizer, random_gradients(params, 2))
    assert keys == [set(optimizer.state[param]) for param in params]
    assert keys[0] - keys[1] == {"radius"}


SQUARING = (
    {"base": "rmsprop"},
    {"base": "rmsprop", "centered": True, "momentum": 0.9},
    {"base": "adagrad"},
    {"base": "adam"},
    {"base": "adam", "amsgrad": True},
)


@pytest.mark.parametrize("options", SQUARING, ids=str)
@every_backend
def test_a_gradient_whose_square_overflows_counts_as_zero(backend: str, options: dict[str, Any], seed: int) -> None:
    """One of 1e25 would make the mean square infinite for good, and the weight would never train again."""
    params = [parameter(8, 8, backend=backend) for _ in range(2)]
    params[1].data.copy_(params[0])
    optimizers = [FusedLayca([param], LR, backend=backend, **options) for param in params]
    for step, (grad,) in enumerate(random_gradients(params[:1], 4)):
        for optimizer, value in zip(optimizers, (1e25, 0.0), strict=True):
            spoilt = grad.clone()
            if step == 1:
                spoilt[3, 4] = value
            train(optimizer, [[spoilt]])
    assert same_bits(*(dict(optimizer.state[param]) for optimizer, param in zip(optimizers, params, strict=True)))
    assert same_bits(params[0].detach(), params[1].detach())
    counts = [optimizer.rotation_stats()[param].non_finite for optimizer, param in zip(optimizers, params, strict=True)]
    assert [int(count) for count in counts] == [1, 0]


@pytest.mark.parametrize("base", ["rmsprop", "adagrad", "adam"])
@every_backend
def test_zero_over_zero_at_eps_0_is_no_step(backend: str, base: str, seed: int) -> None:
    param = parameter(6, 4, backend=backend)
    optimizer = FusedLayca([param], LR, base=base, eps=0.0, rotate=False, backend=backend)
    before = param.detach().clone()
    (grad,) = random_gradients([param], 1)[0]
    grad[2:4] = 0.0
    train(optimizer, [[grad]])
    moved = param.detach() != before
    assert moved.sum(1).tolist() == [4, 4, 0, 0, 4, 4]
    assert int(optimizer.rotation_stats()[param].non_finite) == 8


@native_backends
def test_lion_beside_its_definition(backend: str, seed: int) -> None:
    """arXiv 2302.06675, Algorithm 2, on gradients that keep its argument away from zero, where the sign jumps."""
    param = parameter(9, 8, backend=backend, dtype=torch.float64)
    start = param.detach().clone()
    optimizer = FusedLayca(
        [param], LR, base="lion", betas=(0.85, 0.97), rotate=False, weight_decay=0.1, backend=backend
    )
    memory, expected = torch.zeros_like(start), start.clone()
    for (noise,) in random_gradients([param], 50):
        argument = 0.85 * memory + 0.15 * noise
        grad = torch.where(argument.abs() < 1e-6, noise + 1.0, noise)
        grad[4] = memory[4] = 0.0
        expected = expected - LR * ((0.85 * memory + 0.15 * grad).sign() + 0.1 * expected)
        memory = 0.97 * memory + 0.03 * grad
        train(optimizer, [[grad]])
    assert relative_distance(param, expected) <= 1e-13
    assert relative_distance(optimizer.state[param]["exp_avg"], memory) <= 1e-13
    assert set(optimizer.state[param]) == {"exp_avg"}


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"base": "rmsprop"}, 3**-3),
        ({"base": "rmsprop", "momentum": 0.5}, 3**-5),
        ({"base": "adagrad"}, 3**-3),
        ({"base": "adam"}, 3**-5),
        ({"base": "lion"}, 3**-5),
    ],
    ids=str,
)
def test_the_default_lr_is_the_papers(options: dict[str, Any], rate: float) -> None:
    optimizer = FusedLayca([parameter(2, 2)], **options)
    assert optimizer.param_groups[0]["lr"] == rate


@native_backends
def test_options_of_adam_may_change_mid_run(backend: str, seed: int) -> None:
    """As schedulers of betas do it, and amsgrad switched on: its maximum then starts from the next step."""
    params = [parameter(5, 4, backend=backend, dtype=torch.float64)]
    theirs = clones(params)
    optimizer = FusedLayca(params, LR, base="adam", rotate=False, backend=backend)
    other = Adam(theirs, lr=LR)
    for beta1, beta2 in ((0.9, 0.99), (0.6, 0.95), (0.0, 0.5)):
        for each in (optimizer, other):
            each.param_groups[0]["betas"] = (beta1, beta2)
        gradients = random_gradients(params, 4)
        train(optimizer, gradients)
        train(other, gradients)
    assert_close(optimizer, other, 1e-13)
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, random_gradients(params, 1))
    state = optimizer.state[params_of(optimizer)[0]]
    assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])


#: Means with all their weight on the gradient: base, its options, the state that holds the mean.
WITHOUT_AVERAGING = (
    ("adam", {"betas": (0.0, 0.9)}, "exp_avg"),
    ("muon", {"momentum": 0.0, "nesterov": False}, "momentum_buffer"),
    ("muon", {"momentum": 0.0, "nesterov": True}, "momentum_buffer"),
    ("sgd_amom", {"momentum": 0.0}, "momentum_buffer"),
    ("rmsprop", {"alpha": 0.0, "centered": True}, "grad_avg"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("base", "options", "name"), WITHOUT_AVERAGING)
@every_backend
def test_without_averaging_the_mean_is_the_gradient(
    backend: str, base: str, options: dict[str, Any], name: str, dtype: torch.dtype, seed: int
) -> None:
    """To the bit, as torch has it, however large the gradient before it was: betas=(0, ...) is what GANs take."""
    shapes = [shape for shape in SHAPES if base != "muon" or len(shape) == 2]
    params = [parameter(*shape, backend=backend, dtype=dtype) for shape in shapes]
    optimizer = FusedLayca(params, LR, base=base, backend=backend, **options)
    for scale in (1.0, 1e-9, 1e-3):
        gradients = [scale * gradient for gradient in random_gradients(params, 1)[0]]
        train(optimizer, [gradients])
        for param, gradient in zip(params_of(optimizer), gradients, strict=True):
            assert torch.equal(optimizer.state[param][name], gradient)


@native_backends
def test_a_base_that_begins_mid_run_begins_its_own_count(backend: str, seed: int) -> None:
    """Adam's corrections are for moments of zero, whatever another base has counted before it."""
    param = parameter(6, 5, backend=backend, dtype=torch.float64)
    optimizer = FusedLayca([param], LR, base="rmsprop", rotate=False, backend=backend)
    train(optimizer, random_gradients([param], 20))
    optimizer.param_groups[0].update(BASES["adam"].options, base="adam")
    (twin,) = clones([param])
    fresh = FusedLayca([twin], LR, base="adam", rotate=False, backend=backend)
    gradients = random_gradients([param], 3)
    train(optimizer, gradients)
    train(fresh, gradients)
    assert same_bits(param.detach(), twin.detach())
    assert float(optimizer.state[param]["step"]) == 3


def test_moments_without_a_count_of_steps_are_refused(seed: int) -> None:
    param = parameter(6, 5)
    optimizer = FusedLayca([param], LR, base="adam")
    train(optimizer, random_gradients([param], 2))
    before = param.detach().clone()
    del optimizer.state[param]["step"]
    with pytest.raises(
        ValueError, match=r"parameter 0 of group 0.*'exp_avg' but no 'step'.*clear the optimizer's state"
    ):
        train(optimizer, random_gradients([param], 1))
    assert same_bits(param.detach(), before)


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -1.0])
def test_a_checkpoint_with_an_impossible_count_is_refused(count: float, seed: int) -> None:
    optimizer = FusedLayca([parameter(6, 5)], LR, base="adam")
    train(optimizer, random_gradients(params_of(optimizer), 2))
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": torch.tensor(count)}
    with pytest.raises(ValueError, match=r"'step' is .*finite number >= 0"):
        optimizer.load_state_dict(saved)


def test_the_default_device_does_not_matter(seed: int) -> None:
    param = parameter(6, 5)
    optimizer = FusedLayca([param], LR, base="adam")
    (grads,) = random_gradients([param], 1)
    with torch.device("meta"):
        train(optimizer, [grads])
    assert (optimizer.state[param]["step"].device.type, float(optimizer.state[param]["step"])) == ("cpu", 1.0)
