"""``python -m layca_fast info``: what is here, and what each backend says of itself."""

import argparse
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
    argparse.ArgumentParser(prog="python -m layca_fast info", description=__doc__).parse_args(argv)
    facts = [
        ["layca_fast", __version__],
        ["Python", platform.python_version()],
        ["torch", torch.__version__],
        ["triton", installed("triton")],
        ["platform", f"{platform.system()} {platform.machine()}"],
        ["CPU threads", str(torch.get_num_threads())],
        ["GPUs", ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none"],
    ]
    print_table("Versions and devices", ["what", "here"], facts)
    rows = [[name, "yes" if status.available else "no", status.reason] for name, status in backends().items()]
    print_table("Backends", ["backend", "available", "reason"], rows)
    return 0
