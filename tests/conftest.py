"""What every test shares: Triton's interpreter where there is no GPU, and random numbers from a printed seed."""

import gc
import os
import random
import signal
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from layca_fast.commands.demo.training import Digits, Run

TESTS = Path(__file__).parent

if not torch.cuda.is_available():
    # Read by Triton when the kernels are defined, so before any test imports them.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", default="code", help="of all random inputs: a number, 'fresh', or 'code' (the default)")


def seed_of_code() -> int:
    """New with every change of the code, the same wherever that is tested, so that a failure can be met again."""
    root = TESTS.parent
    sources = [path for folder in ("layca_fast", "csrc", "tests") for path in (root / folder).rglob("*.*")]
    sources = sorted(path for path in sources if path.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"))
    return zlib.crc32(b"".join(path.read_bytes() for path in sources)) >> 1


def chosen_seed(option: str) -> int:
    if option == "code":
        return seed_of_code()
    return random.SystemRandom().randrange(2**31) if option == "fresh" else int(option)


def pytest_configure(config: pytest.Config) -> None:
    # A worker of pytest-xdist has the seed of the run.
    chosen = getattr(config, "workerinput", {}).get("layca_seed")
    option = config.getoption("--seed")
    config.layca_seed = chosen_seed(option) if chosen is None else chosen
    # On a machine with a GPU it may be missing: what runs there does without.
    if find_spec("hypothesis") is not None:
        import hypothesis

        hypothesis.settings.register_profile("repeatable", derandomize=option == "code", database=None)
        hypothesis.settings.load_profile("repeatable")


#: Tests of what is not in a wheel tell nothing of an installation: they are left to `make test-exhaustive`.
NOT_INSTALLED = ("bench", "examples")

#: The files that take longest, those of few and long tests before others: at the end one core would wait for them.
FIRST = (
    *("backends/triton/test_compile", "backends/cpu/test_instructions", "backends/test_equivalence"),
    *("backends/test_native_modules", "killed/test_killed_runs", "backends/cuda/test_compile"),
    *("optimizer/test_half_training", "sanitize/test_sanitize", "backends/cuda/test_emulator"),
    *("backends/cuda/test_emulated_gpu", "sharded/test_sharded", "bench/test_goals", "examples/test_papers"),
)


# Before pytest deselects by marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    places = {here / f"{name}.py": place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))
    # Imports the package, which is after TRITON_INTERPRET is set.
    from .pairs import mark_beyond_pairs

    if os.environ.get("TRITON_INTERPRET") == "1":
        from .interpreter import spare_repeated_work

        spare_repeated_work()
    mark_beyond_pairs(items)
    if not torch.cuda.is_available():
        leave_one_of_each(items)
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).parts[0] in NOT_INSTALLED:
            item.add_marker(pytest.mark.exhaustive)


def leave_one_of_each(items: list[pytest.Item]) -> None:
    """Of tests that all need a GPU, `make test` skips one of each function, and the exhaustive tests the rest."""
    seen = set()
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            function = item.path, getattr(item, "originalname", item.name)
            if function in seen:
                item.add_marker(pytest.mark.exhaustive)
            seen.add(function)


def pytest_collection_finish() -> None:
    """Everything imported and collected stays: to look through it for garbage finds nothing, however often."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["layca_seed"] = node.config.layca_seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random inputs from --seed {config.layca_seed}"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed; torch's global generator starts from it, too."""
    torch.manual_seed(request.config.layca_seed)
    return request.config.layca_seed


def _global_settings() -> dict[str, Any]:
    return {
        "gradients enabled": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@pytest.fixture(autouse=True)
def _leaves_settings() -> Iterator[None]:
    """What a test left behind for the whole process would fail others, far from it."""
    before = _global_settings()
    yield
    assert _global_settings() == before


# The package is imported inside of these, after TRITON_INTERPRET is set.


@pytest.fixture(scope="session")
def digits() -> "Digits":
    """The demo's."""
    from layca_fast.commands.demo.training import load_digits

    return load_digits()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the capture of a CUDA graph is to be seen under way; CPU tensors then pass for recorded ones."""
    from layca_fast.step import capture

    monkeypatch.setattr(capture, "RECORDED_DEVICES", ("cuda", "cpu"))

    def say(whether: bool) -> None:
        for module in ("step.plan", "optimizer"):
            monkeypatch.setattr(f"layca_fast.{module}.is_capturing", lambda: whether)

    return say


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Train as the demo does, also where a test calls its parts."""
    from layca_fast.commands.demo.training import one_cpu_thread

    with one_cpu_thread():
        yield


@pytest.fixture
def few_digits(digits: "Digits") -> "Digits":
    """150 of the demo's digits to train on and 150 to test on: an epoch of three steps."""
    return type(digits)(*(tensor[:150] for tensor in vars(digits).values()))


@pytest.fixture
def recorded_runs(monkeypatch: pytest.MonkeyPatch) -> "list[list[Run]]":
    """What the demo's ``main`` trained, so that what it prints can be compared with it."""
    from layca_fast.commands.demo import main as demo

    runs: list[list[Run]] = []
    train_all = demo.train_all

    def recording(*args: object) -> "list[list[Run]]":
        runs.extend(train_all(*args))
        return runs

    monkeypatch.setattr(demo, "train_all", recording)
    monkeypatch.setenv("COLUMNS", "80")
    return runs
