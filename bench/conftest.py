"""Options of ``pytest bench``; and Triton's interpreter where there is no GPU, which Triton looks for at definition."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every model, and what compiles for minutes")
