"""A step that processes take together, window by window."""

from typing import Any

import pytest

from layca_fast.step.together import Together, _Window


@pytest.mark.parametrize("failing", range(2))
def test_a_failure_after_the_first_window_is_told(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it nothing has been stepped, and the failure itself says all."""
    together = Together.__new__(Together)
    together._windows = [_Window() for _ in range(3)]
    begun: list[_Window] = []

    def take(self: Together, window: _Window, *rest: Any) -> None:
        begun.append(window)
        if len(begun) == failing + 1:
            raise OSError("no memory")

    monkeypatch.setattr(Together, "_take", take)
    expected, message = (RuntimeError, "half-way: 1 of 3 windows.*OSError: no memory") if failing else (OSError, "^no")
    with pytest.raises(expected, match=message):
        together.take(None, False, lambda backend, batch: None)
    assert begun == together._windows[: failing + 1]
