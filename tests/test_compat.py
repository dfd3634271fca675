"""The names of torch that layca_fast.compat counts on: there from the version that it gives, and not before."""

import re
from pathlib import Path

import pytest
import torch

import layca_fast
from layca_fast import compat

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def find(path: str) -> bool:
    """Whether torch has it; modules below torch that are only there once they are imported count."""
    found: object = torch
    for index, name in enumerate(names := path.split(".")):
        if not hasattr(found, name):
            try:
                __import__(".".join(["torch", *names[: index + 1]]))
            except ImportError:
                return False
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("name", compat.SINCE)
def test_each_name_is_there_from_its_version_on(name: str) -> None:
    assert find(name) == (compat.SINCE[name] <= VERSION)


#: torch documents _foreach_..., which is private by name only. What attributes a version's tensors have is asked there.
PRIVATE = re.compile(
    r"\btorch(\.\w+)*\._(?!foreach_|_version__)\w+"
    r"|from torch[\w.]*\._\w+ import"
    r"|from torch[\w.]* import (\([^)]*|.*)\b_\w+"
    r"|\b_(local_tensor|spec|fsdp_flattened|version)\b(?= *[\"',).]|$)"
    r"|attr\(\w*Tensor, \"\w+\""
)


def test_no_other_file_names_what_is_private_in_torch() -> None:
    root = Path(layca_fast.__file__).parent
    found = {
        str(path.relative_to(root)): PRIVATE.search(path.read_text(encoding="utf-8"))
        for path in root.rglob("*.py")
        if path.name != "compat.py"
    }
    assert {path: match[0] for path, match in found.items() if match} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._get_dispatch_mode(key)",
        "from torch._compile import _disable_dynamo",
        "from torch.overrides import _get_current_function_mode_stack",
        "from torch.overrides import (\n    a,\n    _b,\n)",
        'getattr(param, "_fsdp_flattened", False)',
        "local = tensor._local_tensor",
        'attrgetter("_spec")',
        "local._version",
        'hasattr(Tensor, "grad_dtype")',
    ],
)
def test_the_search_finds_such_names(line: str) -> None:
    assert PRIVATE.search(line)
