"""The code in docs/trainers.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


def recipes() -> dict[str, str]:
    """Every block of Python by the heading that it stands under."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        heading = section.splitlines()[0]
        (found[heading],) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    return found
