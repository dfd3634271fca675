"""The part of a step that processes take together: layers of which each has a part, in windows of bounded memory.

    advance -> exchange of matrices that have directions -> measure -> sum over processes -> coefficients -> rotate

All layers without such directions are in the first window. Matrices fill as many as they need: the memory of one
window is the next one's. A window has one sum, and one exchange there and back, along each dimension of the mesh.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from ..formulas.bases import Formula
from ..state.reduction import Groups, home_of
from ..state.runner import Choose
from ..state.slot import Slot
from ..state.spread import Spread
from .backend import Backend
from .batch import Batch
from .directions import Directed, window_limit
from .distributed import SharedDots
from .exchange import Exchange, exchanges_of
from .learned_radius import LearnedRadii
from .scratch import Scratch
from .taking import Pair
from .unscaling import LossScale

#: A window of so many of the largest matrices for each process: fewer could not be shared out evenly.
MATRICES = 2


@dataclass
class _Window:
    pairs: list[Pair] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    dots: SharedDots | None = None


def _windows(kinds: Sequence[tuple[Formula, Sequence[Slot]]], spreads: Mapping[int, Spread]) -> dict[int, int]:
    """The window of each tensor whose matrices have directions, by its number.

    It follows from what all who share a tensor know: the shapes of all tensors that the same processes share.
    """
    domains: dict[Hashable, dict[int, int]] = {}
    limits: dict[Hashable, int] = {}
    for formula, slots in kinds:
        if formula.direct is None:
            continue
        for slot in slots:
            spread = spreads[slot.number]
            device = slot.param.device
            direction = formula.direct(slot.group, slot.param.dtype, home_of(device, spread.groups))
            key: Hashable = spread.groups, device, slot.param.dtype, direction.dtype
            domains.setdefault(key, {})[slot.number] = -(-spread.numel // prod(spread.sizes))
            largest = MATRICES * spread.largest
            limits[key] = max(limits.get(key, window_limit(device)), largest)
    found: dict[int, int] = {}
    for domain, counts in domains.items():
        numbers = sorted(counts, key=lambda number: (-spreads[number].largest, number))
        found.update(zip(numbers, fill([counts[number] for number in numbers], limits[domain]), strict=True))
    return found


def fill(counts: Sequence[int], limit: int) -> Iterator[int]:
    """The window of each tensor, of so many elements on a process: at most ``limit`` in one, or one tensor."""
    window, filled = 0, 0
    for count in counts:
        if filled and filled + count > limit:
            window, filled = window + 1, 0
        filled += count
        yield window


class Together:
    """All batches of ``kinds``, slots of layers of which other processes have parts.

    ``layout``: (number of layers here, groups) of each of their tensors, by the number that slots have; ``spreads``:
    how those lie whose matrices have directions.
    """

    def __init__(
        self,
        kinds: Sequence[tuple[Backend, Formula, Sequence[Slot]]],
        layout: Sequence[tuple[int, Groups]],
        spreads: Mapping[int, Spread],
        scratch: Scratch,
    ) -> None:
        self._layout = layout
        window_of = _windows([(formula, slots) for _, formula, slots in kinds], spreads)
        self._windows = [_Window() for _ in range(max(window_of.values(), default=0) + 1)]
        directed: list[list[Directed]] = [[] for _ in self._windows]
        for backend, formula, slots in kinds:
            if formula.direct is None:
                self._windows[0].pairs.append((backend, Batch(formula, slots, backend.tile)))
                continue
            for number, window in enumerate(self._windows):
                part = [slot for slot in slots if window_of[slot.number] == number]
                if part:
                    # All batches of a window have steps at one time.
                    place = len(directed[number])
                    batch = Directed(formula, part, backend.tile, scratch, place=place, is_shared=True)
                    window.pairs.append((backend, batch))
                    directed[number].append(batch)
        for window, batches in zip(self._windows, directed, strict=True):
            window.exchanges = exchanges_of(batches, spreads, scratch)

    @property
    def pairs(self) -> Iterator[Pair]:
        """Every batch, with its backend."""
        for window in self._windows:
            yield from window.pairs

    def share(self, choose: Choose[Backend], learned: Mapping[Batch, LearnedRadii]) -> None:
        """Make what sums dots over processes, once it is known which radii are ``learned``."""
        for window in self._windows:
            batches = [batch for _, batch in window.pairs]
            if not batches:
                continue
            here = {slot.number for batch in batches for slot in batch.slots}
            layout = [(layers if i in here else 0, groups) for i, (layers, groups) in enumerate(self._layout)]
            # The torch backend takes whatever a shard without elements or gradient is.
            window.dots = SharedDots(layout, batches, choose("torch", batches[0].device), learned)

    def holds(self) -> bool:
        """Whether matrices still travel as they did when this was made."""
        return all(exchange.holds() for window in self._windows for exchange in window.exchanges)

    def make_room(self) -> None:
        """Before anything is modified: take the memory that exchanges need."""
        for window in self._windows:
            for exchange in window.exchanges:
                exchange.make_room()

    def take(self, loss_scale: LossScale | None, capturing: bool, settle: Callable[[Backend, Batch], None]) -> None:
        """Step every batch, and settle those that were begun, also where something raises.

        Raises RuntimeError, which says so, where some windows have been stepped and another could not.
        """
        for number, window in enumerate(self._windows):
            try:
                self._take(window, loss_scale, capturing, settle)
            except Exception as error:
                if number == 0:
                    raise
                raise RuntimeError(
                    f"the step failed half-way: {number} of {len(self._windows)} windows of shared layers have taken "
                    "it, and the next may have taken a part of it, so that a second try would step them twice. Go on "
                    f"from a checkpoint. What failed: {type(error).__name__}: {error}"
                ) from error

    def _take(
        self,
        window: _Window,
        loss_scale: LossScale | None,
        capturing: bool,
        settle: Callable[[Backend, Batch], None],
    ) -> None:
        begun = 0
        try:
            for backend, batch in window.pairs:
                begun += 1
                batch.advance(backend)
            for exchange in window.exchanges:
                exchange.run()
            for backend, batch in window.pairs:
                backend.measure(batch)
                if batch.learned is not None:
                    batch.learned.measure(backend)
            if window.dots is not None:
                window.dots.add_up(loss_scale, capturing)
            for backend, batch in window.pairs:
                backend.coefficients(batch)
                if batch.learned is not None:
                    batch.learned.turn()
                backend.rotate(batch)
            if window.dots is not None:
                window.dots.turn_still()
        finally:
            # Who has waited for others may be interrupted, and stop.
            for backend, batch in window.pairs[:begun]:
                settle(backend, batch)
