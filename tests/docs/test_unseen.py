"""The list of what only hardware can show names tests that there are."""

import re

from .support import ROOT


def test_the_tests_of_the_list_are_there() -> None:
    """It is what somebody with a GPU goes by, and nothing else runs these commands where there is none."""
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    named = re.findall(r"(tests/gpu/\w+\.py)(?:::(\w+))?", text)
    assert len(named) >= 10
    for file, test in named:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {test}(" in code if test else "pytestmark = ON_GPU" in code, (file, test)
