"""Bases whose direction is no function of single elements, but of whole matrices: one more stage before *measure*.

    advance (elementwise) -> direct (whole matrices) -> measure -> coefficients -> rotate

Both ends are the kernels that every base runs. *Advance* is a plain step, of rate 1 and without decay, of weights that
are zero: it advances the state and leaves minus the base step, what the direction is made of, where these weights were.
*Direct* replaces that by minus the direction, in stacks of matrices of one shape. The rest is plain SGD, of which that
is the gradient, to be maximized. So rules, remainders, statistics, loss scales and graphs know nothing of directions.
"""

from collections import ChainMap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formulas.bases import BASES, Formula
from ..formulas.direction import Direction
from ..state.compensation import HALVES
from ..state.cut import by_layer
from ..state.slot import Slot
from .batch import Batch
from .scratch import Scratch
from .stacks import Run, Stack, stacks_of
from .unscaling import LossScale

if TYPE_CHECKING:
    from .backend import Backend

#: Elements of the tensors that share a batch, and of the matrices that share a stack, by type of device: what all that
#: is not matrix products needs to be fast, and on the CPU few enough for a cache. Larger tensors and matrices have one
#: of their own.
WINDOW = {"cpu": 2**24}
STACK = {"cpu": 2**18}
ELSEWHERE = 2**26

#: Elements between tensors that begin where vectors may.
ALIGNMENT = 64

_SGD = BASES["sgd"]

#: What groups say to the two halves of a step.
_ADVANCES: Mapping[str, Any] = {"lr": 1.0, "weight_decay": 0.0}
_FOLLOWS: Mapping[str, Any] = {"base": "sgd", "maximize": True, **_SGD.options}


def window_limit(device: torch.device) -> int:
    """How many elements the tensors of a window have on ``device``."""
    return WINDOW.get(device.type, ELSEWHERE)


def stack_size(device: torch.device, rows: int, columns: int) -> int:
    """How many matrices of so many rows and columns share a stack on ``device``.

    On the CPU a batched product gives each to a thread: there is one for every thread, if a window has room for them.
    """
    elements = max(1, rows * columns)
    fitting = max(1, STACK.get(device.type, ELSEWHERE) // elements)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(fitting, threads) if threads * elements <= window_limit(device) else fitting


def batches_of(formula: Formula, slots: Sequence[Slot], tile: int, scratch: Scratch) -> Iterator[Batch]:
    """The batches for ``slots``: one, or where matrices have directions one for each window of tensors."""
    if formula.direct is None:
        yield Batch(formula, slots, tile)
        return
    limit = window_limit(slots[0].param.device)
    window: list[Slot] = []
    filled = 0
    # Matrices of one shape come together, the largest first: they say how much memory is taken.
    for slot in sorted(slots, key=lambda slot: sorted(_sides(slot), reverse=True), reverse=True):
        if window and filled + slot.param.numel() > limit:
            yield Directed(formula, window, tile, scratch)
            window, filled = [], 0
        window.append(slot)
        filled += slot.param.numel()
    yield Directed(formula, window, tile, scratch)


def _sides(slot: Slot) -> tuple[int, int]:
    """The rows and columns of the matrices of a slot."""
    rows, *others = slot.param.shape[slot.param.dim() - slot.layer_dims :]
    stacked = prod(slot.param.shape[: slot.param.dim() - slot.layer_dims])
    return rows * stacked // slot.layers, prod(others)


def _carve(memory: Tensor, slots: Sequence[Slot], offsets: Sequence[int]) -> list[Tensor]:
    """A tensor of ``memory`` for each slot, that lies as its parameter does, or without gaps where that has some."""
    found = []
    for slot, offset in zip(slots, offsets, strict=True):
        param = slot.param
        part = memory[offset : offset + param.numel()]
        found.append(part.as_strided(param.shape, param.stride()) if slot.dense else part.view(param.shape))
    return found


class _Advancing(Batch):
    """The first half of the step, on gradients of ``given_dtype``, in which most of them come."""

    def __init__(self, formula: Formula, slots: Sequence[Slot], tile: int, given_dtype: torch.dtype) -> None:
        super().__init__(formula, slots, tile)
        self._given_dtype = given_dtype

    def take_gradients(self) -> None:
        if self._given_dtype == self.dtype:
            super().take_gradients()
            return
        given = [slot.owner.grad for slot in self.slots]
        as_given = all(grad is None or grad.dtype == self._given_dtype for grad in given)
        self.grad_dtype = self._given_dtype if as_given else self.compute_dtype
        self.grads = [slot.gradient(self.grad_dtype) for slot in self.slots]


class Directed(Batch):
    """A batch whose gradients are directions: its step makes them first, before the kernels run as for plain SGD.

    The steps of all batches of one scratch and ``place`` lie in the same memory, so each is to be finished before the
    next begins. ``is_shared``: other processes have parts of its matrices, and an exchange with them makes the
    directions, of :attr:`steps` and in their place, between :meth:`advance` and *measure*.
    """

    def __init__(
        self,
        formula: Formula,
        slots: Sequence[Slot],
        tile: int,
        scratch: Scratch,
        *,
        place: int = 0,
        is_shared: bool = False,
    ) -> None:
        groups = {id(slot.group): slot.group for slot in slots}
        # One for each group, as the tables have rows for each.
        advances: dict[int, Any] = {key: ChainMap(dict(_ADVANCES), each) for key, each in groups.items()}  # type: ignore[arg-type]
        follows: dict[int, Any] = {key: ChainMap(dict(_FOLLOWS), each) for key, each in groups.items()}  # type: ignore[arg-type]
        turning = [replace(slot, group=follows[id(slot.group)], base=_SGD, states=(), step=None) for slot in slots]
        super().__init__(_SGD.formula(_SGD.options), turning, tile)
        self._formula, self._scratch, self._is_shared = formula, scratch, is_shared
        self._given = list(slots)
        aligned = [-(-slot.param.numel() // ALIGNMENT) * ALIGNMENT for slot in slots]
        *offsets, total = accumulate(aligned, initial=0)
        self._memory = scratch.take(f"steps {place}", total, self.compute_dtype, self.device)
        #: What directions are made of, and then these, for each slot: as its parameter lies.
        self.steps = _carve(self._memory, slots, offsets)
        #: The kernels know gradients and states of 16 bits beside parameters of 16 bits only: there a step is first a
        #: bfloat16 and its remainder, which are a float32.
        self._halves: Tensor | None = None
        blanks: list[Tensor] = self.steps
        remainders: Sequence[Tensor | None] = [None] * len(slots)
        if self.dtype in HALVES:
            self._halves = scratch.take("halves", 2 * total, torch.bfloat16, self.device).view(2, total)
            blanks, remainders = (_carve(half, slots, offsets) for half in self._halves)
        advancing = [
            replace(
                slot,
                param=blank,
                remainder=rest,
                whole=slot.owner,
                group=advances[id(slot.group)],
                radius=None,
            )
            for slot, blank, rest in zip(slots, blanks, remainders, strict=True)
        ]
        self.advancing = _Advancing(formula, advancing, tile, self.dtype)
        # What did not count there is to be told of the tensor.
        self.advancing.counts = self.counts
        self._stacks: list[Stack] = []
        self._made_for: Hashable = None
        self._recorded: Hashable = None

    @property
    def given(self) -> list[Slot]:
        return self._given

    @property
    def given_grads(self) -> list[Tensor | None]:
        return self.advancing.grads

    @property
    def given_grad_dtype(self) -> torch.dtype:
        return self.advancing.grad_dtype

    def holds(self) -> bool:
        return super().holds() and self.advancing.holds()

    def look(self) -> bool:
        return self.holds()

    def take_gradients(self) -> None:
        self.advancing.take_gradients()
        self.grad_dtype = self.compute_dtype
        given = zip(self.advancing.grads, self.steps, strict=True)
        self.grads = [None if grad is None else step for grad, step in given]

    def check_capture(self) -> None:
        super().check_capture()
        self.advancing.check_capture()

    def sync_hyperparameters(self) -> None:
        super().sync_hyperparameters()
        self.advancing.sync_hyperparameters()

    def are_recorded(self) -> bool:
        return super().are_recorded() and self.advancing.are_recorded() and self._recorded in (None, self._settings())

    def refresh(
        self, loss_scale: LossScale | None = None, capturing: bool = False, edition: object | None = None
    ) -> None:
        self.advancing.refresh(loss_scale, capturing, edition)
        # The steps know of no scale, but that there may be none.
        super().refresh(None if loss_scale is None else LossScale(None, loss_scale.found_inf), capturing, edition)
        if capturing:
            self._recorded = self._settings()

    def release(self) -> None:
        super().release()
        self.advancing.release()

    def directions(self, device: torch.device | None = None) -> dict[int, Direction]:
        """What makes the directions of each group, as it says now; on ``device``, if not where the tensors are."""
        assert self._formula.direct is not None
        device = device or self.device
        groups = {id(slot.group): slot.group for slot in self._given}
        return {key: self._formula.direct(each, self.dtype, device) for key, each in groups.items()}

    def _settings(self) -> Hashable:
        return tuple(self.directions().values())

    @property
    def is_one_call(self) -> bool:
        return False

    @property
    def is_delicate(self) -> bool:
        # Between its halves Python looks for signals.
        return True

    def make_room(self, backend: "Backend") -> None:
        super().make_room(backend)
        backend.reserve(self.advancing)
        if self._is_shared:
            return
        present = tuple(grad is not None for grad in self.grads)
        directions = self.directions()
        wanted = present, tuple(directions.values())
        if wanted != self._made_for:
            self._stacks, self._made_for = self._make_stacks(directions, present), wanted

    def call(self, backend: "Backend") -> Callable[[], object]:
        advance, turn = backend.call(self.advancing), super().call(backend)

        def step() -> None:
            self._direct(advance)
            turn()

        return step

    def _direct(self, advance: Callable[[], object]) -> None:
        """Advance the state, and make the directions."""
        if not self._stacks:
            return
        self._advance(advance)
        for stack in self._stacks:
            stack.run(self.advancing.dots)

    def _advance(self, advance: Callable[[], object]) -> None:
        (self._memory if self._halves is None else self._halves).zero_()
        advance()
        if self._halves is not None:
            upper, lower = self._halves.view(torch.int16)
            self._memory.view(torch.int32).copy_(upper).bitwise_left_shift_(16).add_(lower)

    def advance(self, backend: "Backend") -> None:
        self._advance(backend.call(self.advancing))

    def _make_stacks(self, directions: Mapping[int, Direction], present: Sequence[bool]) -> list[Stack]:
        runs: list[tuple[tuple[int, int], Run]] = []
        for slot, step, first, here in zip(self._given, self.steps, self.first_layers, present, strict=True):
            if not here or step.numel() == 0:
                continue
            rows, columns = _sides(slot)
            direction = directions[id(slot.group)]
            run = Run(
                by_layer(step, slot.layers, slot.layer_dims),
                first,
                direction,
                rows > columns,
                direction.gain(rows, columns),
            )
            runs.append(((rows, columns), run))
        return stacks_of(runs, partial(stack_size, self.device), self._scratch, self._home)
