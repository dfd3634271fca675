"""The pure-PyTorch backend: runs wherever torch does, and needs nothing else."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..formulas.base_steps import finite_or_zero
from ..formulas.rotation import KEEP, LINEAR, PRECISE, coefficients, is_nearly_parallel, orthogonal_square
from ..formulas.tables import Coefficient, Column, Count, Flag, Hyper
from ..state.compensation import join, split
from ..state.layout import memory_order, scalar_device
from ..state.slot import Slot
from ..step.backend import Backend
from ..step.batch import Batch

#: Sums run over rows of this length first: torch's own full reductions split by the number of threads, so their bits
#: depend on it; sums along rows do not.
ROW = 1024


def row_sums(x: Tensor) -> Tensor:
    """The sum of each row of ``x`` (rows, n), in an order that depends on n alone: (rows,)."""
    rows, n = x.shape
    while n > ROW:
        whole = n // ROW * ROW
        sums = x[:, :whole].reshape(rows, -1, ROW).sum(2)
        x = sums if whole == n else torch.cat((sums, x[:, whole:].sum(1, keepdim=True)), 1)
        n = x.shape[1]
    return x.sum(1)


def cleaned(x: Tensor, clean: Callable[[Tensor], Tensor] = finite_or_zero) -> Tensor:
    """``clean(x)``; ``x`` itself where it can be seen, without waiting, that this changes nothing."""
    # A sum of squares takes a tenth of the time of cleaning. Where it overflows for less, that only costs this time.
    if x.device.type == "cpu" and math.isfinite(torch.dot(x.reshape(-1), x.reshape(-1)).item()):
        return x
    return clean(x)


def restarted(
    states: tuple[Tensor, ...], grad: Tensor, are_squares: tuple[bool, ...], stored: torch.dtype
) -> tuple[Tensor, ...]:
    """The advanced states of elements; where one is not finite, all of the element as its first gradient makes them.

    They go together: a mean without its mean square, or 0 in the place of one, would make any step. ``stored``: the
    type that they are kept in.
    """
    if all(cleaned(state) is state for state in states):
        return states
    are_good = torch.stack([state * 0.0 == 0.0 for state in states]).all(0)
    square = finite_or_zero((grad * grad).to(stored).to(grad.dtype))
    pairs = zip(states, are_squares, strict=True)
    return tuple(torch.where(are_good, state, square if is_square else 0.0) for state, is_square in pairs)


def layer_matrix(tensor: Tensor, slot: Slot) -> Tensor:
    """A tensor of ``slot`` as (layers, elements of one layer) where the dots live: a view if memory allows it."""
    matrix = memory_order(tensor).view(slot.layers, -1) if slot.dense else tensor.reshape(slot.layers, -1)
    return matrix.to(scalar_device(tensor.device))


def store(tensor: Tensor, matrix: Tensor) -> None:
    """Write a matrix of ``layer_matrix`` back to ``tensor``; nothing to do where it is a view of it."""
    if matrix.data_ptr() != tensor.data_ptr():
        tensor.copy_(matrix.view(tensor.shape))


class Blocks:
    """One slot as matrices of layers, walked in blocks small enough that float64 copies of them stay in cache."""

    def __init__(self, batch: Batch, index: int, tile: int) -> None:
        self.slot: Slot = batch.slots[index]
        self.formula = batch.formula
        count = 0.0 if self.slot.step is None else self.slot.step.to(scalar_device(batch.device)).double()
        options: tuple[float | Tensor, ...] = batch.options(self.slot)
        #: What the gradient is multiplied by: a float, or a 0-d tensor on the device.
        self.scale: float | Tensor = -1.0 if self.slot.group["maximize"] else 1.0
        row = batch.hyper_row(index)
        if row is not None:
            self.scale, options = row[Hyper.GRAD_SCALE], row[Hyper.OPTION :][: len(options)].unbind()
        self.options = self.formula.prepare(count, options)
        self._taken = None if batch.taken is None else batch.taken != 0
        grad = batch.grads[index]
        assert grad is not None
        self.grad = layer_matrix(grad, self.slot)
        self._param = layer_matrix(self.slot.param, self.slot)
        remainder = self.slot.remainder
        self._remainder = None if remainder is None else layer_matrix(remainder, self.slot)
        self._type, self._state_type = batch.compute_dtype, batch.state_dtype
        self.states = [layer_matrix(state, self.slot) for state in self.slot.states]
        self._tile = tile

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        layers, length = self._param.shape
        height = max(1, self._tile // length)
        for row in range(0, layers, height):
            for column in range(0, length, self._tile):
                yield slice(row, row + height), slice(column, column + self._tile)

    def _raw_gradient(self, block: tuple[slice, slice]) -> Tensor:
        grad = self.grad[block].to(self._type)
        as_it_is = isinstance(self.scale, float) and self.scale == 1
        return grad if as_it_is else self.scale * grad

    def _state(self, block: tuple[slice, slice]) -> tuple[Tensor, ...]:
        return tuple(state[block].to(self._type) for state in self.states)

    def _weight(self, block: tuple[slice, slice]) -> Tensor:
        if self._remainder is None:
            return self._param[block].to(self._type)
        return join(self._param[block], self._remainder[block])

    def _store_weight(self, block: tuple[slice, slice], weight: Tensor, keep: Tensor | None) -> None:
        """Write the weights of a block, except where ``keep``: there, not even the bits of a NaN may change."""
        if self._remainder is None:
            pairs = [(self._param[block], weight.to(self._param.dtype))]
        else:
            param, remainder = split(weight, self._param.dtype)
            # As integers, raw bits are sure to arrive as they are.
            pairs = [(self._param[block], param), (self._remainder[block], remainder)]
            pairs = [(old.view(torch.int16), new.view(torch.int16)) for old, new in pairs]
        for old, new in pairs:
            old.copy_(new if keep is None else torch.where(keep, old, new))

    def _admitted(self, grad: Tensor) -> Tensor:
        return cleaned(grad, self.formula.admit)

    def measure(self, dots: Tensor, bad: Tensor) -> None:
        """Advance the states; write the slot's rows of dots (layers, 3) and of non-finite counts (layers,)."""
        dots.zero_()
        for block in self:
            raw = self._raw_gradient(block)
            grad = self._admitted(raw)
            advanced = self.formula.advance(grad, self._state(block), self.options)
            # The step is made of the states as they are stored: rotate will have nothing else.
            advanced = tuple(state.to(self._state_type).to(self._type) for state in advanced)
            states = restarted(advanced, grad, self.formula.are_squares, self._state_type)
            step = self.formula.step(grad, states, self.options)
            for state, value in zip(self.states, states, strict=True):
                state[block] = value if self._taken is None else torch.where(self._taken, value, state[block])
            clean = cleaned(step)
            suspects = zip((raw, *advanced, step), (grad, *states, clean), strict=True)
            changed = [before != after for before, after in suspects if before is not after]
            if changed:
                found = torch.stack(changed).any(0).sum(1)
                bad[block[0]] += found if self._taken is None else self._taken * found
            w, u = self._weight(block).double(), clean.double()
            dots[block[0]] += torch.stack([row_sums(w * w), row_sums(w * u), row_sums(u * u)], 1)
        if self._taken is not None:
            # As for a tensor without a gradient.
            dots.copy_(torch.where(self._taken, dots, 0.0))
        for state, matrix in zip(self.slot.states, self.states, strict=True):
            store(state, matrix)

    def _step_again(self, block: tuple[slice, slice]) -> Tensor:
        """The base step of a block once more, from the states that measure left."""
        grad = self._admitted(self._raw_gradient(block)) if self.formula.reads_grad else None
        return cleaned(self.formula.step(grad, self._state(block), self.options))

    def orthogonal_square(self, c: Tensor) -> Tensor:
        """The sum of (u - c*w)^2 of each layer, from the elements, (layers,) float64; ``c`` is (layers, 1)."""
        sums = c.new_zeros(len(c))
        for block in self:
            difference = self._step_again(block).double() - c[block[0]] * self._weight(block).double()
            sums[block[0]] += row_sums(difference * difference)
        return sums

    def rotate(self, table: Tensor) -> None:
        """Apply the slot's rows of coefficients (layers, 4) to its weights."""
        for rows, columns in self:
            modes = table[rows, Coefficient.MODE :]
            # On the CPU the modes can be read; elsewhere that would make the host wait, so every form is computed.
            present = set(modes.flatten().tolist()) if modes.device.type == "cpu" else {KEEP, LINEAR, PRECISE}
            if present == {KEEP}:
                continue
            u = self._step_again((rows, columns))
            w = self._weight((rows, columns))
            a, b, c, _ = table[rows].unsqueeze(2).unbind(1)
            rotated = w
            if PRECISE in present:
                precise = a * w.double() + b * (u.double() - c * w.double())
                rotated = torch.where(modes == PRECISE, precise.to(w.dtype), rotated)
            if LINEAR in present:
                linear = a.to(w.dtype) * w + b.to(w.dtype) * u
                rotated = linear if present == {LINEAR} else torch.where(modes == LINEAR, linear, rotated)
            self._store_weight((rows, columns), rotated, modes == KEEP if KEEP in present else None)
        store(self.slot.param, self._param)
        if self.slot.remainder is not None and self._remainder is not None:
            store(self.slot.remainder, self._remainder)


class TorchBackend(Backend):
    """Torch operations, one tensor at a time; float64 copies are made block by block."""

    name = "torch"
    tile = 2**17
    needs_dense = False
    writes_unseen = False

    def missing(self) -> str | None:
        return None

    def refuses(self, device: torch.device) -> str | None:
        return None

    def _blocks(self, batch: Batch) -> Iterator[tuple[slice, Blocks]]:
        for index, (slot, first) in enumerate(zip(batch.slots, batch.first_layers, strict=True)):
            if batch.grads[index] is not None and slot.param.numel() > 0:
                yield slice(first, first + slot.layers), Blocks(batch, index, self.tile)

    def measure(self, batch: Batch) -> None:
        batch.dots.zero_()
        for slot, grad in zip(batch.slots, batch.grads, strict=True):
            if slot.step is not None and grad is not None and grad.numel() > 0:
                slot.step += 1 if batch.taken is None else batch.taken
        for rows, blocks in self._blocks(batch):
            blocks.measure(batch.dots[rows], batch.counts[rows, Count.NON_FINITE])

    def coefficients(self, batch: Batch) -> None:
        tensors = batch.tensors[batch.layer_tensors]
        hypers = batch.hypers[tensors[:, Column.HYPER]]
        rotates = tensors[:, Column.FLAGS] & Flag.ROTATES != 0
        current = tensors[:, Column.FLAGS] & Flag.CURRENT != 0
        waits = tensors[:, Column.FLAGS] & Flag.WAITS != 0
        here = tensors[:, Column.FLAGS] & Flag.PART == 0
        rule, noise = tensors[:, Column.RULE], hypers[:, Hyper.NOISE]
        has_grad = tensors[:, Column.GRAD] != 0
        lr, weight_decay = hypers[:, Hyper.LR], hypers[:, Hyper.WEIGHT_DECAY]
        radii = [slot.radius for slot in batch.slots]
        before = torch.cat(
            [
                batch.dots.new_zeros(slot.layers) if radius is None else radius.to(batch.dots.device)
                for slot, radius in zip(batch.slots, radii, strict=True)
            ]
        )
        n2, d, q = batch.dots.unbind(1)
        sigma2 = orthogonal_square(n2, d, q)
        if sigma2.device.type == "cpu":
            # Elsewhere, to know whether there is anything to measure again, the host would have to wait.
            self._measure_again(batch, sigma2, rotates & here & is_nearly_parallel(sigma2, q))
        flags = rotates, current, waits
        *abc, mode, after = coefficients(n2, d, q, sigma2, lr, before, weight_decay, *flags, rule, noise)
        mode = torch.where(has_grad, mode, KEEP)
        torch.stack([*abc, mode], 1, out=batch.coefficients)
        for radius, value in zip(radii, after.split([slot.layers for slot in batch.slots]), strict=True):
            if radius is not None:
                radius.copy_(value)
        stuck = rotates & has_grad & (lr > 0) & (mode == KEEP)
        finite = n2 - n2 == 0
        batch.counts[:, Count.NO_DIRECTION] += stuck & finite
        batch.counts[:, Count.BROKEN] += rotates & has_grad & ~finite

    def _measure_again(self, batch: Batch, sigma2: Tensor, nearly_parallel: Tensor) -> None:
        if bool(nearly_parallel.any()):
            c = (batch.dots[:, 1] / batch.dots[:, 0]).unsqueeze(1)
            for rows, blocks in self._blocks(batch):
                if bool(nearly_parallel[rows].any()):
                    again = blocks.orthogonal_square(c[rows])
                    sigma2[rows] = torch.where(nearly_parallel[rows], again, sigma2[rows])

    def rotate(self, batch: Batch) -> None:
        for rows, blocks in self._blocks(batch):
            blocks.rotate(batch.coefficients[rows])


BACKEND = TorchBackend()
