"""The benchmark suite on tiny models: its rows, its pictures, and that it refuses a provider that steps wrongly."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import by_hand, ratios
from bench.measure import measure
from bench.plan import in_batches, sift
from bench.providers import BASES, Provider, providers, yardstick
from bench.rows import read, write
from bench.runner import COPY, FEWEST_ROUNDS, Contestant, Model, interleave

from .support import CPU, TINY, eager, named, tiny_rows


@pytest.mark.parametrize("base", BASES)
def test_every_provider_gets_a_full_row(base: str, seed: int, tmp_path: Path) -> None:
    rows = tiny_rows(base)
    assert [row.provider for row in rows] == [COPY, *(each.name for each in eager(base))]
    weights = sum(map(math.prod, TINY))
    for row in rows:
        assert (row.model, row.base, row.tensors, row.parameters) == ("tiny", base, len(TINY), weights)
        assert row.threads == torch.get_num_threads()
        assert all((row.date, row.cpu, row.device, row.system, row.python, row.torch, row.layca_fast))
        if row.skipped:
            assert row.median_ms is row.ratio_median is row.gb_per_s is None
            assert row.rounds == 0
            continue
        assert row.rounds == 3
        assert 0 < row.q1_ms <= row.median_ms <= row.q3_ms
        assert 0 < row.ratio_q1 <= row.ratio_median <= row.ratio_q3
        moved = 8 if row.provider == COPY else named(base, row.provider).bytes_per_parameter
        assert row.bytes_per_parameter == moved
        assert row.gb_per_s == pytest.approx(moved * weights / row.median_ms / 1e6)
        assert row.package
    unit = next(row for row in rows if row.provider == yardstick(base))
    assert (unit.ratio_median, unit.ratio_q1, unit.ratio_q3) == (1, 1, 1)

    path = tmp_path / "rows.csv"
    write(path, rows)
    for old, new in zip(rows, read(path), strict=True):
        for name, value in dataclasses.asdict(old).items():
            rounded = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert getattr(new, name) == rounded, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layca_by_hand_is_what_fused_layca_computes(dtype: torch.dtype, seed: int) -> None:
    for base in BASES:
        model = Model(TINY, CPU, dtype)
        start = [weight.clone() for weight in model.weights]
        results: dict[str, list[Tensor]] = {}
        for provider in eager(base):
            if provider.name.startswith("Layca by hand") or provider.name == "FusedLayca torch":
                torch._foreach_copy_(model.weights, start)
                contestant = Contestant(provider, model)
                for _ in range(5):
                    contestant.prepare()
                    contestant.step()
                    model.flip_gradients()
                model.flip_gradients()
                results[provider.name] = [weight.clone() for weight in model.weights]
        expected = results.pop("FusedLayca torch")
        assert len(results) == 3
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        for ours in results.values():
            for one, other in zip(ours, expected, strict=True):
                assert float((one - other).norm() / other.norm()) < tolerance


def wrong(rate: float) -> Callable[[Sequence[Tensor]], Callable[[], object]]:
    """Layca in closed form that turns by atan(rate)."""

    def make(params: Sequence[Tensor]) -> Callable[[], object]:
        step = by_hand.per_tensor("sgd", by_hand.closed_form)(params)

        def at_another_rate() -> None:
            usual, by_hand.RATE = by_hand.RATE, rate
            try:
                step()
            finally:
                by_hand.RATE = usual

        return at_another_rate

    return make


def test_a_wrong_angle_fails(seed: int) -> None:
    model = Model(TINY, CPU)
    fine = Provider("right", 0, wrong(by_hand.RATE), accuracy=1e-3)
    Contestant(fine, model).check()
    with pytest.raises(AssertionError, match=r"too far: tensor 0 of shape \(30, 40\) turned by 1\.0(09|10)"):
        Contestant(dataclasses.replace(fine, name="too far", make=wrong(1.01 * by_hand.RATE)), model).check()


def test_a_tensor_that_stays_or_turns_infinite_fails(seed: int) -> None:
    def leave_last(params: Sequence[Tensor]) -> Callable[[], object]:
        return torch.optim.SGD(params[:-1], lr=0.1).step

    def overflow(params: Sequence[Tensor]) -> Callable[[], object]:
        return torch.optim.SGD(params, lr=3e38).step

    for make, message in ((leave_last, "tensor 3 did not move"), (overflow, "tensor 0 is no longer finite")):
        with pytest.raises(AssertionError, match=message):
            Contestant(Provider("wrong", 0, make), Model(TINY, CPU)).check()


def test_a_wrong_step_during_the_rounds_fails(seed: int) -> None:
    """The steps after the first are checked, too."""

    def make(params: Sequence[Tensor]) -> Callable[[], object]:
        steps = [wrong(rate)(params) for rate in (by_hand.RATE, 2 * by_hand.RATE)]
        taken: list[int] = []

        def step() -> None:
            steps[len(taken) > 0]()
            taken.append(1)

        return step

    model = Model(TINY, CPU)
    with pytest.raises(AssertionError, match="turned by"):
        interleave({"drifts": Contestant(Provider("drifts", 0, make, accuracy=1e-3), model)}, model, 1)


@pytest.mark.parametrize(("rounds", "limit", "made"), [(7, math.inf, 7), (7, 0.0, FEWEST_ROUNDS), (2, 0.0, 2)])
def test_the_time_limit_ends_the_rounds(rounds: int, limit: float, made: int, seed: int) -> None:
    model = Model(TINY, CPU)
    entry = Contestant(named("sgd", "SGD fused"), model)
    assert len(interleave({"one": entry}, model, rounds, limit)["one"]) == made


def test_gradients_that_a_provider_alters_are_its_own(seed: int) -> None:
    def make(params: Sequence[Tensor]) -> Callable[[], object]:
        def step() -> None:
            for param in params:
                param.data.sub_(param.grad)
                param.grad.zero_()
                param.grad = None

        return step

    model = Model(TINY, CPU)
    before = [grad.clone() for grad in model.grads]
    contestant = Contestant(Provider("alters", 0, make, alters_grad=True), model)
    contestant.check()
    contestant.check()
    assert all(map(torch.equal, before, model.grads))


def test_what_does_not_run_is_listed_with_its_reason(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.providers.find_spec", lambda name: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = {each.name: each.skipped for each in providers("adam", CPU)}
    assert found["optimi Adam"] == "torch-optimi is not installed: pip install 'layca_fast[bench]'"
    assert "no-such-compiler" in found["Layca by hand, torch.compile"]
    assert "GPU" in found["apex FusedLAMB"]
    assert "interpreter" in found["FusedLayca triton"]
    only = [each for each in providers("adam", CPU) if each.skipped or each.name == yardstick("adam")]
    rows = measure("adam", "tiny", TINY, 1, CPU, only=only, tell=lambda _: None)
    ratios.show(rows)
    printed = capsys.readouterr().out
    for row in rows:
        assert row.skipped == found.get(row.provider, "")
        assert f"skipped: {row.provider}: {row.skipped}" in printed or not row.skipped


def test_what_compiles_for_minutes_is_left_out_with_a_reason() -> None:
    candidates = [dataclasses.replace(each, skipped="") for each in providers("momentum", CPU)]
    assert sift(candidates, tensors=100, quick=False) == {}
    assert list(sift(candidates, tensors=100, quick=True)) == ["heavyball SGD"]
    assert "beyond 200" in sift(candidates, tensors=201, quick=False)["heavyball SGD"]


def test_memory_decides_on_batches() -> None:
    # Bytes per weight: 8 for weights and gradients, 8 for the copy, 4 of state each.
    first, one, two = (Provider(name, 0, wrong(1), state=4) for name in (yardstick("sgd"), "one", "two"))
    large = Provider("large", 0, wrong(1), state=4, scratch=8)

    def plan(free: int) -> tuple[list[list[str]], dict[str, str]]:
        batches, skipped = in_batches([first, one, two, large], "sgd", 1000, 4, free)
        return [[each.name for each in batch] for batch in batches], skipped

    assert plan(1_000_000) == ([["SGD fused", "one", "two", "large"]], {})
    batches, skipped = plan(27_000)
    assert batches == [["SGD fused", "one"], ["SGD fused", "two"]]
    assert list(skipped) == ["large"]
    batches, skipped = plan(20_000)
    assert (batches, list(skipped)) == ([], ["SGD fused", "one", "two", "large"])
    assert all("GB" in reason for reason in skipped.values())


def test_each_batch_keeps_the_yardstick(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.measure.free_memory", lambda device: 32 * sum(map(math.prod, TINY)))
    told: list[str] = []
    only = [each for each in eager("momentum") if not each.skipped][:5]
    rows = measure("momentum", "tiny", TINY, 2, CPU, only=only, tell=told.append)
    assert len(told) > 1
    assert all(yardstick("momentum") in line for line in told)
    assert [row.provider for row in rows] == [COPY, *(each.name for each in only)]
    assert all(row.ratio_median is not None for row in rows)
