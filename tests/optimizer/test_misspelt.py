"""What is nearly an option, or nearly the parameters, is asked about or guessed."""

import pytest
import torch
from torch.nn import Parameter

from layca_fast import FusedLayca, detach, layer_groups

from ..support import parameter


@pytest.mark.parametrize(
    ("key", "meant"), [("momentun", "momentum"), ("weigth_decay", "weight_decay"), ("rotat", "rotate")]
)
def test_a_misspelt_key_of_a_group_is_asked_about(key: str, meant: str) -> None:
    with pytest.warns(UserWarning, match=f"{key}=0 is kept in the param group.*did you mean '{meant}'"):
        FusedLayca([{"params": [Parameter(torch.ones(2, 2))], key: 0}])
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        layer_groups(torch.nn.Linear(2, 2), **{key: 0})


def test_keys_that_schedulers_and_others_use_are_no_mistakes() -> None:
    keys = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "lr_scale", "lr_mult", "swa_lr", "fused")
    FusedLayca([{"params": [Parameter(torch.ones(2, 2))], **dict.fromkeys(keys, 0)}])


def test_a_module_in_the_place_of_its_parameters() -> None:
    with pytest.raises(TypeError, match=r"params is a module, Linear: pass its parameters, model\.parameters\(\)"):
        FusedLayca(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing is attached"):
        detach(torch.nn.Linear(2, 2))


def test_a_misspelt_option_is_guessed(seed: int) -> None:
    """In a group it is a warning, as its keys may be the user's own."""
    with pytest.raises(TypeError, match=r"beckend='cpu' is no option of base='sgd' \(did you mean 'backend'\?\)"):
        FusedLayca([parameter(2, 3)], 0.1, beckend="cpu")
