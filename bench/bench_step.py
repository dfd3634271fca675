"""One optimizer step under pytest-benchmark: ``pytest bench`` (or ``make bench``), ``--full`` on all models.

Beside each step a copy is timed. To compare providers, use ``python -m bench.ratios``, which interleaves them.
"""

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from layca_fast import FusedLayca, backends

from .plan import free_memory, in_batches, sift
from .providers import BASES, Provider, providers, yardstick
from .rows import environment, quartiles
from .runner import WARM_UP, Contestant, Copy, Model, seconds_of, synchronize
from .shapes import MODELS, QUICK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUICK_ROUNDS, ROUNDS = 5, 15

#: Other packages warn as they like.
pytestmark = pytest.mark.filterwarnings("default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        metafunc.parametrize("model", MODELS if metafunc.config.getoption("--full") else QUICK[:1])
    if "provider" in metafunc.fixturenames:
        cases = [(base, provider) for base in BASES for provider in providers(base, DEVICE)]
        metafunc.parametrize(("base", "provider"), cases, ids=[f"{base}-{provider.name}" for base, provider in cases])


def reason_to_skip(provider: Provider, base: str, model: str, quick: bool) -> str:
    shapes = MODELS[model]()
    first = next(each for each in providers(base, DEVICE) if each.name == yardstick(base))
    candidates = [first] if provider.name == first.name else [first, provider]
    _, too_large = in_batches(candidates, base, sum(map(math.prod, shapes)), 4, free_memory(DEVICE))
    return {**too_large, **sift([provider], len(shapes), quick)}.get(provider.name, "")


@pytest.mark.benchmark(disable_gc=True)
def test_step(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, base: str, provider: Provider, model: str
) -> None:
    quick = not request.config.getoption("--full")
    reason = reason_to_skip(provider, base, model, quick)
    if reason:
        pytest.skip(reason)
    stage = Model(MODELS[model](), DEVICE)
    contestant, copy = Contestant(provider, stage), Copy(stage)
    contestant.check()
    copy_seconds: list[float] = []

    def before_step() -> None:
        stage.flip_gradients()
        contestant.prepare()
        copy_seconds.append(seconds_of(copy.step, DEVICE))

    def step() -> None:
        contestant.step()
        synchronize(DEVICE)

    benchmark.group = f"{model}, {base}"
    benchmark.pedantic(step, setup=before_step, rounds=QUICK_ROUNDS if quick else ROUNDS, warmup_rounds=WARM_UP)
    contestant.check()
    speed = contestant.bytes_moved / benchmark.stats.stats.median / 1e9
    copy_speed = copy.bytes_moved / quartiles(copy_seconds)[1] / 1e9
    benchmark.extra_info.update(
        **environment(DEVICE),
        package=provider.package_version,
        parameters=stage.count,
        bytes_per_parameter=provider.bytes_per_parameter,
        gb_per_s=round(speed, 2),
        copy_fraction=round(speed / copy_speed, 3),
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="Triton's kernels run on this GPU, where test_step times them")
def test_interpreted_triton_step(benchmark: BenchmarkFixture) -> None:
    """The interpreter is for correctness: one small batch, so that its kernels run here, too."""
    assert backends()["triton"].available, backends()["triton"].reason
    interpreted = Provider(
        "FusedLayca triton, interpreted",
        28,
        lambda params: FusedLayca(params, 1e-3, momentum=0.9, backend="triton").step,
        accuracy=1e-6,
        package="layca_fast",
    )
    contestant = Contestant(interpreted, Model([(30, 40), (7, 5), (9,)], DEVICE))
    contestant.check()
    benchmark.group = "interpreter, 3 tensors"
    benchmark.pedantic(contestant.step, rounds=3)
