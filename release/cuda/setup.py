"""Builds the CUDA module alone, for all GPUs, by what layca_fast's own setup.py does."""

import os
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import Extension, setup

os.environ.setdefault("LAYCA_CUDA_ARCHITECTURES", "all")
# Without its module this package is nothing.
os.environ["LAYCA_CUDA"], os.environ["LAYCA_REQUIRE_NATIVE"] = "ON", "1"

ROOT = Path(__file__).resolve().parents[2]
spec = spec_from_file_location("layca_setup", ROOT / "setup.py")
assert spec is not None
assert spec.loader is not None
layca_setup = sys.modules["layca_setup"] = module_from_spec(spec)
spec.loader.exec_module(layca_setup)


class BuildCuda(layca_setup.BuildNative):
    """Puts the module into this package."""

    modules = {"cuda": "layca_fast_cuda._cuda"}  # noqa: RUF012
    noted = False


(version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "layca_fast" / "version.py").read_text("utf-8"), re.M)
setup(
    version=version,
    install_requires=[f"layca_fast=={version}"],
    ext_modules=[Extension(name, sources=[]) for name in BuildCuda.modules.values()],
    cmdclass={"build_ext": BuildCuda},
)
