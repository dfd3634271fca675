"""What tests of saved state share."""

from collections.abc import Iterator

import pytest
from torch import distributed


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()
