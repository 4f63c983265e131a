"""`make faults`: every point of injection at every seed, a table, and JSON.

PYTHONPATH=tests python -m faults --seeds 10 --jobs 2 --output out/faults
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1",
                  TOKENIZERS_PARALLELISM="false")  # fmt: skip

import torch
from rich.console import Console
from rich.table import Table

from equipoise.commands.output import quieten
from equipoise.files import write_text
from faults.points import POINTS
from faults.suite import Outcome, World, run_point, to_json

_world: World | None = None


def _begin(place: str) -> None:
    global _world
    torch.set_num_threads(1)
    own = Path(tempfile.mkdtemp(dir=place))
    _world = World(own.resolve())
    _world.warm_up()


def _run(job: tuple[int, int]) -> Outcome:
    assert _world is not None
    return run_point(_world, POINTS[job[0]], job[1])


def _outcomes(jobs: list[tuple[int, int]], workers: int, place: str) -> Iterator[Outcome]:
    quieten()
    import equipoise.train.convert  # noqa: F401  loaded once, for all children

    with multiprocessing.get_context("fork").Pool(workers, _begin, (place,)) as pool:
        yield from pool.imap_unordered(_run, jobs)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="points whose name contains this")
    parser.add_argument("--output", type=Path, default=None, help="directory for faults.json")
    given = parser.parse_args()
    chosen = [i for i, point in enumerate(POINTS) if given.only in point.name]
    jobs = [(index, seed) for seed in range(given.seeds) for index in chosen]
    since, outcomes, console = time.monotonic(), list[Outcome](), Console(width=120)
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        for outcome in _outcomes(jobs, given.jobs, place):
            outcomes.append(outcome)
            if outcome.wrong:
                where = f"{outcome.point}, seed {outcome.seed} ({outcome.recipe}, {outcome.event})"
                console.print(f"{where}: {outcome.wrong}", style="red", markup=False, soft_wrap=True)
    table = Table("injection point", "runs", "lost nothing", "by recipe")
    for index in chosen:
        own = [o for o in outcomes if o.point == POINTS[index].name]
        recipes = ", ".join(f"{r} {sum(o.recipe == r for o in own)}" for r in sorted({o.recipe for o in own}))
        table.add_row(POINTS[index].name, str(len(own)), str(sum(not o.wrong for o in own)), recipes)
    console.print(table)
    failed = sum(bool(o.wrong) for o in outcomes)
    console.print(
        f"{len(chosen)} injection points, {given.seeds} seeds, {len(outcomes)} runs: "
        f"{len(outcomes) - failed} lost nothing and ended bit-equal, {failed} did not; "
        f"{time.monotonic() - since:.0f} s",
        highlight=False,
    )
    if given.output is not None:
        given.output.mkdir(parents=True, exist_ok=True)
        write_text(given.output / "faults.json", to_json(sorted(outcomes, key=lambda o: (o.point, o.seed))))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
