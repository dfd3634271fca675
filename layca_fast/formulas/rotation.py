"""The rotation, once, for every backend that is written in Python: from three dots to the coefficients of a layer.

Written as ``base_steps.py`` is, for tensors and for Triton: nothing but operators, ``where``, ``sqrt`` and each other.
``csrc/rotation.h`` holds the same formulas for C++ and CUDA.

A rule is one function of three dots, ``rule(n, d, q, sigma, lr) -> (along, across)``: the direction of the new weights
in the plane of weights and step. See :func:`coefficients`.
"""

# The formulas run on tensors, on floats and on Triton's values; no static type covers all three.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from torch import sqrt, where

#: Rows of the coefficient table carry one of these in their last column.
KEEP, LINEAR, PRECISE = 0.0, 1.0, 2.0

#: Numbers of the rules, as the tensor table has them.
LAYCA, HYPERBALL = 0, 1
RULES = {"layca": LAYCA, "hyperball": HYPERBALL}

#: No direction to turn in below this sine of the angle between weights and step: 4 float32 epsilons.
SMALLEST_SINE = 4 * 2.0**-23

#: A layer whose norm has fallen below this part of its radius was set to zero: what is left of it, the remainders of
#: 16-bit weights, has no direction worth restoring, and no float32 factor that would.
SMALLEST_SHARE = 2.0**-100

#: Below this squared sine the three dots no longer give sigma to full accuracy: it is measured again.
NEARLY_PARALLEL_SINE2 = 1e-2

#: b as a float32 is exact to rounding, and so is b*u, only well inside float32's range.
SMALLEST_FLOAT32_B, LARGEST_FLOAT32_B = 2.0**-100, 2.0**100


def layca(n, d, q, sigma, lr):
    """Turn by atan(lr) (arXiv 1806.01603, Algorithm 1)."""
    return 1.0, lr


def hyperball(n, d, q, sigma, lr):
    """Go lr norms along the step, then back to the sphere (arXiv 2606.16899): w - lr*n*u/|u|, scaled to the radius.

    With phi the angle between w and u, d = n |u| cos(phi) and sigma = |u| sin(phi), so in units of n the end lies
    1 - lr*cos(phi) along w and lr*sin(phi) across it: the step turns by atan2 of these.
    """
    step_norm = sqrt(q)
    return 1.0 - lr * (d / (n * step_norm)), lr * (sigma / step_norm)


def rotation(rule, n, d, q, sigma, lr):
    """(along, across) under the rule of this number."""
    along, across = hyperball(n, d, q, sigma, lr)
    default = layca(n, d, q, sigma, lr)
    return where(rule == HYPERBALL, along, default[0]), where(rule == HYPERBALL, across, default[1])


def orthogonal_square(n2, d, q):
    """sigma^2, the squared norm of the part of u that is orthogonal to w, from the three dots."""
    return q - d * (d / n2)


def is_nearly_parallel(sigma2, q):
    """Whether sigma^2 from the dots has lost digits to cancellation.

    Each dot is rounded to float64, so sigma is off by about 1e-16 / sine^2 in proportion: 1e-6 at a sine of 1e-5. A
    backend that can then takes sigma^2 from the elements, as the sum of (u - c*w)^2 with c = d / n2.
    """
    return sigma2 < NEARLY_PARALLEL_SINE2 * q


def coefficients(n2, d, q, sigma2, lr, radius, weight_decay, rotates, current, waits, rule, noise):
    """Three dots in, one linear combination out (the paper's Algorithm 1, in closed form).

    n2 = <w,w>, d = <w,u>, q = <u,u> and sigma2, all float64, of one layer (or tensors of many). ``radius`` is the
    state, 0 while unset; ``rotates``, ``current`` and ``waits`` are booleans, ``rule`` is a number. ``noise`` is what
    may be wrong with u, as a part of the norm of w: a sigma below it is no direction. A radius of -R is one that the
    layer has yet to reach: its first turn leads onto the sphere of R; or, with ``waits``, onto that of its own norm,
    before which it takes plain steps for as long as its norm is below R. Returns (a, b, c, mode, radius):

    - LINEAR: w+ = a*w + b*u;
    - PRECISE: w+ = a*w + b*(u - c*w) in float64, where a*w and b*u of LINEAR would cancel;
    - KEEP: w+ = w, bit for bit.

    The fifth value is the radius state after this step: set by the first step that moves the layer.

    With c = d/n2, u - c*w is the part of u orthogonal to w, of norm sigma. The rule says how far the new weights go
    along w and against that part, and whatever their norm, they end on the sphere:
    w+ = R (along * w/n - across * (u - c*w)/sigma) / hypot(along, across).
    """
    n = sqrt(n2)
    size = where(radius < 0.0, -radius, radius)
    joins = waits & (radius < 0.0)
    stays_plain = rotates & joins & (n < size)
    sigma = sqrt(where(sigma2 > 0.0, sigma2, 0.0))
    # A NaN compares false everywhere below, so a layer with a non-finite dot never moves.
    moves = (
        rotates
        & (lr > 0.0)
        & (lr * lr * 0.0 == 0.0)
        & (n2 > 0.0)
        & (n2 - n2 == 0.0)
        & (current | (n > SMALLEST_SHARE * size))
        & (stays_plain == False)  # noqa: E712  (``not`` is no elementwise operator)
        & (sigma > SMALLEST_SINE * sqrt(q))
        & (sigma > noise * n)
    )
    target = where(current | joins | (radius == 0.0), n, size)
    safe_n = where(moves, n, 1.0)
    safe_sigma = where(moves, sigma, 1.0)
    along, across = rotation(rule, safe_n, d, where(moves, q, 1.0), safe_sigma, lr)
    reach2 = along * along + across * across
    shrink = target / sqrt(reach2)
    k = shrink * along / safe_n
    b = -shrink * across / safe_sigma
    c = d / (safe_n * safe_n)
    # In radii, b*u is longer than the new weights where across/reach, the sine of the rotation, is more than sigma/|u|.
    cancels = is_nearly_parallel(sigma2, q) | (sigma2 * reach2 < across * across * q)
    out_of_range = (-b < SMALLEST_FLOAT32_B) | (-b > LARGEST_FLOAT32_B)
    precise = cancels | out_of_range

    # Without rotation: the base step and decoupled decay, w - lr*(u + weight_decay*w). As a float32, the factor
    # 1 - lr*weight_decay would be wrong by the same rounding at every step.
    steps = (lr > 0.0) & ((q > 0.0) | (weight_decay > 0.0))
    a = where(rotates, where(precise, k, k - b * c), 1.0)
    turn = where(moves, where(precise, PRECISE, LINEAR), KEEP)
    plain = where(steps, where(weight_decay > 0.0, PRECISE, LINEAR), KEEP)
    b, c, mode = where(rotates, b, -lr), where(rotates, c, -weight_decay), where(rotates, turn, plain)

    # The same of a layer that waits, without decay. A difference of weights, which alone has noise, is the step and its
    # rate in one.
    a, c = where(stays_plain, 1.0, a), where(stays_plain, 0.0, c)
    b = where(stays_plain, where((noise > 0.0) & (lr > 0.0), -1.0, -lr), b)
    mode = where(stays_plain, where((lr > 0.0) & (q > 0.0), LINEAR, KEEP), mode)
    first = moves & ((radius < 0.0) | ((radius == 0.0) & (current == False)))  # noqa: E712
    return a, b, c, mode, where(first, target, radius)
