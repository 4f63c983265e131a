"""A benchmark run as a page for people: plot, table, what the peers are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from equipoise.bench.bars import Outcome, in_words
from equipoise.bench.decode import DECODERS
from equipoise.bench.models import NAMES as MODELS
from equipoise.bench.peers import OURS, PEERS
from equipoise.bench.results import AT_MOST, Row, Run
from equipoise.bench.transfer import NAMES as LOSSES
from equipoise.pages import UNDEFINED, Cell, Figure, Page, Table, Terms, Text, Tone, bytes_in_words

TITLES = {
    "prefill": "Prefill: one layer's attention over a whole sequence",
    "train": "Training: one layer's attention forward and backward",
    "decode": "Decoding: one layer's attention for one token",
    "transfer": "The transfer loss with its gradients",
    "model": "Whole models: prefill, decoding, training step",
}


def seconds(value: float) -> str:
    """`1.25 s`, `43.1 ms`, `52.0 µs`."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{value * factor:.3g} {unit}"
    return UNDEFINED


def summary(run: Run) -> str:
    """Each peer beside ours at the longest length both ran."""
    parts: list[str] = []
    for measure in run.measures:
        peers = dict.fromkeys(row.name for row in run.rows if row.name != OURS)
        for name in peers:
            known = [r for r in run.rows if (r.name, r.measure) == (name, measure) and run.ratio(r)]
            ratio = run.ratio(known[-1]) if known else None
            if ratio is not None:
                label = f"{measure}, " if len(run.measures) > 1 else ""
                parts.append(f"{label}{name} takes {ratio.value:.3g}x our time at {known[-1].length:,}")
    text = "; ".join(parts) or "no peer ran beside ours"
    busy = " Others kept the machine busy: only processor times count." if run.busy else ""
    return f"Beside equipoise: {text}.{busy}"


def to_page(run: Run, outcomes: Sequence[Outcome] = ()) -> Page:
    """The page of a run."""
    setting, hardware = run.setting, run.hardware
    sizes = (
        f"{setting.heads} heads ({setting.kv_heads} of keys) of {setting.head_dim}, window {setting.window}, "
        f"feature dimension {setting.feature_dim}, batch {setting.batch}"
    )
    if run.theme == "model":
        sizes = f"window {setting.window}"
    threads = f"{setting.threads} thread{'s' * (setting.threads != 1)}"
    where = f"{hardware.name}{f', {threads}' if setting.device == 'cpu' else ''}"
    sections = [*(figure(run, measure) for measure in run.measures if plotted(run, measure))]
    sections += [table(run, measure) for measure in run.measures]
    sections += [end_to_end_table(run)] if run.end_to_end else []
    sections += [bar_table(outcomes)] if outcomes else []
    sections += [Terms("Who is compared", [(name, about(run, name)) for name in _names(run)])]
    return Page(
        title=TITLES[run.theme], subtitle=f"{setting.dtype}; {sizes}; {where}; {run.date}",
        summary=summary(run), sections=[*sections, Text("How this was measured", _method(run))],
    )  # fmt: skip


def _names(run: Run) -> list[str]:
    return list(dict.fromkeys(row.name for row in run.rows))


def about(run: Run, name: str) -> str:
    """What a contestant is."""
    if run.theme == "decode":
        return DECODERS[name].about
    if run.theme in ("model", "transfer"):
        return (MODELS if run.theme == "model" else LOSSES)[name]
    return PEERS[name].about


def table(run: Run, measure: str) -> Table:
    """All rows of a measure."""
    rows = [_cells(run, row) for row in run.rows if row.measure == measure]
    what = "context" if measure == "decode" else "T"
    return Table(
        f"Times: {measure}",
        ["contestant", what, "seconds", "range", "processor time", "over ours", "range of that",
         "over ours, processor", "peak memory", "cache", "tokens/s", "rounds"],
        rows,
        "Seconds are medians over interleaved rounds. Peak memory: beyond inputs, output and gradients.",
    )  # fmt: skip


def _cells(run: Run, row: Row) -> list[Cell | str]:
    head: list[Cell | str] = [row.name, Cell(f"{row.length:,}", row.length)]
    times, ratio = row.times, run.ratio(row)
    if times is None:
        return [*head, row.reason, *([Cell(UNDEFINED, math.nan)] * 9)]
    low, high = min(times.wall), max(times.wall)
    compared = [Cell(UNDEFINED, math.nan)] * 3
    if ratio is not None:
        compared = [
            Cell(f"{ratio.value:.3g}x", ratio.value),
            Cell(f"{ratio.low:.3g} to {ratio.high:.3g}", ratio.low),
            Cell(f"{ratio.process:.3g}x", ratio.process),
        ]
    memory = [
        Cell(UNDEFINED, math.nan) if count is None else Cell(bytes_in_words(count), count)
        for count in (times.peak, row.held)
    ]
    return [
        *head, Cell(seconds(times.median), times.median), Cell(f"{seconds(low)} to {seconds(high)}", low),
        Cell(seconds(times.process_median), times.process_median), *compared, *memory,
        Cell(f"{row.tokens / times.median:,.0f}", row.tokens / times.median),
        Cell(f"{len(times.wall)}" + (f" x {times.repeats}" if times.repeats > 1 else ""), len(times.wall)),
    ]  # fmt: skip


_TONES: dict[bool | None, Tone] = {True: "good", False: "bad", None: "plain"}


def bar_table(outcomes: Sequence[Outcome]) -> Table:
    """Bars, what was measured, and whether it is enough."""
    return Table(
        "Bars",
        ["figure", "at least / at most", "aim", "measured", "processor time", "verdict"],
        [
            [
                outcome.bar.what,
                in_words(outcome.bar, outcome.bar.least),
                in_words(outcome.bar, outcome.bar.aim),
                Cell(in_words(outcome.bar, outcome.value), outcome.value),
                in_words(outcome.bar, outcome.process),
                Cell(outcome.verdict, tone=_TONES[outcome.met]),
            ]
            for outcome in outcomes
        ],
    )


def end_to_end_table(run: Run) -> Table:
    """Decoding through `generate` beside what the operators predict."""
    return Table(
        "End to end: generate",
        ["context", "a token", "predicted", "over predicted", "in processor time", "at most", "verdict"],
        [
            [
                Cell(f"{one.length:,}", one.length),
                Cell(seconds(one.measured), one.measured),
                Cell(seconds(one.predicted), one.predicted),
                Cell(f"{one.ratio:.2f}x", one.ratio),
                Cell(f"{one.process:.2f}x", one.process),
                f"{AT_MOST:g}x",
                Cell("met" if one.met else "missed", tone=_TONES[one.met]),
            ]
            for one in run.end_to_end
        ],
        "Predicted: the donor's time per token after a short context, its attention exchanged for ours.",
    )


def _method(run: Run) -> list[str]:
    busy = " It was busy with other work: trust the processor times, not the clock." if run.busy else ""
    hardware = run.hardware
    text = [
        f"First the correctness gate, against the reference in float64: {'; '.join(run.checked)}.",
        "Then rounds, each contestant once in every one, calls shorter than 0.1 s repeated. `over ours` is "
        "the contestant's median time over equipoise's; its range is that of single rounds.",
        f"`{run.command}` measures the same.",
        f"{hardware.name}, {hardware.cores} cores, {hardware.memory_gib:g} GiB, torch {hardware.torch}, "
        f"Python {hardware.python}. Load average before: {run.load[0]:.1f}, after: {run.load[1]:.1f}.{busy}",
    ]
    if run.setting.dtype == "bfloat16" and run.setting.device == "cpu":
        text.append(f"For bfloat16 this processor has: {hardware.bfloat16 or 'nothing'}.")
    return [*text, *run.notes]


# ---- plots


def plotted(run: Run, measure: str) -> bool:
    """Whether there is more than one length to draw a line through."""
    return len({row.length for row in run.rows if row.measure == measure and row.times}) > 1


def slope(points: Sequence[tuple[int, float]]) -> float:
    """Exponent of time in length: least squares through (log length, log seconds); NaN of one point."""
    if len(points) < 2:
        return math.nan
    x = [math.log(length) for length, _ in points]
    y = [math.log(value) for _, value in points]
    middle = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return products / sum((a - middle[0]) ** 2 for a in x)


def figure(run: Run, measure: str) -> Figure:
    """Time against length, both axes logarithmic, with the fitted slopes."""
    from equipoise.pages.plotting import FONT, SERIES, as_svg, canvas, printable

    drawing, axes = canvas()
    said: list[str] = []
    for place, name in enumerate(_names(run)):
        rows = [r for r in run.rows if (r.name, r.measure) == (name, measure) and r.times is not None]
        points = [(r.length, _time(run, r)) for r in rows]
        if not points:
            continue
        grows = slope(points)
        label = name if math.isnan(grows) else f"{name} (slope {grows:.2f})"
        said.append(label)
        colour = SERIES[place % len(SERIES)]
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, label=printable(label, longest=40), markersize=4
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row.length for row in run.rows if row.measure == measure})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context" if measure == "decode" else "tokens", fontsize=FONT)
    axes.set_ylabel("processor seconds" if run.busy else "seconds", fontsize=FONT)
    axes.legend(fontsize=FONT - 2, frameon=False)
    title = f"{run.theme if run.theme != 'model' else f'model, {measure}'}: time against length"
    return Figure(
        title, as_svg(drawing, salt=f"{run.name}-{measure}"),
        f"Time against length on logarithmic axes: {'; '.join(said)}.",
    )  # fmt: skip


def _time(run: Run, row: Row) -> float:
    assert row.times is not None
    return row.times.process_median if run.busy else row.times.median
