"""Rounds, budgets, peak memory, the machine."""

from __future__ import annotations

import time

import pytest
import torch

from equipoise.bench import hardware, memory, timing
from equipoise.bench.attention import too_large, too_long
from equipoise.bench.hardware import Hardware, is_busy
from equipoise.bench.memory import bytes_of, measured
from equipoise.bench.setting import BenchSetting
from equipoise.bench.timing import Contestant, race


def contestant(name: str, log: list[str], seconds: float = 0.0) -> Contestant:
    def call() -> None:
        log.append(name)
        time.sleep(seconds)

    return Contestant(name=name, prepare=lambda: call)


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND", 1e-9)
    log: list[str] = []
    found = race([contestant("a", log), contestant("b", log)], rounds=3, budget=9.0, device="cpu")
    assert log[4:] == ["a", "b", "b", "a", "a", "b"]  # after two calls each that warm up and calibrate
    assert [len(found[name].wall) for name in "ab"] == [3, 3]
    assert [len(found[name].process) for name in "ab"] == [3, 3]


def test_short_calls_are_repeated_and_long_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUND", 0.02)
    found = race(
        [contestant("short", [], 0.001), contestant("long", [], 0.03)], rounds=1, budget=9.0, device="cpu"
    )
    assert found["short"].repeats > 3
    assert found["long"].repeats == 1
    assert 0.001 <= found["short"].median < 0.02
    assert found["long"].process_median < 0.02  # it slept


def test_a_long_first_call_counts_and_the_budget_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "KEEP", 0.01)
    monkeypatch.setattr(timing, "ROUND", 1e-9)
    log: list[str] = []
    slow = contestant("slow", log, 0.1)
    found = race([slow, contestant("fast", [])], rounds=4, budget=0.28, device="cpu")
    assert len(log) == 2
    assert len(found["slow"].wall) == 2
    assert "2 of 4 rounds" in found["slow"].cut
    assert len(found["fast"].wall) == 4
    assert found["fast"].cut == ""


def test_those_who_cannot_run_do_not() -> None:
    assert race([Contestant(name="a", unavailable="no")], rounds=1, budget=1.0, device="cpu") == {}


def test_peak_memory_is_what_a_call_takes_beyond_its_result() -> None:
    def call() -> torch.Tensor:
        scratch = torch.ones(8 << 20)  # 32 MiB
        return scratch[: 1 << 20] + scratch[-(1 << 20) :]  # 4 MiB

    result, peak = measured(call, "cpu")
    assert bytes_of(result) == 4 << 20
    if peak is None:
        pytest.skip("this system keeps no resettable high-water mark")
    assert 30 << 20 < peak < 42 << 20
    assert (measured(lambda: None, "cpu")[1] or 0) < 1 << 20


def test_views_count_once() -> None:
    tensor = torch.zeros(10)
    assert bytes_of((tensor, [tensor[:5], torch.ones(3)])) == 52


def test_where_no_mark_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(memory, "CLEAR", memory.CLEAR / "missing")
    assert measured(lambda: 1, "cpu") == (1, None)


def test_what_is_too_large_or_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equipoise.bench.attention.free_memory", lambda device: 1000)
    assert too_large(900, BenchSetting()) == ""
    assert "free" in too_large(901, BenchSetting())
    assert "free" in too_large(600, BenchSetting(), factor=2)
    assert too_long(None, 64, 1.0) == ""
    assert too_long((32, 0.2), 64, 1.0) == ""
    assert "quadratic" in too_long((32, 0.3), 64, 1.0)


def test_the_machine_has_a_name() -> None:
    found = hardware.describe("cpu")
    assert found.slug
    assert set(found.slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert found.cores >= 1


def test_busy_is_more_than_the_benchmark_itself() -> None:
    machine = Hardware(name="X(R) y", cores=2, memory_gib=1.0, bfloat16="", torch="2", python="3")
    assert machine.slug == "x-y"
    assert [is_busy(load, machine, 1) for load in (1.0, 1.6, 1.8)] == [False, False, True]


@pytest.mark.parametrize(
    ("flags", "words"),
    [("amx_bf16 avx512_bf16", "amx_bf16, avx512_bf16"), ("avx512_bf16 fma", "avx512_bf16, no amx_bf16")],
)
def test_bfloat16_in_words(flags: str, words: str) -> None:
    assert hardware._bfloat16(flags) == words
