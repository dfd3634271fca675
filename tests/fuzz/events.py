"""What happens between two steps of a trial: each event does the same to both optimizers, or must change nothing."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.formulas.bases import BASES
from layca_fast.state.compensation import HALVES

from .draw import LAYOUTS, Draw, draw_base, draw_options, draw_parameter, draw_rate, laid_out

#: A bad value for an option, and what refuses it.
BAD_OPTIONS: dict[str, Any] = {
    "lr": -1.0,
    "rule": "nothing",
    "chunks": 0,
    "radius": "other",
    "weight_decay": float("nan"),
    "backend": "abacus",
    "state_dtype": torch.float64,
    "rotate": "perhaps",
    "base": "sdg",
}


@dataclass
class Party:
    """One of the two optimizers that are compared."""

    optimizer: FusedLayca
    backend: str

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def params(self) -> list[Parameter]:
        return [param for group in self.groups for param in group["params"]]


Both = tuple[Party, Party]


def _index(draw: Draw, both: Both) -> int:
    return draw.choose.randrange(len(both[0].params))


def _group_index(draw: Draw, both: Both) -> int:
    return draw.choose.randrange(len(both[0].groups))


def set_rate(draw: Draw, both: Both) -> None:
    index, rate, as_tensor = _group_index(draw, both), draw_rate(draw), draw.chance(0.2)
    for party in both:
        party.groups[index]["lr"] = torch.tensor(rate, dtype=torch.float64) if as_tensor else rate


def set_option(draw: Draw, both: Both) -> None:
    index = _group_index(draw, both)
    options = draw_options(draw, both[0].groups[index]["params"])
    # Other chunks need other radii, and other types of states lose what the old ones held.
    name = draw.choose.choice(("rule", "rotate", "radius", "weight_decay", "maximize", "compensate"))
    for party in both:
        party.groups[index][name] = options[name]
        if name == "radius":
            # A layer that waits takes no radius that is given.
            party.groups[index]["joins_at"] = options["joins_at"]


def set_own_options(draw: Draw, both: Both) -> None:
    """Of the same base."""
    index = _group_index(draw, both)
    new = draw_base(draw, both[0].groups[index]["params"], both[0].groups[index]["chunks"])
    for party in both:
        group = party.groups[index]
        if group["base"] == new["base"]:
            group.update({**BASES[new["base"]].options, **new})


def set_base(draw: Draw, both: Both) -> None:
    """Another base begins anew."""
    index = _group_index(draw, both)
    new = draw_base(draw, both[0].groups[index]["params"], both[0].groups[index]["chunks"])
    for party in both:
        group = party.groups[index]
        if group["base"] == new["base"]:
            continue
        for name in BASES[group["base"]].options:
            group.pop(name, None)
        group.update({**BASES[new["base"]].options, **new})
        for param in group["params"]:
            entry = party.optimizer.state.pop(param, {})
            party.optimizer.state[param] = {name: entry[name] for name in ("radius", "remainder") if name in entry}


def swap_backends(draw: Draw, both: Both) -> None:
    for party, backend in zip(both, [both[1].backend, both[0].backend], strict=True):
        party.backend = backend
        for group in party.groups:
            group["backend"] = backend


def reset_radius(draw: Draw, both: Both) -> None:
    for party in both:
        party.optimizer.reset_radius()


def forget_state(draw: Draw, both: Both) -> None:
    index = _index(draw, both)
    for party in both:
        party.optimizer.state.pop(party.params[index], None)


def move(draw: Draw, both: Both) -> None:
    """Other memory under a parameter, which may lie in another order of dimensions."""
    index, layout = _index(draw, both), draw.choose.choice(LAYOUTS)
    for party in both:
        param = party.params[index]
        param.grad = None
        param.data = laid_out(param.data, layout)


def scale_weights(draw: Draw, both: Both) -> None:
    index, factor = _index(draw, both), draw.choose.choice((0.5, 2.0, -1.0, 0.3))
    for party in both:
        with torch.no_grad():
            party.params[index].mul_(factor)


def freeze(draw: Draw, both: Both) -> None:
    index = _index(draw, both)
    for party in both:
        param = party.params[index]
        param.grad = None
        param.requires_grad_(not param.requires_grad)


def add_group(draw: Draw, both: Both) -> None:
    if len(both[0].groups) >= 5:
        return
    param = draw_parameter(draw)
    options = draw_options(draw, [param])
    for party in both:
        twin = Parameter(_like(param))
        party.optimizer.add_param_group({"params": [twin], **options, "backend": party.backend})


def _like(tensor: Tensor) -> Tensor:
    """A copy with the same strides, gaps included."""
    memory = (
        torch.zeros_like(tensor)
        if tensor.is_contiguous()
        else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    )
    return memory.copy_(tensor.detach())


def _remade(party: Party, loaded: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A new optimizer over the same parameters, which goes on from the old one's state_dict."""
    old = party.optimizer
    groups = [{"params": group["params"], "base": group["base"], "lr": 0.7} for group in old.param_groups]
    new = FusedLayca(groups, unscale_in_step=old._unscales, backend=party.backend)
    new.load_state_dict(loaded(old.state_dict()))
    party.optimizer = new


def load(draw: Draw, both: Both) -> None:
    through_file = draw.chance(0.3)

    def loaded(saved: dict[str, Any]) -> dict[str, Any]:
        if not through_file:
            return saved
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    for party in both:
        _remade(party, loaded)


def copy_all(draw: Draw, both: Both) -> None:
    by_pickle = draw.chance(0.5)
    for party in both:
        party.optimizer = pickle.loads(pickle.dumps(party.optimizer)) if by_pickle else copy.deepcopy(party.optimizer)


def break_weight(draw: Draw, both: Both) -> None:
    """Somebody writes a number that is not finite: the layer stays as it is until somebody mends it."""
    index, value = _index(draw, both), draw.choose.choice((float("nan"), float("inf")))
    if both[0].params[index].numel() == 0:
        return
    for party in both:
        with torch.no_grad():
            party.params[index][(0,) * party.params[index].dim()] = value


def mend_weight(draw: Draw, both: Both) -> None:
    for party in both:
        for param in party.params:
            with torch.no_grad():
                param.copy_(torch.where(param.isfinite(), param, 1.0))
            # What a broken weight has left of its remainder completes another one.
            entry = party.optimizer.state.get(param, {})
            if param.dtype in HALVES and "remainder" in entry:
                entry["remainder"].zero_()


EVENTS: tuple[tuple[Callable[[Draw, Both], None], float], ...] = (
    *((set_rate, 8), (set_option, 6), (set_own_options, 4), (set_base, 2), (swap_backends, 3), (reset_radius, 2)),
    *((forget_state, 1), (move, 3), (scale_weights, 3), (freeze, 2), (add_group, 1), (load, 3), (copy_all, 2)),
    *((break_weight, 0.3), (mend_weight, 1)),
)


def draw_event(draw: Draw) -> Callable[[Draw, Both], None]:
    return draw.choose.choices([event for event, _ in EVENTS], [weight for _, weight in EVENTS])[0]
