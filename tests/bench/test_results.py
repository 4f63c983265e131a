"""Ratios, bars and pages of made-up runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from equipoise.bench.bars import CPU_BARS, in_words, judge, reaches
from equipoise.bench.end_to_end import predict
from equipoise.bench.hardware import Hardware
from equipoise.bench.page import seconds, slope, to_page
from equipoise.bench.peers import OURS
from equipoise.bench.results import Row, Run, to_data
from equipoise.bench.running import CPU_SET, Plan, known_peers, write, write_bars
from equipoise.bench.setting import BenchSetting
from equipoise.bench.timing import Times
from equipoise.pages import render_html, render_markdown
from equipoise.registry import UnknownNameError

MACHINE = Hardware(name="Test 9000", cores=4, memory_gib=8.0, bfloat16="none", torch="2.0", python="3.11")


def row(name: str, length: int, *wall: float, peak: int | None = None, **more: Any) -> Row:
    times = Times(wall=list(wall), process=[0.5 * t for t in wall], peak=peak)
    return Row(measure=more.pop("measure", "prefill"), length=length, name=name, times=times, **more)


def run_of(*rows: Row, **more: Any) -> Run:
    plain: dict[str, Any] = {
        "theme": "prefill", "setting": BenchSetting(), "hardware": MACHINE, "checked": ("all",),
        "command": "equipoise bench prefill", "date": "2026-01-02", "load": (0.5, 1.0),
    }  # fmt: skip
    return Run(rows=rows, **{**plain, **more})


RUN = run_of(
    row(OURS, 4096, 0.01, 0.02, 0.03, peak=2_000_000),
    row("sdpa", 4096, 0.2, 0.04, 0.06),
    row(OURS, 16384, 0.05, 0.07, 0.06),
    row("sdpa", 16384, 0.5, 0.6),
    Row(measure="prefill", length=16384, name="flex", reason="not here"),
    row(OURS, 65536, 0.3, peak=33_000_000),
)


def test_ratios_are_of_medians_with_the_range_of_rounds() -> None:
    ratio = RUN.ratio(RUN.rows[1])
    assert ratio is not None
    assert ratio.value == pytest.approx(0.06 / 0.02)
    assert (ratio.low, ratio.high) == (pytest.approx(2), pytest.approx(20))
    assert ratio.process == pytest.approx(3)
    assert RUN.ratio(RUN.rows[0]) is None
    assert RUN.ratio(RUN.rows[4]) is None


def test_bars_read_from_a_run() -> None:
    found = {outcome.bar.what: outcome for outcome in judge([RUN])}
    assert found["prefill float32 4k: sdpa's time over ours"].met is True
    assert found["prefill float32 16k: sdpa's time over ours"].met is False
    growth = found["prefill float32 64k: our time over that at 16k"]
    assert growth.value == pytest.approx(5)
    assert growth.verdict == "missed"
    # sdpa did not run at 64k, band not at all, and scratch is counted with maps
    assert found["prefill float32 64k: sdpa's time over ours"].verdict == "not measured"
    assert len(found) == 4


def test_scratch_and_memory_and_bytes() -> None:
    maps = replace(RUN, setting=BenchSetting(features="maps"))
    (scratch,) = judge([maps])
    assert (scratch.value, scratch.met) == (33_000_000, False)
    loss = run_of(
        row(OURS, 2048, 1.0, peak=10, measure="transfer"), row("txt", 2048, 5.0, peak=99, measure="transfer"),
        theme="transfer",
    )  # fmt: skip
    ratio, memory = judge([loss])
    assert (ratio.met, memory.met) == (True, False)
    assert in_words(memory.bar, memory.value) == "1/9.9"
    flat = run_of(
        row(OURS, 1024, 1.0, held=7, measure="decode"), row(OURS, 16384, 1.05, held=7, measure="decode"),
        theme="decode",
    )  # fmt: skip
    assert [outcome.met for outcome in judge([flat])] == [True, True]


def test_other_sizes_have_no_bars() -> None:
    assert judge([replace(RUN, setting=BenchSetting(heads=16))]) == []
    assert judge([replace(RUN, setting=BenchSetting(threads=2))]) == []


def test_a_ratio_must_be_large_and_the_rest_small() -> None:
    for bar in CPU_BARS:
        assert reaches(bar, bar.least) is True
        assert reaches(bar, bar.least * (0.99 if bar.kind == "ratio" else 1.01)) is False
        assert reaches(bar, None) is None


def test_the_cpu_set_speaks_of_every_bar() -> None:
    """Otherwise a bar could be met by never being looked at."""
    runs: list[Run] = []
    for plan in CPU_SET:
        filled = plan.filled()
        rows = [
            row(name, length, 1.0, measure=plan.theme)
            for name in (OURS, *(filled.against or ()))
            for length in filled.lengths
        ]
        runs.append(run_of(*rows, theme=plan.theme, setting=plan.setting))
    assert [outcome.bar for outcome in judge(runs)] == list(CPU_BARS)


def test_the_command_measures_the_same() -> None:
    setting = BenchSetting(dtype="bfloat16", kv_heads=2)
    plan = Plan(theme="prefill", setting=setting, lengths=(64, 128), against=("sdpa", "txt"), rounds=2)
    assert plan.command == (
        "equipoise bench prefill --dtype bfloat16 --kv-heads 2 --lengths 64,128 --against sdpa,txt "
        "--rounds 2 --output DIR"
    )
    assert "--against none" in replace(plan, against=()).filled().command


def test_peers_of_another_theme_are_refused() -> None:
    assert "concat" in known_peers("decode")
    with pytest.raises(UnknownNameError, match="sdpa"):
        Plan(theme="transfer", setting=BenchSetting(), against=("sdpaa",)).filled()


def test_slopes() -> None:
    assert slope([(1024, 1.0), (2048, 4.0), (4096, 16.0)]) == pytest.approx(2)
    assert slope([(1024, 1.0), (4096, 4.0)]) == pytest.approx(1)


@pytest.mark.parametrize(("value", "words"), [(1.25, "1.25 s"), (0.0431, "43.1 ms"), (5.2e-5, "52 µs")])
def test_seconds(value: float, words: str) -> None:
    assert seconds(value) == words


def test_page_and_data() -> None:
    page, data = to_page(RUN, judge([RUN])), to_data(RUN)
    text = render_markdown(page)
    for part in ("not here", "missed", "sdpa takes 9.17x our time at 16,384", "equipoise bench prefill"):
        assert part in text
    assert "slope" in render_html(page)
    assert data["rows"][1]["times_ours"]["value"] == pytest.approx(3)
    assert data["rows"][4]["reason"] == "not here"
    assert RUN.name == "prefill-float32_test-9000_2026-01-02"


def test_a_busy_machine_is_said() -> None:
    busy = replace(RUN, load=(9.0, 1.0))
    assert busy.busy
    assert "busy" in render_markdown(to_page(busy))
    assert "busy" not in render_markdown(to_page(RUN))


def test_files(tmp_path: Any) -> None:
    paths = write(RUN, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{RUN.name}{suffix}" for suffix in (".json", ".md", ".html", ".svg")
    }
    assert paths["json"].is_file()
    outcomes, paths = write_bars([RUN], tmp_path)
    assert "1 of 4 bars met" in paths["md"].read_text(encoding="utf-8")
    assert len(outcomes) == 4


def test_what_generate_should_take() -> None:
    """Two layers: the donor's 10 ms less twice 1 ms of attention, and twice 3 ms of ours, make 14 ms."""
    generate: dict[str, Any] = {"measure": "generate", "tokens": 16}
    rows = [
        row("sdpa", 64, 0.16, **generate), row(OURS, 64, 0.2, **generate),
        row("sdpa", 9000, 9.0, **generate), row(OURS, 9000, 0.28, **generate),
        row("sdpa", 64, 0.001, measure="attention"), row(OURS, 64, 0.002, measure="attention"),
        row("sdpa", 9000, 0.9, measure="attention"), row(OURS, 9000, 0.003, measure="attention"),
    ]  # fmt: skip
    (found,) = predict(rows, 2)
    assert (found.length, found.measured) == (9000, pytest.approx(0.0175))
    assert found.predicted == pytest.approx(0.014)
    assert (found.ratio, found.process, found.met) == (pytest.approx(1.25), pytest.approx(1.25), True)
    run = run_of(*rows, theme="model", end_to_end=(found, replace(found, measured=0.03)))
    assert [one["met"] for one in to_data(run)["end_to_end"]] == [True, False]
    text = render_markdown(to_page(run))
    assert "End to end: generate" in text
    assert "17.5 ms" in text
    assert predict([], 2) == []
