"""Steps that a stand-in takes for an attached optimizer of 16-bit parameters: nobody else sees it."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from layca_fast import attach, detach
from layca_fast.state.compensation import HALVES

from ..support import clones, contents, copy_of, parameter, params_of, random_gradients, same_bits, train
from .support import ALL_OPTIMIZERS, new_params
from .test_memory import Allocations

BF16, F32 = torch.bfloat16, torch.float32
every_half = pytest.mark.parametrize("dtype", HALVES, ids=str)
every_optimizer = pytest.mark.parametrize("name", ALL_OPTIMIZERS)


def of_halves(make: Callable[..., Optimizer] = AdamW, **options: Any) -> Optimizer:
    optimizer = make([parameter(6, 5, dtype=BF16), parameter(7, dtype=BF16)], lr=0.02, **options)
    attach(optimizer)
    return optimizer


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


class Fails(SGD):
    """Raises once it has stepped its first parameter."""

    error: BaseException | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                param.add_(param.grad, alpha=-group["lr"])
                self.state[param]["count"] = self.state[param].get("count", 0) + 1
                if self.error is not None:
                    raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=type)
def test_a_step_that_fails_leaves_everything_where_it_was(error: BaseException, seed: int) -> None:
    optimizer = Fails([parameter(6, 5, dtype=BF16), parameter(4, 3, dtype=BF16)], 0.02)
    attach(optimizer)
    gradients = random_gradients(params_of(optimizer), 3)
    train(optimizer, gradients[:1])
    params, before = list(params_of(optimizer)), contents(optimizer)
    optimizer.error = error
    with pytest.raises(type(error)):
        optimizer.step()
    assert all(a is b for a, b in zip(params_of(optimizer), params, strict=True))
    assert same_bits(contents(optimizer), before)
    assert list(optimizer.state) == params
    optimizer.error = None
    train(optimizer, gradients[1:2])
    assert all(state["count"] == 2 for state in optimizer.state.values())
    assert not same_bits(contents(optimizer)[0][0], before[0][0])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(BF16)


@pytest.mark.parametrize("by_name", [False, True])
def test_closures_see_the_model_as_it_is(by_name: bool, seed: int) -> None:
    """They run it in 16 bits, and may change rates: the step is that of gradients made before."""
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [AdamW(model.parameters(), lr=0.5) for model in models]
    for each in optimizers:
        attach(each)
    batches = torch.randn(3, 8, 6, dtype=BF16)

    def backward(index: int, batch: Tensor) -> Tensor:
        optimizers[index].zero_grad()
        optimizers[index].param_groups[0]["lr"] = 0.02
        loss = models[index](batch).float().square().mean()
        loss.backward()
        return loss

    for batch in batches:
        expected = backward(0, batch)
        optimizers[0].step()
        closure = lambda batch=batch: backward(1, batch)  # noqa: E731
        loss = optimizers[1].step(closure=closure) if by_name else optimizers[1].step(closure)
        assert torch.equal(loss, expected)
    assert same_bits(contents(optimizers[0]), contents(optimizers[1]))
    assert optimizers[1].state[models[1][0].weight]["exp_avg"].any()


def test_a_closure_that_fails_leaves_everything_where_it_was(seed: int) -> None:
    optimizer = of_halves()
    train(optimizer, random_gradients(params_of(optimizer), 2))
    before = contents(optimizer)

    def fail() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        optimizer.step(fail)
    assert same_bits(contents(optimizer), before)
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert not same_bits(contents(optimizer)[0][0], before[0][0])


class Counts(SGD):
    """Keeps numbers in its groups, as attributes and in its state under a name, as some optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.seen: list[torch.dtype] = []
        self.last = None
        self.lock = threading.Lock()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.last = self.param_groups[0]["params"][0].dtype
        self.seen.append(self.last)
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        self.state["steps"] = {"k": self.param_groups[0]["k"]}  # type: ignore[index]


def test_what_an_optimizer_keeps_in_groups_and_attributes_is_kept(seed: int) -> None:
    optimizer = Counts([parameter(6, 5, dtype=BF16)], 0.02)
    attach(optimizer)
    for number in range(1, 4):
        train(optimizer, [[torch.randn(6, 5)]])
        assert optimizer.last == F32
        assert optimizer.seen == [F32] * number
        assert optimizer.param_groups[0]["k"] == number
        assert optimizer.state["steps"] == {"k": number}  # type: ignore[index]
        assert params_of(optimizer)[0].dtype == BF16
    assert not any("layca_fast" in name for name in vars(optimizer))


def test_marks_on_parameters_and_hooks_are_seen(seed: int) -> None:
    class Marked(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            """Its hooks run once, as they would not if this one had them, too."""
            marks.append([getattr(param, "mark", None) for param in self.param_groups[0]["params"]])
            super().step()

    marks: list[Any] = []
    seen: list[Any] = []
    optimizer = Marked([parameter(6, 5, dtype=BF16)], 0.02)
    params_of(optimizer)[0].mark = "mine"  # type: ignore[attr-defined]
    optimizer.register_step_pre_hook(lambda made, args, kwargs: seen.append((made, copy_of(params_of(made)[0]))))
    attach(optimizer)
    optimizer.register_step_post_hook(lambda made, args, kwargs: seen.append((made, copy_of(params_of(made)[0]))))
    train(optimizer, random_gradients(params_of(optimizer), 1))
    assert marks == [["mine"]]
    assert all(made is optimizer for made, _ in seen)
    assert same_bits(seen[1][1], copy_of(params_of(optimizer)[0]))
    assert not same_bits(seen[0][1], seen[1][1])


class Elsewhere(Optimizer):
    """Steps the parameters that it was made with, whatever its groups hold."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.inner = SGD(params, lr)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_an_optimizer_that_keeps_its_parameters_elsewhere_is_told(seed: int) -> None:
    optimizer = Elsewhere([parameter(6, 5, dtype=BF16)], 0.02)
    attach(optimizer)
    params_of(optimizer)[0].grad = torch.randn(6, 5).to(BF16)
    with pytest.raises(RuntimeError, match=r"Elsewhere has stepped parameter 0 of group 0 .*optimizer inside it"):
        optimizer.step()
    inner = optimizer.inner
    attach(inner)
    inner.step()


class HandsOut(SGD):
    """Has the groups and the state of an optimizer inside."""

    inner: Any = None
    param_groups = property(lambda self: self.inner.param_groups, lambda self, groups: None)  # type: ignore[assignment]
    state = property(lambda self: self.inner.state, lambda self, state: None)  # type: ignore[assignment]


def test_a_wrapper_that_hands_out_groups_is_told_before_anything_moves(seed: int) -> None:
    inner = SGD([parameter(6, 5, dtype=BF16)], 0.02)
    optimizer = HandsOut.__new__(HandsOut)
    optimizer.inner = inner
    vars(optimizer).update({name: value for name, value in vars(SGD([parameter(2, 2)], 0.1)).items() if "hook" in name})
    attach(optimizer)
    params_of(inner)[0].grad = torch.randn(6, 5).to(BF16)
    before = contents(inner)
    with pytest.raises(TypeError, match=r"HandsOut has no param_groups or state of its own.*attach to that one"):
        optimizer.step()
    # The radius, which no step has set yet, and the remainder, of zeros.
    assert same_bits([each[:2] for each in contents(inner)], [each[:2] for each in before])
    assert not any(value.any() for value in inner.state[params_of(inner)[0]].values())


def test_a_closure_that_steps_the_optimizer_itself_is_told(seed: int) -> None:
    optimizer = of_halves()
    train(optimizer, random_gradients(params_of(optimizer), 1))
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"a closure steps this AdamW in the middle of its own step"):
        optimizer.step(optimizer.step)
    assert same_bits(contents(optimizer), before)
    train(optimizer, random_gradients(params_of(optimizer), 1))


def test_schedulers_and_rates_in_tensors(seed: int) -> None:
    optimizer = of_halves(SGD)
    twin = SGD([Parameter(param.detach().float()) for param in params_of(optimizer)], lr=torch.tensor(0.02))
    handle = attach(twin)
    schedulers = [LambdaLR(each, lambda step: 0.5**step) for each in (optimizer, twin)]
    for row in random_gradients(params_of(optimizer), 4):
        row = [grad.to(BF16) for grad in row]
        train(optimizer, [row])
        train(twin, [[grad.float() for grad in row]])
        for scheduler in schedulers:
            scheduler.step()
    weight = params_of(twin)[0].detach()
    assert torch.equal(params_of(optimizer)[0].float(), weight.bfloat16().float())
    handle.remove()


def test_groups_may_be_added_mid_run(seed: int) -> None:
    optimizer = of_halves()
    train(optimizer, random_gradients(params_of(optimizer), 1))
    optimizer.add_param_group({"params": [parameter(4, 3, dtype=torch.float16), parameter(4, 3)], "lr": 0.05})
    before = contents(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    assert not any(same_bits(old[0], new[0]) for old, new in zip(before, contents(optimizer), strict=True))
    kinds = [list(optimizer.state[param]) for param in params_of(optimizer)]
    plain = ["step", "exp_avg", "exp_avg_sq"]
    assert kinds == [[*plain, "radius", "remainder"], plain, [*plain, "radius", "remainder"], [*plain, "radius"]]


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


def test_what_it_costs_in_memory(seed: int) -> None:
    """Kept: a remainder of 2 bytes a weight and a float32 copy. While it steps, a float32 gradient."""
    params = [parameter(700, 1000, dtype=BF16), parameter(700, 900, dtype=BF16)]
    optimizer = SGD(params, 0.02, foreach=False)
    attach(optimizer, backend="cpu")
    for param in params:
        param.grad = torch.randn(param.shape).to(BF16)
    count = sum(param.numel() for param in params)
    with Allocations() as allocations:
        for _ in range(3):
            optimizer.step()
    # Reading a remainder takes a few numbers for each weight of a block; the rest is tables.
    assert 6 * count <= allocations.live <= 6 * count + 2**18
    assert 10 * count <= allocations.peak <= 10 * count + 2**24
