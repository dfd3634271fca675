"""radius="learned": the norm of a layer follows the radial part of its gradient, beside the rotation.

The layer turns by exactly the same angle as on a fixed sphere. Its radius takes a step of its own,

    R <- R exp(-min(radius_lr * lr, 1) * c),    c = <w, g> / (|w| |g|),

with g the gradient of this step and c the cosine between weights and gradient. Where the network does not depend on the
scale of a layer, <w, g> is 0 (Euler's theorem on homogeneous functions) and its radius stays.

Not the radial part of the base step, of which the three dots would know: an average over steps goes on pointing to
where the radius should have gone before, so such radii run away, and a step that was divided element by element has a
radial part where the gradient has none.

The two dots that this takes are those of plain SGD, whose step is the gradient: its kernels measure them in one more
pass over weights and gradients. All the rest is arithmetic on tables of layers, on the device, for every backend alike.
"""

from collections import ChainMap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..formulas.bases import BASES
from ..formulas.options import waits
from ..formulas.rotation import KEEP
from ..formulas.tables import Coefficient, Hyper
from ..state.slot import Slot
from .backend import Backend
from .batch import Batch
from .unscaling import LossScale

_SGD = BASES["sgd"]

#: A radius changes by a factor of e per step at most, whatever radius_lr and lr are.
LARGEST_RATE = 1.0

#: What groups say to the kernels that measure the gradient.
_GRADIENT: Mapping[str, Any] = {"base": "sgd", **_SGD.options}


def learns(slot: Slot) -> bool:
    """Whether the radii of a slot are learned."""
    return slot.radius is not None and slot.group["radius"] == "learned"


class LearnedRadii:
    """The learned radii of a batch: what is measured of its gradients, and the step of the radii."""

    def __init__(self, batch: Batch) -> None:
        self._all = batch
        slots = batch.given
        #: The slots of the batch that these are, in its order.
        self.indices = [i for i, slot in enumerate(batch.slots) if learns(slot)]
        groups = {id(slots[i].group): slots[i].group for i in self.indices}
        # One for each group, as the tables have rows for each.
        plain: dict[int, Any] = {
            key: ChainMap(dict(_GRADIENT), each)  # type: ignore[arg-type]
            for key, each in groups.items()
        }
        measured = [
            replace(slots[i], group=plain[id(slots[i].group)], base=_SGD, states=(), step=None, fresh=False, entry={})
            for i in self.indices
        ]
        self.batch = Batch(_SGD.formula(_SGD.options), measured, batch.tile)
        rows = [
            row for i in self.indices for row in range(batch.first_layers[i], batch.first_layers[i] + slots[i].layers)
        ]
        #: Their layers among those of the batch.
        self.rows = torch.tensor(rows, dtype=torch.int64, device=batch.dots.device)
        hyper_rows = [batch.hyperparameters.first_rows[i] for i in self.indices for _ in range(batch.slots[i].layers)]
        self._hyper_rows = torch.tensor(hyper_rows, dtype=torch.int64, device=batch.dots.device)

    def refresh(self, loss_scale: LossScale | None, capturing: bool) -> None:
        """As :meth:`Batch.refresh`, once the batch has taken its gradients."""
        given = self._all.given_grads
        self.batch.grads = [given[i] for i in self.indices]
        self.batch.grad_dtype = self._all.given_grad_dtype
        self.batch.refresh(loss_scale, capturing)

    def measure(self, backend: Backend) -> None:
        """Write the dots of weights and gradients. ``backend`` is the batch's."""
        # Of a tensor without a gradient, kernels leave what was there.
        self.batch.dots.zero_()
        backend.measure(self.batch)
        # Nothing rotates this batch: views of the parameters would last until the next step.
        self.batch.kept = None

    def factors(self, rates: Tensor | None = None) -> Tensor:
        """What each radius is to be multiplied by, (layers,) float64, once the dots of both batches are complete.

        ``rates``: the learning rates of all rows of the table of hyperparameters, None for those that it holds.
        """
        n2 = self._all.dots.index_select(0, self.rows)[:, 0]
        _, radial, square = self.batch.dots.unbind(1)
        cosine = radial / (n2.sqrt() * square.sqrt())
        cosine = torch.where(cosine.isfinite(), cosine, 0.0).clamp(-1.0, 1.0)
        rates = self._all.hypers[:, Hyper.LR] if rates is None else rates
        rate = (self._all.hypers[:, Hyper.RADIUS_LR] * rates).index_select(0, self._hyper_rows).clamp(max=LARGEST_RATE)
        return torch.exp(-rate * cosine)

    def all_factors(self, rates: Tensor | None = None) -> Tensor:
        """:meth:`factors` among those of all layers of the batch, 1 for those that do not learn: (layers,)."""
        factors = torch.ones_like(self._all.dots[:, 0])
        return factors.index_copy_(0, self.rows, self.factors(rates))

    def last_factors(self) -> Tensor:
        """What the last step has multiplied the radii of all layers of the batch by: (layers,)."""
        factors = self.all_factors(self._all.hyperparameters.last_rates)
        return _of_moving(self._all, factors)

    def step(self, backend: Backend) -> None:
        """The step of the batch and of its radii, once both have been refreshed."""
        backend.measure(self._all)
        self.measure(backend)
        backend.coefficients(self._all)
        self.turn()
        backend.rotate(self._all)

    def turn(self) -> None:
        """After *coefficients*: multiply radii, and the norms that *rotate* will give, where a layer moves."""
        scale_moving(self._all, self.all_factors())


def _of_moving(batch: Batch, factors: Tensor) -> Tensor:
    """``factors`` as new ones, 1 for what this step keeps as it is and for what waits to join the sphere."""
    factors = torch.where(batch.coefficients[:, Coefficient.MODE] == KEEP, 1.0, factors)
    for slot, first in zip(batch.slots, batch.first_layers, strict=True):
        if slot.radius is not None and waits(slot.group):
            ours = factors[first : first + slot.layers]
            ours.copy_(torch.where(slot.radius < 0, 1.0, ours))
    return factors


def scale_moving(batch: Batch, factors: Tensor) -> None:
    """Multiply the radii of layers that move, and the norms that their coefficients lead to: both in place.

    ``factors``: (layers,). Radii that are not learned stay.
    """
    factors = _of_moving(batch, factors)
    # The new weights are linear in a and b, in every mode.
    batch.coefficients[:, Coefficient.A : Coefficient.B + 1].mul_(factors.unsqueeze(1))
    parts = factors.split([slot.layers for slot in batch.slots])
    for slot, part in zip(batch.slots, parts, strict=True):
        if slot.radius is not None and learns(slot):
            slot.radius.mul_(part)


def learned_radii(batches: Iterable[Batch]) -> dict[Batch, LearnedRadii]:
    """Those of the batches that have some, which know them from now on."""
    found = {batch: LearnedRadii(batch) for batch in batches if any(map(learns, batch.slots))}
    for batch, learned in found.items():
        batch.learned = learned
    return found
