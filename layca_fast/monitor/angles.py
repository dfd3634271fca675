"""Angles between layers and copies of them, from sums over their elements."""

import math

import torch
from torch import Tensor

from ..formulas.rotation import orthogonal_square


def angle_between(dots: Tensor, squares: Tensor) -> Tensor:
    """Radians between weights and copies of each layer: (layers,) float64, NaN where either is zero or not finite.

    ``dots``: <w,w>, <w,v>, <v,v>, (layers, 3). ``squares``: <v,v> when v was copied, in which what is not finite shows.
    """
    n2, d, q = dots.unbind(1)
    angle = torch.atan2(orthogonal_square(n2, d, q).clamp(min=0.0).sqrt(), d / n2.sqrt())
    sound = (n2 > 0) & (n2 < math.inf) & (q > 0) & (q < math.inf) & (squares > 0) & (squares < math.inf)
    return torch.where(sound, angle, math.nan)
