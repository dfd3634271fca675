"""Which group of a checkpoint a parameter belongs to: by its name, where both sides know one.

``layer_groups`` sets layers aside that are all zero. Made again on trained weights it does not, so the groups of a
resumed run may be others than those that were saved. torch compares numbers of groups and parameters, and then goes by
positions.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..messages import labelled
from .layout import is_vector
from .members import rotates
from .radii import has_radii_ahead
from .sharding import local_of

Group = Mapping[str, Any]

_CAUSE = (
    "layer_groups keeps layers that are all zero, such as the last of a residual branch at first, from rotating, and "
    "made again on trained weights it does not. Make the groups before the weights are loaded, or put these parameters "
    "where they were by hand (rotate=False)"
)


def _names(group: Group) -> list[str] | None:
    """The names of all parameters of a group, if it knows them."""
    names = group.get("param_names")
    return None if names is None or len(names) != len(group["params"]) else [str(name) for name in names]


def _all_names(groups: Sequence[Group]) -> list[list[str]] | None:
    """Those of each group, if all know theirs and each name stands for one parameter."""
    found = [_names(group) for group in groups]
    known = [names for names in found if names is not None]
    is_one_each = max(Counter(chain.from_iterable(known)).values(), default=1) == 1
    return known if len(known) == len(found) and is_one_each else None


def _check_numbers(ours: Sequence[Group], theirs: Sequence[Group]) -> None:
    """Raise ValueError where torch would, and say what differs."""
    sizes, saved = ([len(group["params"]) for group in groups] for groups in (ours, theirs))
    if sizes == saved:
        return
    start = f"state_dict: its groups hold {saved} parameters, those of this optimizer {sizes}"
    here, there = _all_names(ours), _all_names(theirs)
    if here is None or there is None:
        raise ValueError(f"{start}: make the same groups as for the run that was saved. {_CAUSE}")
    lacking = [name for name in chain(*here) if name not in set(chain(*there))]
    unknown = [name for name in chain(*there) if name not in set(chain(*here))]
    raise ValueError(
        f"{start}: it lacks {lacking}, and {unknown} are not in this optimizer. Load it into an optimizer of the same "
        "trainable parameters"
    )


def _regrouped(optimizer: Optimizer, theirs: Sequence[Group]) -> list[dict[str, Any]] | None:
    """The parameters of ``optimizer`` in the groups of a checkpoint, where names say that these are others."""
    here, there = _all_names(optimizer.param_groups), _all_names(theirs)
    if here is None or there is None or here == there or set(chain(*here)) != set(chain(*there)):
        return None
    owners = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    params = dict(zip(chain(*here), owners, strict=True))
    # torch takes everything but the parameters from the saved groups.
    return [
        {**group, "params": [params[name] for name in names], "param_names": names}
        for group, names in zip(theirs, there, strict=True)
    ]


def _turned(state: Any) -> bool | None:
    """Whether the tensor of a saved state rotated; None where the state does not tell."""
    if not isinstance(state, Mapping) or not state:
        return None
    return isinstance(state.get("radius"), Tensor)


def _waiting(group: Group) -> Any:
    """The norm from which on layers of a group rotate, which is also the one that a function gives."""
    norm = group.get("joins_at", 0.0)
    return True if callable(norm) or isinstance(norm, str) else norm


def _misnamed(ours: Group, theirs: Group, labels: Sequence[str], state: Mapping[Any, Any]) -> list[str]:
    """Labels of parameters that were not in the group that gives ``ours`` its options, by the names that it saved."""
    names, saved = _names(ours), theirs.get("param_names")
    if names is None or saved is None or set(names) == set(saved):
        return []
    if _waiting(ours) != _waiting(theirs) and set(names) & set(saved):
        return [f"parameter {name!r}" for name in sorted(set(names) & set(saved))]
    if not set(names).issuperset(saved):
        return [f"parameter {name!r}" for name in sorted(set(names) ^ set(saved))]
    # More than the saved group had: that of several stages of a pipeline, if all of them did the same.
    turned = [isinstance(state.get(key, {}).get("radius"), Tensor) for key in theirs["params"]]
    rotate = {"rotate": theirs.get("rotate")}
    if "rotate" not in theirs or turned == [rotates(param, rotate) for param in ours["params"]]:
        return []
    counts: Counter[str] = Counter(saved)
    times = [counts[name] for name in names]
    if max(times) > 1:
        # A full state dict overlays lists element by element.
        return [label for label, count in zip(labels, times, strict=True) if count != 1]
    # Which of them have moved is told by numbers only: most have not.
    sides = [[label for label, count in zip(labels, times, strict=True) if count == each] for each in (0, 1)]
    return min(sides, key=len) if len(sides[0]) != len(sides[1]) else [*sides[0], *sides[1]]


def _mixed(ours: Group, theirs: Group, labels: Sequence[str], state: Mapping[Any, Any]) -> list[str]:
    """Labels of parameters that did not turn when others of their group did: all matrices of a group do, or none."""
    told = [
        (label, _turned(state.get(key)))
        for label, key, param in zip(labels, theirs["params"], ours["params"], strict=True)
        if ours.get("rotate") is True or not is_vector(param)
    ]
    has, lacks = ([label for label, turned in told if turned is each] for each in (True, False))
    return (has if ours.get("rotate") is False else lacks) if has and lacks else []


def _left_waiting(theirs: Group, labels: Sequence[str], state: Mapping[Any, Any]) -> list[str]:
    """Labels of parameters with layers that wait to join the sphere, if their group does not say for what."""
    if has_radii_ahead(theirs):
        return []
    radii = [(label, state.get(key, {}).get("radius")) for label, key in zip(labels, theirs["params"], strict=True)]
    return [label for label, radius in radii if isinstance(radius, Tensor) and bool((local_of(radius) < 0).any())]


def _check_split(optimizer: Optimizer, saved: Mapping[str, Any], defaults: Group) -> None:
    """Raise ValueError where torch.distributed.checkpoint has merged groups that this optimizer holds otherwise.

    It shares the saved state out by name, over the groups of the optimizer, and gives each of these the options of a
    saved group that one of its parameters was in.
    """
    everyone = {name for group in optimizer.param_groups for name in _names(group) or ()}
    odd: list[str] = []
    labels: dict[int, list[str]] = {id(group): [] for group in optimizer.param_groups}
    for group, label, _ in labelled(optimizer.param_groups):
        labels[id(group)].append(label)
    for ours, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if not everyone.issuperset(theirs.get("param_names") or ()):
            # Renamed since, or wrapped: names say nothing.
            theirs = {name: value for name, value in theirs.items() if name != "param_names"}
        odd += _misnamed(ours, theirs, labels[id(ours)], saved["state"])
        odd += _left_waiting({**defaults, **theirs}, labels[id(ours)], saved["state"])
        odd += _mixed(ours, theirs, labels[id(ours)], saved["state"])
    if odd:
        raise ValueError(
            f"state_dict: the groups of {', '.join(dict.fromkeys(odd))} are not those that were saved, so whether it "
            f"rotates, and its other options, would change. {_CAUSE}"
        )


def follow_groups(
    optimizer: Optimizer, saved: dict[str, Any], defaults: Group | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The groups that ``optimizer`` should have to load ``saved``, and what it should load. Modifies nothing.

    ``defaults``: the options of groups that say nothing.

    Raises ValueError, naming parameters and cause, where a parameter would silently get the options of another group.
    """
    ours, theirs = optimizer.param_groups, saved["param_groups"]
    if any(isinstance(key, str) for group in theirs for key in group["params"]):
        # From torch.distributed.checkpoint: by names of its own, in our groups if there is state to share out.
        _check_numbers(ours, theirs)
        _check_split(optimizer, saved, defaults or {})
        names = [_names(group) for group in ours]
        kept = [{**g, "param_names": known} if known else g for g, known in zip(theirs, names, strict=True)]
        return ours, {**saved, "param_groups": kept}
    groups = _regrouped(optimizer, theirs)
    if groups is None:
        _check_numbers(ours, theirs)
        return ours, saved
    return groups, saved
