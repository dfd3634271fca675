"""One trial: two optimizers on two backends, and the reference, through random steps with events between them."""

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from layca_fast import FusedLayca
from layca_fast.formulas.bases import FORMULAS
from layca_fast.state.compensation import HALVES, fits

from ..support import copy_of, same_bits
from .before import before_step
from .draw import Draw, draw_groups, laid_out
from .events import BAD_OPTIONS, Both, Party, _like, draw_event
from .expected import Expected, expected_of

#: Steps in a trial at most.
LONGEST = 60


class Disagreement(AssertionError):
    """A step that is not what it must be."""


def _party(groups: list[dict[str, Any]], backend: str, unscales: bool) -> Party:
    ours = [{**group, "params": [Parameter(_like(param)) for param in group["params"]]} for group in groups]
    return Party(FusedLayca(ours, backend=backend, unscale_in_step=unscales), backend)


def _gradient(draw: Draw, param: Tensor, plain: bool) -> Tensor | None:
    """A gradient of one of many kinds; ``plain``: of ordinary size, where eps is too small for others."""
    kind = draw.choose.random()
    if kind < 0.08:
        return None
    value = draw.normal(tuple(param.shape))
    if kind < 0.12:
        value = torch.zeros_like(value)
    elif kind < 0.16:
        value = param.detach().double() + draw.choose.choice((0.0, 1e-9, 1e-5, 1e-2)) * value
    elif kind < 0.20 and not plain:
        value *= draw.choose.choice((1e-4,) if param.dtype == torch.float16 else (1e-12, 1e-6, 1e6))
    elif kind < 0.25 and value.numel():
        bad = draw.choose.choice((float("nan"), float("inf"), -float("inf")))
        value.view(-1)[draw.choose.randrange(value.numel())] = bad
    elif kind < 0.30:
        # Where much is zero, moments are zero, too.
        value = torch.where(value > 0, value, 0.0)
    return value.to(param.dtype)


def _reached(name: str, *values: Any) -> tuple[Any, ...]:
    """Radii that layers have: what the others will be may change with the group, before a step."""
    return tuple(value.clamp(min=0.0) for value in values) if name == "radius" else values


class Trial:
    """``run()`` yields once after each step; raises :class:`Disagreement`, or whatever a step or an event raised."""

    def __init__(self, seed: int, number: int, formulas: Collection[str] = tuple(FORMULAS)) -> None:
        self.draw = Draw(seed, number, formulas=formulas)
        self.log: list[str] = []
        self.tally: Counter[str] = Counter()
        draw = self.draw
        self.unscales = draw.chance(0.1)
        # Which gradient is the first, the state alone can tell there: not if it was zero.
        draw.dampens = not self.unscales
        groups = draw_groups(draw)
        names = draw.choose.choice((("cpu", "torch"), ("torch", "cpu")))
        # A tensor that the cpu backend does not take as it lies takes the torch backend under "auto".
        names = tuple("auto" if name == "cpu" else name for name in names)
        self.both: Both = tuple(_party(groups, name, self.unscales) for name in names)  # type: ignore[assignment]
        self.threads = draw.choose.choice((1, 1, 2, 3))
        for group in groups:
            shapes = [(tuple(p.shape), str(p.dtype), tuple(p.stride())) for p in group["params"]]
            self.log.append(f"group {shapes} { ({k: v for k, v in group.items() if k != 'params'}) }")

    def run(self) -> Iterator[None]:
        torch.manual_seed(self.draw.choose.getrandbits(60))
        torch.set_num_threads(self.threads)
        for _ in range(self.draw.choose.randrange(1, LONGEST)):
            while self.draw.chance(0.35):
                event = draw_event(self.draw)
                self.log.append(event.__name__)
                event(self.draw, self.both)
            if self.draw.chance(0.03):
                self._refuse()
            self._step()
            yield

    def _set_gradients(self) -> None:
        draw = self.draw
        other = draw.chance(0.1)
        for twins in zip(*(party.params for party in self.both), strict=True):
            first = twins[0]
            plain = other or first.dtype == torch.float16
            grad = _gradient(draw, first, plain) if first.requires_grad else None
            layout = draw.choose.choice(("as it is", "as it is", "plain", "transposed", "strided"))
            wide = first.dtype in HALVES and draw.chance(0.1)
            for param in twins:
                param.grad_dtype = None
                if grad is None:
                    param.grad = None
                    continue
                mine = torch.empty_like(param.detach()).copy_(grad) if layout == "as it is" else laid_out(grad, layout)
                param.grad = mine.float() if wide else mine

    def _refuse(self) -> None:
        """A step that cannot be taken raises, and changes nothing."""
        name = self.draw.choose.choice(list(BAD_OPTIONS))
        self.log.append(f"refused {name}")
        for party in self.both:
            group = self.draw.choose.choice(party.groups)
            kept = group[name]
            before = self._contents(party)
            group[name] = BAD_OPTIONS[name]
            try:
                party.optimizer.step()
            except (TypeError, ValueError):
                pass
            else:
                raise Disagreement(f"{name}={BAD_OPTIONS[name]!r} was not refused")
            group[name] = kept
            if not same_bits(self._contents(party), before):
                raise Disagreement(f"the step that {name}={BAD_OPTIONS[name]!r} refused has modified something")

    def _contents(self, party: Party) -> list[Any]:
        state = party.optimizer.state
        return [copy_of([param, param.grad, dict(state.get(param, {}))]) for param in party.params]

    def _skips(self) -> tuple[float, bool]:
        """Under unscale_in_step: the loss scale, and whether the step is to be skipped."""
        scale, skips = self.draw.choose.choice((1.0, 8.0, 1024.0)), self.draw.chance(0.2)
        for party in self.both:
            party.optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            party.optimizer.found_inf = torch.tensor(float(skips))  # type: ignore[attr-defined]
        return scale, skips

    def _step(self) -> None:
        self._set_gradients()
        scale, skips = self._skips() if self.unscales else (1.0, False)
        first = self.both[0]
        befores = [self._contents(party) for party in self.both]
        expected: list[Expected | None] = []
        state = first.optimizer.state
        for group in first.groups:
            for param in group["params"]:
                if param.grad is None or skips or param.numel() == 0:
                    expected.append(None)
                    continue
                entry = state.get(param, {})
                # A remainder that the group no longer asks for is dropped before the step, not after it.
                whole = fits(entry.get("remainder"), param, group)
                weight = first.optimizer.effective_weight(param) if whole else param
                before = before_step(param, weight, entry, group)
                grad = param.grad.to(before.compute_dtype) / scale
                expected.append(expected_of(before, grad, self.tally))
        self.log.append(f"step {[None if p.grad is None else p.grad.flatten()[:3].tolist() for p in first.params]}")
        for party in self.both:
            party.optimizer.step()
        for party, before in zip(self.both, befores, strict=True):
            self._check(party, before, expected, skips)
        self._align()

    def _check(self, party: Party, before: list[Any], expected: list[Expected | None], skips: bool) -> None:
        after = self._contents(party)
        for index, (old, new, asked) in enumerate(zip(before, after, expected, strict=True)):
            param = party.params[index]
            where = f"backend={party.backend!r}, tensor {index} {tuple(param.shape)} {param.dtype}"
            if not same_bits(old[1], new[1]):
                raise Disagreement(f"{where}: the gradient was modified")
            if asked is None:
                if not same_bits(old[0], new[0]):
                    raise Disagreement(f"{where}: moved without a step")
                kept = {name: new[2][name] for name in old[2] if name in new[2]}
                counted = {"step"} if param.numel() == 0 and not skips else set()
                moved = [n for n in kept if n not in counted and not self._is_kept(*_reached(n, old[2][n], kept[n]))]
                if moved and (param.grad is None or skips):
                    raise Disagreement(f"{where}: {moved} changed without a step")
                continue
            entry = party.optimizer.state[param]
            complaint = asked.complain(party.optimizer.effective_weight(param), entry)
            if complaint is not None:
                raise Disagreement(f"{where}: {complaint}")
            if float(asked.before.group["lr"]) == 0.0 and not same_bits(old[0], new[0]):
                raise Disagreement(f"{where}: moved at lr=0")

    @staticmethod
    def _is_kept(old: Any, new: Any) -> bool:
        """The same numbers: where the memory of a parameter changed, its state is laid out anew."""
        return (
            bool(torch.equal(old.view(torch.int16), new.view(torch.int16)))
            if old.dtype in HALVES
            else bool(torch.equal(old.nan_to_num(), new.nan_to_num()))
        )

    def _align(self) -> None:
        """Both agree within rounding: from here on they start from the same bits again."""
        first, second = self.both
        for ours, theirs in zip(first.params, second.params, strict=True):
            state, other = first.optimizer.state.get(ours, {}), second.optimizer.state.get(theirs, {})
            if list(state) != list(other):
                raise Disagreement(f"states {list(state)} and {list(other)}")
            with torch.no_grad():
                theirs.copy_(ours)
                for name, value in state.items():
                    if (value.dtype, value.shape) != (other[name].dtype, other[name].shape):
                        raise Disagreement(f"{name}: {value.dtype} {value.shape} and {other[name].dtype}")
                    other[name].copy_(value)
        if self.draw.chance(0.1):
            self._compare_counts()

    def _compare_counts(self) -> None:
        stats = [party.optimizer.rotation_stats() for party in self.both]
        for ours, theirs in zip(*(party.params for party in self.both), strict=True):
            if (ours in stats[0]) != (theirs in stats[1]):
                raise Disagreement("one backend has statistics of a tensor, the other has none")
            if ours not in stats[0]:
                continue
            for name in ("broken",):
                left, right = (getattr(stats[i][each], name).tolist() for i, each in enumerate((ours, theirs)))
                if left != right:
                    raise Disagreement(f"counts of {name}: {left} and {right}")
