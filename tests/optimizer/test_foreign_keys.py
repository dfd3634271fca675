"""Names and keys that others put into param groups: kept, not mistaken for ours, and asked about where it may help."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layca_fast import FusedLayca, RotationMonitor, attach, layer_groups
from layca_fast.formulas.bases import BASES

from ..support import clones, contents, native_backends, parameter, params_of, random_gradients, same_bits, train

#: Every option of some base, with a base that does not have it.
FOREIGN = [
    (base.name, name, value)
    for base in BASES.values()
    for other in BASES.values()
    for name, value in other.options.items()
    if name not in base.options
]


@pytest.mark.parametrize(("base", "name", "value"), dict.fromkeys(FOREIGN), ids=str)
def test_an_option_of_another_base_is_kept_and_changes_no_step(base: str, name: str, value: Any, seed: int) -> None:
    # Muon takes matrices only.
    params = [parameter(4, 3), parameter(5, 2)]
    twins = clones(params)
    plain = FusedLayca(params, 0.1, base=base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = FusedLayca([{"params": twins, name: value}], 0.1, base=base)
        optimizer.add_param_group({"params": [parameter(2, 2)], name: value})
    asked = [str(each.message) for each in caught]
    if name == "alpha":
        assert asked == []
    else:
        (message,) = asked
        assert message.startswith(f"{name}={value!r} is kept in the param group, but base={base!r} does not read it")
        assert caught[0].filename == __file__
    grads = random_gradients(params, 3)
    train(plain, grads)
    train(optimizer, [[*row, None] for row in grads])
    assert same_bits(contents(optimizer)[:2], contents(plain))
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert [group[name] for group in each.param_groups] == [value, value]
    saved = optimizer.state_dict()
    del optimizer.param_groups[0][name]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0][name] == value


def test_such_a_key_is_read_once_its_base_is_there(seed: int) -> None:
    optimizer = FusedLayca([{"params": [parameter(4, 3)], "alpha": 0.5}], 0.1, base="adam")
    optimizer.param_groups[0].update({**BASES["rmsprop"].options, "base": "rmsprop", "alpha": -1.0})
    with pytest.raises(ValueError, match=r"alpha=-1\.0"):
        train(optimizer, random_gradients(params_of(optimizer), 1))


class Wrapper(Optimizer):
    """As WSAM does it: options of its own in all groups, which it shares with the optimizer that it makes."""

    def __init__(self, params: Any, base: Callable[..., Optimizer], alpha: float = 0.9, rho: float = 0.05) -> None:
        super().__init__(params, {"alpha": alpha, "rho": rho, "adaptive": False, "lr": 0.1})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.base_optimizer.step(closure)


@pytest.mark.parametrize("named", [False, True], ids=["tensors", "named"])
@pytest.mark.parametrize("base", BASES)
def test_wrappers_that_share_their_groups(base: str, named: bool, seed: int) -> None:
    params = [parameter(4, 3), parameter(5, 2)]
    twins = clones(params)
    plain = FusedLayca(params, 0.1, base=base)
    given = [("weight", twins[0]), ("bias", twins[1])] if named else twins
    options = {"alpha": 0.9} if base == "rmsprop" else {}
    plain.param_groups[0].update(options)
    wrapper = Wrapper(given, lambda groups: FusedLayca(groups, base=base))
    grads = random_gradients(params, 3)
    train(plain, grads)
    train(wrapper, grads)
    assert same_bits([each.detach() for each in twins], [each.detach() for each in params])


@pytest.mark.parametrize("key", ["difference", "noise", "step", "params_", "state", "name", 7], ids=str)
def test_no_other_key_is_read_by_chance(key: Any, seed: int) -> None:
    """Whatever is true there: what the package notes in groups for itself has a name that nobody else's has."""
    params = [parameter(4, 3), parameter(5)]
    twins = clones(params)
    # Steps so small that attach, which measures them as differences of weights, takes them for noise.
    grads = [[1e-8 * each for each in row] for row in random_gradients(params, 2)]
    optimizers = FusedLayca(params, 0.1), FusedLayca([{"params": twins, key: True}], 0.1)
    for optimizer in optimizers:
        train(optimizer, grads)
    assert same_bits(*map(contents, optimizers))


class Other(torch.optim.SGD):
    """Has options under the names of ours, as Muon's first version has ``backend``."""

    def __init__(self, params: Any, **theirs: Any) -> None:
        super().__init__(params, lr=0.1)
        self.defaults.update(theirs)
        for group in self.param_groups:
            group.update(theirs)


THEIRS = {"backend": "newtonschulz5", "rule": 3, "rotate": "left", "radius": 0.5, "chunks": "eight"}


@pytest.mark.parametrize("name", THEIRS)
def test_options_of_the_other_optimizers_own_are_not_taken_for_ours(name: str, seed: int) -> None:
    params = [parameter(4, 3), parameter(5)]
    twins = clones(params)
    plain, other = torch.optim.SGD(params, lr=0.1), Other(twins, **{name: THEIRS[name]})
    for optimizer in (plain, other):
        attach(optimizer)
    monitor = RotationMonitor(other)
    assert monitor.names == ["0.0"]
    grads = random_gradients(params, 3)
    train(plain, grads)
    train(other, grads)
    assert same_bits(contents(other), contents(plain))
    assert other.param_groups[0][name] == THEIRS[name]


def test_what_a_group_of_another_optimizer_says_of_our_options_still_holds(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(layer_groups(model, lr=0.1), lr=0.1)
    optimizer.param_groups[0]["chunks"] = 2
    attach(optimizer)
    assert len(RotationMonitor(optimizer).names) == 4
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert {len(state["radius"]) for state in optimizer.state.values() if "radius" in state} == {2}


def names_of(optimizer: Optimizer) -> list[list[str] | None]:
    return [group.get("param_names") for group in optimizer.param_groups]


GROUPS: dict[str, Callable[[list[Tensor]], Any]] = {
    "tensors": lambda params: {"params": params},
    "one tensor": lambda params: {"params": params[0]},
    "generator": lambda params: {"params": (each for each in params)},
    "names": lambda params: {"params": [(f"late{i}", each) for i, each in enumerate(params)]},
    "names apart": lambda params: {"params": params, "param_names": [f"late{i}" for i, _ in enumerate(params)]},
    "nothing": lambda params: {"params": []},
}


@pytest.mark.parametrize("second", GROUPS)
@pytest.mark.parametrize("first", [name for name in GROUPS if name != "nothing"])
@native_backends
def test_groups_with_and_without_names_go_together(backend: str, first: str, second: str, seed: int) -> None:
    """By add_param_group and by the constructor; the steps are those without names."""
    params = [parameter(*shape, backend=backend) for shape in ((4, 3), (5,), (3, 3), (2, 2))]
    twins, triplets = clones(params), clones(params)
    many = {"one tensor": 1, "nothing": 0}
    cut = many.get(first, 2), 2 + many.get(second, 2)

    def made(tensors: list[Any], one: str, two: str) -> list[Any]:
        return [GROUPS[one](tensors[: cut[0]]), GROUPS[two](tensors[2 : cut[1]])]

    at_once = FusedLayca(made(params, first, second), 0.1, momentum=0.9, backend=backend)
    early, late = made(twins, first, second)
    added = FusedLayca([early], 0.1, momentum=0.9, backend=backend)
    added.add_param_group(late)
    plain = FusedLayca(
        [{"params": triplets[: cut[0]]}, {"params": triplets[2 : cut[1]]}], 0.1, momentum=0.9, backend=backend
    )
    grads = random_gradients(params_of(plain), 2)
    for optimizer in (at_once, added, plain):
        train(optimizer, grads)
    assert same_bits(contents(at_once), contents(plain))
    assert same_bits(contents(added), contents(plain))
    named = [name.startswith("names") for name in (first, second)]
    expected = [
        [f"late{i}" if own else f"{number}.{i}" for i in range(len(group["params"]))] if any(named) else None
        for number, (own, group) in enumerate(zip(named, plain.param_groups, strict=True))
    ]
    assert names_of(at_once) == names_of(added) == expected
    at_once.load_state_dict(added.state_dict())
    assert [stats.name for stats in added.rotation_stats().values()] == [
        stats.name for stats in at_once.rotation_stats().values()
    ]


@pytest.mark.parametrize("named", [False, True], ids=["tensors", "named"])
def test_a_refused_group_leaves_no_names(named: bool, seed: int) -> None:
    first, good, wrong = parameter(4, 3), parameter(2, 2), torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)
    optimizer = FusedLayca([first if named else ("first", first)], 0.1)
    before = optimizer.state_dict()["param_groups"]
    late: list[Any] = [("good", good), ("wrong", wrong)] if named else [good, wrong]
    with pytest.raises(TypeError, match="wrong" if named else "complex"):
        optimizer.add_param_group({"params": late})
    assert optimizer.state_dict()["param_groups"] == before


class Finetuned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.backbone.requires_grad_(False)


MADE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "FusedLayca": lambda model: FusedLayca(layer_groups(model), 0.1),
    "FusedLayca without names": lambda model: FusedLayca(layer_groups(model, names=False), 0.1),
    "SGD without names": lambda model: torch.optim.SGD(layer_groups(model, names=False), 0.1),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_layers_may_be_unfrozen_and_added_as_plain_tensors(make: Callable[..., Optimizer], seed: int) -> None:
    """As Lightning's BaseFinetuning does it."""
    model = Finetuned()
    optimizer = make(model)
    if not isinstance(optimizer, FusedLayca):
        attach(optimizer)
    model.backbone.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.backbone.parameters()), "lr": 0.01})
    before = [param.detach().clone() for param in model.backbone.parameters()]
    model.head(model.backbone(torch.randn(3, 4))).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(*each) for each in zip(before, model.backbone.parameters(), strict=True))


def test_the_plan_of_groups_without_names_is_the_same(seed: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    named, plain = layer_groups(model, alpha=0.3), layer_groups(model, alpha=0.3, names=False)
    assert str(plain) == str(named)
    assert [[id(param) for _, param in group["params"]] for group in named] == [
        [id(param) for param in group["params"]] for group in plain
    ]
    with pytest.raises(ValueError, match=r"names='no' is unknown.*False, True"):
        layer_groups(model, names="no")


def test_lists_in_groups_stay_the_objects_that_they_were(seed: int) -> None:
    """Whoever has put one there goes on writing to it; only numbers that checkpoints cannot hold are replaced."""
    history, betas = [1, "two", [3.0]], [0.5, 0.9]
    group = {"params": [parameter(4, 3)], "history": history, "betas": betas}
    optimizer = FusedLayca([group], 0.1, base="adam")
    train(optimizer, random_gradients(params_of(optimizer), 2))
    assert optimizer.param_groups[0]["history"] is history
    assert optimizer.param_groups[0]["betas"] is betas
    optimizer.param_groups[0]["betas"] = [numpy.float64(0.5), 0.9]
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert [type(beta) for beta in optimizer.param_groups[0]["betas"]] == [float, float]
