"""The part of FusedLayca that takes no step: what param groups accept, and how state is saved, loaded and read."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..formulas.bases import Base, recommended_rate, scaled_rate
from ..formulas.chunks import as_tuples
from ..formulas.options import COMMON_OPTIONS, check_group, find_base, misspelt
from ..formulas.plain import with_plain
from ..messages import labelled, warn_caller
from .checks import check_matrices, check_new, check_parameter, check_writable
from .effective import effective_weight
from .entries import drop_empty, with_all_entries
from .loading import Loading
from .others import Names, unread
from .radii import without_functions
from .structure import check_saved


class Grouped(Optimizer):
    """Param groups with the options of a base, and the state of their parameters."""

    #: Whether lr=None was asked for, so that groups get the rate of their own base.
    _lr_is_recommended: bool
    #: Whether groups or state may have changed since the last step.
    _stale: bool
    _warned_of_keys: bool

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as any torch optimizer does; the group's own options are checked before it is added.

        A group without an lr of its own takes the optimizer's, times the group's ``lr_factor`` if it has one (a finite
        number >= 0; :func:`layca_fast.layer_groups` sets it). Keys that are no option of its base are kept, numbers and
        arrays of numpy among them as Python's own.
        Where some groups name their parameters and others do not, those get the names "group.index".
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict with the key 'params', not a {type(param_group).__name__}")
        given = with_plain(param_group)
        if "params" not in given:
            raise ValueError(f"param_group has no 'params', only {sorted(map(str, given))}: name its parameters there")
        if "unscale_in_step" in given:
            raise ValueError("unscale_in_step is no option of a group: GradScaler asks the optimizer; set it there")
        if not isinstance(given["params"], (Tensor, set)):
            given["params"] = list(given["params"])
        base = find_base(given.get("base", self.defaults["base"]))
        group = {**self._options_of(base), **given}
        group.update({name: as_tuples(group[name]) for name in ("chunks", "chunk_names")})
        if group["lr"] is None or ("lr" not in given and self._lr_is_recommended):
            group["lr"] = recommended_rate(base, group)
        check_group(group)
        if given.get("lr") is None and "lr_factor" in given:
            group["lr"] = scaled_rate(group["lr"], given["lr_factor"])
        self._warn_of_keys(base, given)
        keys = set(group)
        before = len(self.param_groups)
        check_new(group, self.param_groups)
        names = Names(group, self.param_groups)
        super().add_param_group(group)
        names.give_back()
        added = self.param_groups[before]
        for name in self.defaults.keys() - keys:
            del added[name]
        try:
            for owner, label, param in labelled(self.param_groups):
                if owner is added:
                    check_parameter(param, label)
                    check_matrices(param, group, label)
                    check_writable(param, label)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        names.number_others()
        self._stale = True
        self._follow_groups()

    def _follow_groups(self) -> None:
        """Called when a group was added."""

    def _warn_of_keys(self, base: Base, given: Mapping[str, Any]) -> None:
        for message in (misspelt(given), None if self._warned_of_keys else unread(base, given)):
            if message is not None:
                self._warned_of_keys = True
                warn_caller(message)

    def _options_of(self, base: Base) -> dict[str, Any]:
        """What a group under ``base`` holds unless it says otherwise: base options of another base are not for it."""
        ours = find_base(self.defaults["base"]).options
        common = {name: self.defaults[name] for name in COMMON_OPTIONS}
        inherited = {name: self.defaults[name] for name in ours} if base.options is ours else dict(base.options)
        return {**common, **inherited}

    def state_dict(self) -> dict[str, Any]:
        """As of any torch optimizer. Trainable parameters without state have an empty entry where others have state.

        Where a group has a function (``radius``, ``joins_at``), the text "function" stands in its place.
        """
        saved = with_all_entries(self, super().state_dict())
        return {**saved, "param_groups": [without_functions(with_plain(group)) for group in saved["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; every state tensor keeps its dtype and is copied.

        Of a checkpoint that another optimizer wrote, such as torch.optim.SGD, only the state is taken, with a warning;
        hyperparameters stay, and radii are taken from the weights at the next step. Raises ValueError, before anything
        is modified, if groups or shapes do not fit.

        Parameters go by their names where both sides know them, and follow the checkpoint into its groups: a layer that
        was all zero when ``layer_groups`` was called, and set aside, stays aside. Functions in groups (``radius``,
        ``joins_at``) stay those of this optimizer.
        """
        check_saved(state_dict)
        with Loading(self, self._check_saved) as loading:
            super().load_state_dict(state_dict)
        if loading.is_foreign:
            warnings.warn(
                "state_dict: another optimizer wrote this checkpoint. Its state is taken over; hyperparameters stay as "
                "they are, and radii are taken from the weights at the next step",
                stacklevel=2,
            )

    def _check_saved(self, group: Mapping[str, Any]) -> None:
        base = find_base(group.get("base", self.defaults["base"]))
        check_group({**self._options_of(base), **with_plain(group)})

    def reset_radius(self) -> None:
        """Forget every layer's radius, after surgery on the weights: the next step that moves a layer sets it anew.

        To the layer's norm, or to what its group gives: ``radius`` as a number or a function. Where the group has
        ``joins_at``, a layer whose norm is below that waits again.
        """
        for state in self.state.values():
            state.pop("radius", None)
        drop_empty(self.state)
        self._stale = True

    def effective_weight(self, param: Tensor) -> Tensor:
        """The float32 weight that a 16-bit ``param`` and its remainder stand for; without one, a copy of ``param``.

        A new tensor of the parameter's shape: what export to float32 should take. Where somebody else has written to
        the parameter, its old remainder counts until ``del optimizer.state[param]["remainder"]``: the weight is within
        half an ulp of what was written. A remainder of another type than the parameter's now is does not count.
        """
        return effective_weight(param, self.state.get(param, {}))
