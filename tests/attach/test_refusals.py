"""What ``attach`` refuses: named, with the way out, and before the optimizer has taken its step."""

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import LBFGS, SGD, AdamW, Optimizer, SparseAdam

from layca_fast import FusedLayca, attach, detach
from layca_fast.attach import shadow

from ..optimizer.test_bad_options import BAD_OPTIONS, BadOption
from ..optimizer.test_bad_tensors import BAD_PARAMETERS, BadTensor
from ..support import contents, parameter, params_of, random_gradients, same_bits, train

ids = {"ids": lambda case: case.name}

#: Optimizers are made before their lr is checked by us, and have options of their own beside ours.
BAD_ARGUMENTS = [case for case in BAD_OPTIONS if set(case.options) <= {"rule", "radius", "backend", "rotate", "chunks"}]
BAD_RATES = [case for case in BAD_OPTIONS if set(case.options) == {"lr"} and case.name != "two rates in one tensor"]

#: Tensors of other kinds cannot be trained by any optimizer, and are left alone like all that are frozen.
TRAINABLE = [case for case in BAD_PARAMETERS if case.name not in ("integer", "boolean", "quantized")]


def trained(**options: Any) -> tuple[Optimizer, list[Any]]:
    optimizer = AdamW([("matrix", parameter(6, 5)), ("bias", parameter(5))], lr=0.1, **options)
    attach(optimizer)
    train(optimizer, random_gradients(params_of(optimizer), 2))
    return optimizer, contents(optimizer)


@pytest.mark.parametrize("case", BAD_ARGUMENTS, **ids)
def test_bad_arguments_and_bad_options_of_groups(case: BadOption, seed: int) -> None:
    optimizer = SGD([parameter(6, 5)], 0.1)
    with pytest.raises(case.error, match=case.message):
        attach(optimizer, **case.options)
    in_group = SGD([{"params": [parameter(6, 5)], **case.options}], 0.1)
    with pytest.raises(case.error, match=case.message):
        attach(in_group)
    for each in (optimizer, in_group):
        assert not each._optimizer_step_pre_hooks
        assert "__getstate__" not in vars(each)


@pytest.mark.parametrize("case", BAD_ARGUMENTS + BAD_RATES, **ids)
def test_an_option_set_mid_run_is_refused_and_the_run_goes_on(case: BadOption, seed: int) -> None:
    optimizer, before = trained()
    good = dict(optimizer.param_groups[0])
    optimizer.param_groups[0].update(case.options)
    with pytest.raises(case.error, match=case.message):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
    optimizer.param_groups[0].clear()
    optimizer.param_groups[0].update(good)
    optimizer.step()
    assert not same_bits(contents(optimizer), before)


@pytest.mark.parametrize("case", TRAINABLE, **ids)
def test_parameters_that_no_kernel_may_be_handed(case: BadTensor, seed: int) -> None:
    bad = case.make()
    if not bad.requires_grad:
        bad.requires_grad_()
    optimizer = SGD([("good", parameter(3, 4)), ("layer.bad", bad)], 0.1)
    with pytest.raises(case.error, match=rf"parameter 'layer\.bad'.*{case.message}"):
        attach(optimizer)
    with pytest.raises(case.error, match=rf"parameter 0 of group 1 ?.*{case.message}"):
        attach(SGD([{"params": parameter(2, 2)}, {"params": bad}], 0.1))
    # What does not rotate is none of our business.
    attach(SGD([{"params": parameter(2, 2)}, {"params": bad, "rotate": False}], 0.1))


def test_a_bad_parameter_added_later_is_refused_before_the_step(seed: int) -> None:
    optimizer, before = trained()
    optimizer.add_param_group({"params": [("waves", Parameter(torch.randn(3, 4, dtype=torch.complex64)))]})
    with pytest.raises(TypeError, match=r"'waves'.*is complex"):
        optimizer.step()
    assert same_bits(contents(optimizer)[:2], before)
    optimizer.param_groups[1]["rotate"] = False
    optimizer.step()
    assert not same_bits(contents(optimizer)[:2], before)


def test_frozen_parameters_of_any_type_are_left_alone(seed: int) -> None:
    frozen = torch.randn(3, 4, dtype=torch.complex64)
    optimizer = SGD([parameter(6, 5), frozen, torch.eye(3).to_sparse(), torch.ones(2, 2).long()], 0.1)
    attach(optimizer)
    params_of(optimizer)[0].grad = torch.randn(6, 5)
    before = frozen.clone()
    optimizer.step()
    assert same_bits(frozen, before)
    # Until one is to train.
    frozen.requires_grad_()
    with pytest.raises(TypeError, match=r"parameter 1 of group 0.*complex"):
        optimizer.step()


def test_chunks_that_do_not_divide_a_tensor(seed: int) -> None:
    with pytest.raises(ValueError, match=r"chunks=4 does not divide.*'odd'.*divisor of 6"):
        attach(SGD([("odd", parameter(6, 5))], 0.1), chunks=4)


@pytest.mark.parametrize("through_closure", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_layer_of_zeros_is_found_before_the_step(chunks: int, through_closure: bool, seed: int) -> None:
    good, zero = parameter(6, 5), parameter(6, 5)
    with torch.no_grad():
        zero[0 if chunks == 1 else slice(2, 4)] = 0
        if chunks == 1:
            zero.zero_()
    optimizer = AdamW([{"params": [("good", good)]}, {"params": [("zero", zero)]}], lr=0.1)
    attach(optimizer, chunks=chunks)

    def closure() -> float:
        for param in (good, zero):
            param.grad = torch.randn(6, 5)
        return 0.0

    if not through_closure:
        closure()
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"'zero'.*no direction to turn.*rotate=False"):
        optimizer.step(closure if through_closure else None)
    assert same_bits(contents(optimizer), before)
    optimizer.param_groups[1]["rotate"] = False
    optimizer.step(closure)
    assert float(zero.detach().norm()) > 0


class NeedsBatch(SGD):
    def step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().step()


class Wrapper(Optimizer):
    """An optimizer inside another that never called torch's constructor, as some libraries make them."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda param: param, TypeError, r"optimizer is a Parameter: it must be a torch\.optim\.Optimizer"),
        (lambda param: [SGD([param], 0.1)], TypeError, r"optimizer is a list: it must be a torch\.optim\.Optimizer"),
        (lambda param: FusedLayca([param], 0.1), TypeError, r"FusedLayca, which rotates by itself"),
        (lambda param: LBFGS([param]), TypeError, r"LBFGS, whose step needs closure.*many steps.*torch\.optim\.SGD"),
        (lambda param: NeedsBatch([param], 0.1), TypeError, r"NeedsBatch, whose step needs batch"),
        (lambda param: Wrapper(SGD([param], 0.1)), TypeError, r"Wrapper without step hooks.*inside it"),
    ],
)
def test_optimizers_that_cannot_be_attached_to(make: Any, error: Any, message: str, seed: int) -> None:
    with pytest.raises(error, match=message):
        attach(make(parameter(3, 4)))


def test_lbfgs_is_refused_with_a_scheduler_on_it(seed: int) -> None:
    """A scheduler puts a step of its own in place of the instance's."""
    optimizer = LBFGS([parameter(3, 4)])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match="closure"):
        attach(optimizer)


def test_16_bits_need_gradients_of_another_type(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As torch has them since 2.10."""
    monkeypatch.setattr(shadow, "GRADIENTS_HAVE_TYPES", False)
    half = Parameter(torch.randn(3, 4).bfloat16())
    with pytest.raises(TypeError, match=r"'half' .*torch 2\.10 or newer, or FusedLayca.*autocast"):
        attach(SGD([("half", half)], 0.1))
    attach(SGD([{"params": [half], "rotate": False}], 0.1))


def test_sparse_gradients_are_the_optimizers_own_affair(seed: int) -> None:
    embedding = torch.nn.Embedding(6, 5, sparse=True)
    optimizer = SparseAdam(embedding.parameters(), lr=0.1)
    attach(optimizer)
    norm = float(embedding.weight.detach().norm())
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 3])).square().sum().backward()
    optimizer.step()
    assert not torch.equal(embedding.weight, before)
    assert float(embedding.weight.detach().norm()) == pytest.approx(norm, rel=1e-6)


def test_attaching_twice(seed: int) -> None:
    optimizer, before = trained()
    with pytest.raises(ValueError, match=r"attached already.*detach\(optimizer\)"):
        attach(optimizer)
    assert same_bits(contents(optimizer), before)
    detach(optimizer)
    attach(optimizer)


def test_a_group_without_a_rate(seed: int) -> None:
    optimizer = SGD([{"params": [parameter(3, 4)]}, {"params": [Parameter(torch.randn(2, 2))]}], 0.1)
    del optimizer.param_groups[1]["lr"]
    with pytest.raises(ValueError, match=r"group 1 of SGD has no 'lr'"):
        attach(optimizer)


def test_a_backend_that_cannot_run_says_so_before_the_step(seed: int) -> None:
    optimizer = AdamW([parameter(6, 5)], lr=0.1)
    attach(optimizer, backend="cuda")
    params_of(optimizer)[0].grad = torch.randn(6, 5)
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run"):
        optimizer.step()
    assert same_bits(contents(optimizer), before)
