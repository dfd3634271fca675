"""``python -m layca_fast info``: what is here, and what each backend says of itself."""

import argparse
import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from ..backends import backends
from ..figures.console import print_table
from ..version import __version__


def installed(package: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> int:
    """Print versions, devices, and the backends with the reasons of those that are missing."""
    parser = argparse.ArgumentParser(prog="python -m layca_fast info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as one JSON object, for programs and bug reports")
    args = parser.parse_args(argv)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    here = {
        "layca_fast": __version__,
        "layca_fast_cuda": installed("layca_fast_cuda"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "platform": f"{platform.system()} {platform.machine()}",
        "CPU threads": torch.get_num_threads(),
        "GPUs": gpus,
    }
    found = backends()
    if args.json:
        said = {name: {"available": status.available, "reason": status.reason} for name, status in found.items()}
        print(json.dumps({**here, "backends": said}, indent=2))
        return 0
    facts = [
        [name, ", ".join(value) or "none" if isinstance(value, list) else str(value)] for name, value in here.items()
    ]
    print_table("Versions and devices", ["what", "here"], facts)
    rows = [[name, "yes" if status.available else "no", status.reason] for name, status in found.items()]
    print_table("Backends", ["backend", "available", "reason"], rows)
    return 0
