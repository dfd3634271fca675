"""The base steps, once, for every backend that is written in Python. The rotation's formulas: ``rotation.py``.

The torch backend runs these functions as they stand, with ``where`` and ``sqrt`` bound to its own, on tensors whose
memory it keeps (see ``backends/torch_``). The Triton backend compiles the very same functions, with ``where``, ``sqrt``
and ``exp`` bound to Triton's (see ``backends/triton``). So they use nothing but operators, these three and each other:
no branches, no keyword arguments, no other names.

``csrc/base_steps.h`` holds the same formulas for C++ and CUDA; ``reference.py`` states the algorithm in another way on
purpose and is what all of these are tested against.

A base optimizer is two functions of one element:

- ``*_advance(grad, state, options) -> state``: the new state buffers, a tuple;
- ``*_step(grad, state, options) -> u``: the base step from the advanced state. It does not depend on the old
  state, so the rotate pass recomputes it, and no backend stores u.

``options`` is the tuple that :attr:`layca_fast.formulas.bases.Base.scalars` makes of a group. A base whose options
change from step to step (Adam's bias corrections) has a third function, ``*_prepare(count, options) -> options``, of
float64 scalars; ``count`` is the number of this step, from 1.
"""

# The formulas run on tensors, on floats and on Triton's values; no static type covers all three.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from torch import exp, sqrt, where


def finite_or_zero(x):
    """x where it is finite, else 0 (Layca paper, appendix A.2.4)."""
    # Not x - x == 0: where x is a product, a compiler may fuse that into the product's rounding error.
    return where(x * 0.0 == 0.0, x, 0.0)


def finite_square_or_zero(x):
    """x where its square is finite, else 0: as a gradient it would make a mean square infinite for good."""
    return where(x * x * 0.0 == 0.0, x, 0.0)


def same_options(count, options):
    return options


def running_mean(old, new, weight):
    # Not (1 - weight)*old + weight*new: in float32 the two factors do not add up to 1. And where all the weight is on
    # the new value, new - old + old has lost what is small beside the old.
    kept = old * (weight < 1.0)
    return kept + weight * (new - kept)


def running_square(old, grad, keep, weight):
    # torch's form, so that its roundings are ours, too.
    return keep * old + weight * (grad * grad)


def sgd_advance(grad, state, options):
    return state


def sgd_step(grad, state, options):
    return grad


def sgd_momentum_advance(grad, state, options):
    momentum, fraction = options
    return (momentum * state[0] + fraction * grad,)


def sgd_momentum_step(grad, state, options):
    return state[0]


sgd_nesterov_advance = sgd_momentum_advance


def sgd_nesterov_step(grad, state, options):
    return grad + options[0] * state[0]


def rmsprop_advance(grad, state, options):
    return (running_square(state[0], grad, options[0], options[1]),)


def rmsprop_step(grad, state, options):
    return grad / (sqrt(state[0]) + options[2])


def rmsprop_centered_advance(grad, state, options):
    return running_square(state[0], grad, options[0], options[1]), running_mean(state[1], grad, options[1])


def rmsprop_centered_step(grad, state, options):
    return grad / (sqrt(state[0] - state[1] * state[1]) + options[2])


def rmsprop_momentum_advance(grad, state, options):
    advanced = rmsprop_advance(grad, state, options)
    # What is not finite in a step counts as zero before it enters the buffer, too.
    step = finite_or_zero(rmsprop_step(grad, advanced, options))
    return advanced[0], options[3] * state[1] + step


def rmsprop_momentum_step(grad, state, options):
    return state[1]


def rmsprop_centered_momentum_advance(grad, state, options):
    advanced = rmsprop_centered_advance(grad, state, options)
    step = finite_or_zero(rmsprop_centered_step(grad, advanced, options))
    return advanced[0], advanced[1], options[3] * state[2] + step


def rmsprop_centered_momentum_step(grad, state, options):
    return state[2]


def adagrad_advance(grad, state, options):
    total = state[0] + grad * grad
    return (where(total * 0.0 == 0.0, total, state[0]),)


def adagrad_step(grad, state, options):
    return grad / (sqrt(state[0]) + options[0])


def adam_prepare(count, options):
    weight1, keep2, weight2, eps, log_beta1, log_beta2 = options
    correction1 = 1.0 - exp(count * log_beta1)
    correction2 = 1.0 - exp(count * log_beta2)
    return weight1, keep2, weight2, eps, 1.0 / correction1, 1.0 / sqrt(correction2)


def adam_advance(grad, state, options):
    return running_mean(state[0], grad, options[0]), running_square(state[1], grad, options[1], options[2])


def adam_step(grad, state, options):
    return state[0] * options[4] / (sqrt(state[1]) * options[5] + options[3])


def adam_amsgrad_advance(grad, state, options):
    advanced = adam_advance(grad, state, options)
    return advanced[0], advanced[1], where(advanced[1] > state[2], advanced[1], state[2])


def adam_amsgrad_step(grad, state, options):
    return state[0] * options[4] / (sqrt(state[2]) * options[5] + options[3])


def lion_advance(grad, state, options):
    return (running_mean(state[0], grad, options[0]),)


def lion_step(grad, state, options):
    # The sign of beta1*m + (1 - beta1)*g, where m, the average before this step, is taken from the one after it.
    mixed = options[1] * state[0] + options[2] * grad
    return where(mixed > 0.0, 1.0, where(mixed < 0.0, -1.0, mixed * 0.0))


muon_advance = lion_advance


def muon_step(grad, state, options):
    # What the direction of a whole matrix is made of (orthogonal.py): the average, or Nesterov's look-ahead.
    return options[1] * grad + options[2] * state[0]
