"""The formulas, once, for every backend that is written in Python.

The torch backend calls these functions as they stand, on tensors. The Triton backend compiles the very same
functions, with ``where`` and ``sqrt`` bound to Triton's (see ``backends/triton_.py``). So they use nothing but
operators, ``where``, ``sqrt`` and each other: no branches, no keyword arguments, no other names.

``csrc/base_steps.h`` and ``csrc/rotation.h`` hold the same formulas for C++ and CUDA; ``reference.py`` states the
algorithm in another way on purpose and is what all of these are tested against.

A base optimizer is two functions of one element:

- ``*_advance(grad, state, options) -> state``: the new state buffers, a tuple;
- ``*_step(grad, state, options) -> u``: the base step from the advanced state. It does not depend on the old
  state, so the rotate pass recomputes it, and no backend stores u.

``options`` is the tuple that :meth:`layca_fast.bases.Base.scalars` makes of a param group.
"""

# The formulas run on tensors, on floats and on Triton's values; no static type covers all three.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from torch import sqrt, where

#: Rows of the coefficient table carry one of these in their last column.
KEEP, LINEAR, PRECISE = 0.0, 1.0, 2.0

#: No direction to turn in below this sine of the angle between weights and step: 4 float32 epsilons.
SMALLEST_SINE = 4 * 2.0**-23

#: Below this squared sine the three dots no longer give sigma to full accuracy: it is measured again.
NEARLY_PARALLEL_SINE2 = 1e-2

#: b as a float32 is exact to rounding, and so is b*u, only well inside float32's range.
SMALLEST_FLOAT32_B, LARGEST_FLOAT32_B = 2.0**-100, 2.0**100


def finite_or_zero(x):
    """x where it is finite, else 0 (Layca paper, appendix A.2.4)."""
    # Not x - x == 0: where x is a product, a compiler may fuse that into the product's rounding error.
    return where(x * 0.0 == 0.0, x, 0.0)


def sgd_advance(grad, state, options):
    return state


def sgd_step(grad, state, options):
    return grad


def sgd_momentum_advance(grad, state, options):
    momentum, fraction = options
    return (momentum * state[0] + fraction * grad,)


def sgd_momentum_step(grad, state, options):
    return state[0]


def sgd_nesterov_step(grad, state, options):
    return grad + options[0] * state[0]


def orthogonal_square(n2, d, q):
    """sigma^2, the squared norm of the part of u that is orthogonal to w, from the three dots."""
    return q - d * (d / n2)


def is_nearly_parallel(sigma2, q):
    """Whether sigma^2 from the dots has lost digits to cancellation.

    Each dot is rounded to float64, so sigma is off by about 1e-16 / sine^2 in proportion: 1e-6 at a sine of 1e-5. A
    backend that can then takes sigma^2 from the elements, as the sum of (u - c*w)^2 with c = d / n2.
    """
    return sigma2 < NEARLY_PARALLEL_SINE2 * q


def coefficients(n2, d, q, sigma2, lr, radius, weight_decay, rotates, current):
    """Three dots in, one linear combination out (Layca, Algorithm 1, in closed form).

    n2 = <w,w>, d = <w,u>, q = <u,u> and sigma2, all float64, of one layer (or tensors of many). ``radius`` is the
    state, 0 while unset; ``rotates`` and ``current`` are booleans. Returns (a, b, c, mode, radius):

    - LINEAR: w+ = a*w + b*u;
    - PRECISE: w+ = a*w + b*(u - c*w) in float64, where a*w and b*u of LINEAR would cancel;
    - KEEP: w+ = w, bit for bit.

    The fifth value is the radius state after this step: set by the first step that moves the layer.
    """
    n = sqrt(n2)
    sigma = sqrt(where(sigma2 > 0.0, sigma2, 0.0))
    # A NaN compares false everywhere below, so a layer with a non-finite dot never moves.
    grow2 = 1.0 + lr * lr
    moves = (
        rotates & (lr > 0.0) & (grow2 * 0.0 == 0.0) & (n2 > 0.0) & (n2 - n2 == 0.0) & (sigma > SMALLEST_SINE * sqrt(q))
    )
    target = where(current | (radius == 0.0), n, radius)
    safe_n = where(moves, n, 1.0)
    safe_sigma = where(moves, sigma, 1.0)
    shrink = target / sqrt(grow2)
    k = shrink / safe_n
    b = -lr * shrink / safe_sigma
    c = d / (safe_n * safe_n)
    # The norm of b*u, in radii, is the sine of the commanded angle over the sine between w and u.
    cancels = is_nearly_parallel(sigma2, q) | (sigma2 * grow2 < lr * lr * q)
    out_of_range = (-b < SMALLEST_FLOAT32_B) | (-b > LARGEST_FLOAT32_B)
    precise = cancels | out_of_range

    # Without rotation: the base step and decoupled decay, w - lr*(u + weight_decay*w). As a float32, the factor
    # 1 - lr*weight_decay would be wrong by the same rounding at every step.
    steps = (lr > 0.0) & ((q > 0.0) | (weight_decay > 0.0))
    a = where(rotates, where(precise, k, k - b * c), 1.0)
    turn = where(moves, where(precise, PRECISE, LINEAR), KEEP)
    plain = where(steps, where(weight_decay > 0.0, PRECISE, LINEAR), KEEP)
    first = moves & (radius == 0.0) & (current == False)  # noqa: E712  (``not`` is no elementwise operator)
    b, c, mode = where(rotates, b, -lr), where(rotates, c, -weight_decay), where(rotates, turn, plain)
    return a, b, c, mode, where(first, n, radius)
