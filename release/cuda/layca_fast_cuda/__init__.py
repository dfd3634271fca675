"""The CUDA kernels of layca_fast, of the same version; layca_fast imports them by itself."""

from importlib.metadata import version

__version__ = version("layca_fast_cuda")
