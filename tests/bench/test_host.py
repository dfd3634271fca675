"""The host's part of a step on a GPU, counted with the stand-in of bench/host.py: no clock is asked."""

import sys

import pytest

from bench.host import CASES, OPTIONS, Host, calls_of, stand_in

#: Of Python's functions and C's in a step, whatever its number of tensors: each takes 0.05 to 0.5 µs, and the goal for
#: 161 tensors is 60 µs. There were 440 at most when this was written.
MOST_CALLS = 450


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer calls functions of its own")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_calls_no_more_functions_for_more_tensors(options: dict[str, object], case: str) -> None:
    with stand_in():
        few, many = (calls_of(Host(tensors, options, case)) for tensors in (20, 400))
    assert many == few <= MOST_CALLS
