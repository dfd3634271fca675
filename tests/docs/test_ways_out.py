"""docs/faq.md: what each entry says to do, done, so that the call that was refused works."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from layca_fast import FusedLayca, RotationMonitor, attach, detach, layer_groups
from layca_fast.backends import choose
from layca_fast.diagnostics import LayerConditioning
from layca_fast.monitor.reading import read_curves

from ..support import norm_of
from .test_faq import TRIGGERS, Lookahead, Mixer, Model, Named, Odd, Outer, matrix, step, with_gaps


def trains(optimizer: Any, *params: Tensor) -> None:
    """A step on gradients: every tensor moves."""
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(before, params, strict=True))


def zero_layer() -> None:
    zero = Parameter(torch.zeros(4, 6))
    trains(FusedLayca([{"params": [zero], "rotate": False}], lr=0.1), zero)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    nn.init.zeros_(model[0].weight)
    trains(FusedLayca(layer_groups(model), lr=0.1), model[0].weight)
    nn.init.normal_(zero)
    trains(FusedLayca([zero], lr=0.1), zero)


def tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embedding"].weight
    for params in (model.parameters(), layer_groups(model)):
        trains(FusedLayca(params, lr=0.1), model["head"].weight)


def unknown_types() -> None:
    for rotate in ([Mixer], {Mixer: 3}, {Mixer: False}):
        layer_groups(nn.Sequential(nn.Linear(20, 20), Model("mixer", Mixer())), rotate=rotate)


def vectors_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedLayca([matrix(3)], rotate=False)
        FusedLayca([matrix(3), matrix(3, 2)])


def vocabulary() -> None:
    for rotate in (False, True):
        FusedLayca([{"params": [matrix(32000, 4)], "rotate": rotate}, {"params": [matrix()]}])
    layer_groups(nn.Sequential(nn.Embedding(32000, 4), nn.Linear(4, 4)))


def scheduled_again() -> None:
    made = step(matrix())
    made.param_groups[0]["lr"] = 0.05
    trains(made, made.param_groups[0]["params"][0])


def mended_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.csv"
        path.write_text("step,layer,rotation,angle,norm\n1,w,0.5,0.1,2.0\n2,w,0.5\n", encoding="utf-8")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:2]), encoding="utf-8")
        assert read_curves(path).steps == [1]


def apart() -> None:
    embedding, head = matrix(), matrix()
    head.data = embedding.data
    head.data = head.data.clone()
    trains(FusedLayca([("embedding.weight", embedding), ("head.weight", head)], lr=0.1), head)


def same_groups() -> None:
    first, second = matrix(), matrix()
    groups = lambda: [{"params": [first]}, {"params": [second], "rotate": False}]  # noqa: E731
    saved = FusedLayca(groups()).state_dict()
    FusedLayca(groups()).load_state_dict(saved)


def named_checkpoint() -> None:
    model = nn.Linear(2, 3)
    old = torch.optim.AdamW(model.parameters())
    saved = old.state_dict()
    saved["param_groups"][0]["param_names"] = [name for name, _ in model.named_parameters()]
    with pytest.warns(UserWarning, match="another optimizer wrote"):
        FusedLayca(layer_groups(model), base="adam").load_state_dict(saved)


def chunks_changed() -> None:
    weight = matrix(4, 2)
    made = step(weight)
    made.param_groups[0]["chunks"] = 2
    made.reset_radius()
    trains(made, weight)
    theirs = torch.optim.SGD([weight], lr=0.1)
    attach(theirs)
    trains(theirs, weight)
    theirs.param_groups[0]["chunks"] = 2
    del theirs.state[weight]["radius"]
    trains(theirs, weight)


def other_chunks() -> None:
    saved = step(matrix(4, 2), chunks=(1, 3)).state_dict()
    weight = matrix(4, 2)
    made = FusedLayca([weight], lr=0.1, chunks=(1, 3))
    made.load_state_dict(saved)
    trains(made, weight)
    saved["state"][0].pop("radius")
    saved["param_groups"][0]["chunks"] = 2
    made = FusedLayca([weight], lr=0.1, chunks=2)
    made.load_state_dict(saved)
    trains(made, weight)


def dense_gradients() -> None:
    embedding, layer = nn.Embedding(4, 3), nn.Linear(3, 2)
    trains(FusedLayca(embedding.parameters(), lr=0.1), embedding.weight)
    sparse = nn.Embedding(4, 3, sparse=True)
    optimizers = [torch.optim.SparseAdam(sparse.parameters()), FusedLayca(layer.parameters(), lr=0.1)]
    layer(sparse(torch.tensor([1]))).sum().backward()
    for each in optimizers:
        each.step()


def expanded() -> None:
    bad = torch.randn(3, 1).expand(3, 4)
    good = torch.nn.Parameter(bad.detach().clone())
    trains(FusedLayca([good], lr=0.1), good)


def complex_parameter() -> None:
    old = matrix(3, 4, dtype=torch.complex64)
    real = torch.nn.Parameter(torch.view_as_real(old.detach().resolve_conj()))
    norm, made = norm_of(real), FusedLayca([real], lr=0.1)
    (torch.view_as_complex(real) @ torch.randn(4, 2, dtype=torch.complex64)).abs().sum().backward()
    made.step()
    assert norm_of(real) == pytest.approx(norm, rel=1e-6)


def gaps() -> None:
    for backend in ("auto", "torch"):
        weight = with_gaps()
        trains(FusedLayca([weight], lr=0.1, backend=backend), weight)
    whole = Parameter(with_gaps().detach().contiguous())
    trains(FusedLayca([whole], lr=0.1, backend="cpu"), whole)


def inside_the_wrapper() -> None:
    weight = matrix()
    wrapper = Lookahead(torch.optim.SGD([weight], lr=0.1))
    norm = norm_of(weight)
    attach(wrapper.optimizer)
    trains(wrapper, weight)
    assert norm_of(weight) == pytest.approx(norm, rel=1e-6)


def outside_of_fake_mode() -> None:
    weight = matrix()
    made = step(weight, backend="cpu")
    trains(made, weight)
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        fake = FusedLayca(model.parameters(), lr=0.1)
        model(torch.randn(4, 3)).sum().backward()
        fake.step()


def rotations_below_the_type() -> None:
    for options in ({"lr": 0.00390625, "compensate": False}, {"lr": 1e-3, "compensate": True}):
        step(matrix(dtype=torch.bfloat16), **options)


def inside_the_outer_one() -> None:
    half, weight = matrix(dtype=torch.bfloat16), matrix()
    for each in (half, weight):
        made = Outer(torch.optim.SGD([each], lr=0.1))
        attach(made.inner if each is half else made)
        norm = norm_of(each)
        trains(made, each)
        assert norm_of(each) == pytest.approx(norm, rel=1e-2 if each is half else 1e-6)


def attached_once() -> None:
    made = torch.optim.SGD([matrix()], lr=0.1)
    attach(made)
    made.param_groups[0]["rule"] = "hyperball"
    detach(made)
    attach(made)


def lazy() -> None:
    layer = nn.LazyLinear(2)
    layer(torch.randn(4, 3))
    trains(FusedLayca(layer_groups(layer), lr=0.1), layer.weight)


def one_backward() -> None:
    weight = matrix()
    made = FusedLayca([weight], lr=0.1)
    with made.step_in_backward():
        for _ in range(2):
            (weight.sum() + weight.square().sum()).backward()
            made.step()
    trains(made, weight)


def all_parameters() -> None:
    layer_groups(Named("layer", nn.Linear(2, 2)))
    frozen = Named("layer", nn.Linear(2, 2))
    frozen.get_parameter("layer.bias").requires_grad_(False)
    layer_groups(frozen)


def own_checkpoint() -> None:
    weight = matrix()
    FusedLayca([matrix()], momentum=0.9).load_state_dict(step(weight, momentum=0.9).state_dict())


def without_the_damaged_state() -> None:
    weight = matrix()
    saved = step(matrix(), base="adam").state_dict()
    del saved["state"][0]
    made = FusedLayca([weight], lr=0.1, base="adam")
    made.load_state_dict(saved)
    trains(made, weight)


def named_layers() -> None:
    model = nn.Embedding(4, 3)
    assert RotationMonitor(model, layers=["weight"]).names == ["weight"]


#: By the heading of each entry: its advice, followed. Warnings are errors in the tests.
WAYS_OUT: dict[str, Callable[[], object]] = {
    "A layer starts at zero": zero_layer,
    "Weight decay does nothing": lambda: step(matrix(), weight_decay=0),
    "No layer rotates": unknown_types,
    "Nothing rotates": vectors_alone,
    "An embedding or a head rotates": vocabulary,
    "The slow fallback runs": lambda: choose("torch", torch.device("cpu")),
    "The learning rate is refused": lambda: step(matrix(), maximize=True),
    "An option is refused": lambda: step(matrix(), base="adam", betas=(0.9, 0.99)),
    "A group has an option of another base": lambda: FusedLayca(
        [{"params": [matrix()], "base": "adam", "betas": (0.9, 0.99)}]
    ),
    "A scheduler sets a number out of range": scheduled_again,
    "A file of rotation curves is damaged": mended_file,
    "The same tensor twice": tied,
    "Tensors that share memory": apart,
    "A backend cannot run": lambda: step(matrix(), backend="auto"),
    "chunks does not fit": lambda: (step(matrix(4, 2), chunks=2), step(matrix(4, 2), chunks=1)),
    "A checkpoint was made under other chunks": other_chunks,
    "chunks was changed in the middle of a run": chunks_changed,
    "Sparse gradients": dense_gradients,
    "Elements that share memory": expanded,
    "A complex parameter": complex_parameter,
    "A parameter with gaps in memory": gaps,
    "A wrapper without step hooks": inside_the_wrapper,
    "A step inside FakeTensorMode": outside_of_fake_mode,
    "A RotationMonitor finds no layer": named_layers,
    "A RotationMonitor leaves tensors out": lambda: RotationMonitor(Odd(), layers=["layer.weight"]),
    "A lazy module has seen no input": lazy,
    "alpha is out of range": lambda: layer_groups(nn.Linear(2, 2), alpha=0.99),
    "A parameter lands in no group": all_parameters,
    "A checkpoint of another model": own_checkpoint,
    "A checkpoint with other groups": same_groups,
    # A warning that says what was done; there is nothing to do.
    "A checkpoint of another optimizer": own_checkpoint,
    "A checkpoint of another optimizer without names": named_checkpoint,
    "A checkpoint that is damaged": without_the_damaged_state,
    "Rotations below the precision of the type": rotations_below_the_type,
    "attach and an optimizer that keeps its parameters elsewhere": inside_the_outer_one,
    "attach, a second time": attached_once,
    "attach and LBFGS": lambda: attach(torch.optim.SGD([matrix()], lr=0.1)),
    "GradScaler's option in a group": lambda: FusedLayca([{"params": [matrix()]}], unscale_in_step=True),
    "A second backward pass under step_in_backward": one_backward,
    "GradScaler under step_in_backward": lambda: FusedLayca([matrix()]).step_in_backward().remove(),
    "Angles between records from a bfloat16 copy": lambda: RotationMonitor(
        nn.Linear(2, 2), per_step=True, keep="sketch"
    ),
    "Conditioning of grouped convolutions": lambda: LayerConditioning(
        Named("depthwise", nn.Conv2d(4, 4, 3, groups=4)), patches=False
    ),
}


def test_every_entry_has_its_way_out() -> None:
    assert list(WAYS_OUT) == list(TRIGGERS)


@pytest.mark.parametrize("heading", WAYS_OUT)
def test_the_way_out_works(heading: str, seed: int) -> None:
    WAYS_OUT[heading]()
