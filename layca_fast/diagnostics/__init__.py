"""What the papers around Layca measure of a training: convergence, conditioning, refinement, noise, propagation.

None of these changes the training that it watches: weights, gradients, buffers and random states stay bit for bit what
they would be. Each says what it costs.
"""

from .conditioning import LayerCondition, LayerConditioning
from .convergence import convergence_rate, convergence_rates, snapshot
from .noise import gradient_covariance, noise_scale
from .propagation import NormRatios, norm_propagation
from .refinement import IterativeRefinement, Refinement
from .spectrum import Spectrum

__all__ = [
    "IterativeRefinement",
    "LayerCondition",
    "LayerConditioning",
    "NormRatios",
    "Refinement",
    "Spectrum",
    "convergence_rate",
    "convergence_rates",
    "gradient_covariance",
    "noise_scale",
    "norm_propagation",
    "snapshot",
]
