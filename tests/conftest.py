"""What every test shares: Triton's interpreter where there is no GPU, and random numbers from a printed seed."""

import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when the kernels are defined, so before any test imports them.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="seed of all random inputs (default: fresh)")


def pytest_configure(config: pytest.Config) -> None:
    chosen = config.getoption("--seed")
    config.layca_seed = random.SystemRandom().randrange(2**31) if chosen is None else chosen


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs from --seed {config.layca_seed}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed; torch's global generator starts from it, too."""
    torch.manual_seed(request.config.layca_seed)
    return request.config.layca_seed
