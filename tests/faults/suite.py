"""Runs that are struck and resumed, each held against one that was left alone."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from equipoise.files import damage
from equipoise.train.ending import LOCK
from equipoise.train.stage_files import StageResult, finished_result, latest_checkpoint, step_of
from faults.events import Event, Stream, install
from faults.platter import Platter
from faults.points import KILLED, Point
from faults.strikes import killed

RECIPES: dict[str, str] = {
    # no watching: a look costs more than a step
    "both": "extends: ssd\nhybrid: {window: 4}\nwatch: null\n"
    "transfer: {max_steps: 4, batch_size: 2, micro_batch_size: 1, save_every: 2}\n"
    "finetune: {max_steps: 4, batch_size: 2, save_every: 2}\n",
    "chosen": "extends: hedgecats\nhybrid: {window: 4}\nwatch: null\ncheckpoint: full\n"
    "transfer: {max_steps: 2, batch_size: 2, save_every: 1}\n"
    "finetune: {max_steps: 6, batch_size: 2, learning_rate: 0.3,\n"
    "  early_stopping: {every: 1, watch: loss, mode: best, patience: 3}}\n",
    "lora": "extends: lora-only\nfinetune: {max_steps: 5, batch_size: 2, save_every: 2}\n",
}
"""Both stages with accumulation; early stopping with its best checkpoint, saved whole; stage 2 alone."""
_TIMES = ("seconds", "runtime", "per_second", "train_loss", "total_flos")


class FaultError(AssertionError):
    """What a run lost, or did that it should not have."""


@dataclass(frozen=True)
class Outcome:
    """One struck run: the recipe, the event, and what went wrong (nothing where it is empty)."""

    point: str
    seed: int
    recipe: str
    event: str
    kept_steps: int
    wrong: str
    seconds: float


class World:
    """A directory with a donor, text, recipes, and one reference run of each recipe."""

    def __init__(self, place: Path) -> None:
        from support import tiny_model, tiny_tokenizer

        self.place, self.out = place, place / "out"
        donor = place / "donor"
        model = tiny_model(vocab_size=300, hidden_size=16, intermediate_size=16, num_attention_heads=2,
                           num_key_value_heads=1, head_dim=8)  # fmt: skip
        model.save_pretrained(donor, max_shard_size="10KB")
        tiny_tokenizer().save_pretrained(donor)
        lines = (json.dumps({"text": f"def window{i}(size):\n    return size + {i}\n"}) for i in range(60))
        (place / "text.jsonl").write_text("\n".join(lines))
        for name, text in RECIPES.items():
            more = f"data: {{source: {place / 'text.jsonl'}, context_length: 16, max_tokens: 1500}}\n"
            (place / f"{name}.yaml").write_text(f"{text}precision: float32\n{more}")
        self.ranks = 1
        self.known: dict[tuple[str, int], list[Event]] = {}
        self.command: Any = None
        self.donor = {path: path.read_bytes() for path in sorted(donor.glob("*.safetensors"))}
        assert len(self.donor) > 2

    def refer(self, recipe: str) -> list[Event]:
        """Events of a recipe's reference run on as many ranks, which is made if it is not there."""
        key = (recipe, self.ranks)
        if key not in self.known:
            self.clear()
            code, told = self.run(recipe, Stream(self.place, self.place / "events.log"))
            if code != 0:
                raise FaultError(f"the reference run of {recipe} failed: {told}")
            self.known[key] = self.logged()
            shutil.copytree(self.out, self.reference(recipe))
        return self.known[key]

    def reference(self, recipe: str) -> Path:
        """The result of a run that was left alone."""
        return self.place / f"reference-{recipe}-{self.ranks}"

    def clear(self) -> None:
        for name in ("out", "cache"):
            shutil.rmtree(self.place / name, ignore_errors=True)
        (self.place / "cache").mkdir()
        (self.place / "events.log").unlink(missing_ok=True)

    def logged(self) -> list[Event]:
        """Events of the last run."""
        path = self.place / "events.log"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = (line.rpartition(" ") for line in lines)
        names = ("committed", "optimised", "before optimising")
        return [
            Event(line.removesuffix(" ")[: len(n)], line[len(n) + 1 :])
            if (n := next((n for n in names if line.startswith(n + " ")), None))
            else Event(what, name)
            for line, (what, _, name) in zip(lines, found, strict=True)
        ]

    def run(self, recipe: str, stream: Stream, *, power: bool = False, wait: bool = True) -> tuple[int, str]:
        """`equipoise convert --resume` in a forked child: (exit code, what it printed).

        The code is minus the signal that killed it. Without ``wait``, returns the child's process id as soon
        as it is stopped.
        """
        if self.ranks > 1:
            return self._run_ranks(recipe, [stream] * self.ranks)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._become(recipe, stream, power)
        _, status = os.waitpid(child, 0 if wait else os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return child, "stopped"
        return os.waitstatus_to_exitcode(status), self.told()

    def run_struck_rank(self, recipe: str, struck: int, stream: Stream) -> tuple[int, str]:
        """The same on `ranks` ranks, one of which is struck: what is left of the others."""
        streams = [Stream(self.place) for _ in range(self.ranks)]
        streams[0] = Stream(self.place, self.place / "events.log")
        streams[struck] = stream
        return self._run_ranks(recipe, streams, struck)

    def _run_ranks(
        self, recipe: str, streams: Sequence[Stream], struck: int | None = None
    ) -> tuple[int, str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        sys.stdout.flush()
        children: list[int] = []
        for rank, stream in enumerate(streams):
            child = os.fork()
            if child == 0:
                os.environ.update(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.ranks), MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port, EQUIPOISE_TIMEOUT="60",
                )  # fmt: skip
                stream.log = stream.log if rank == 0 else None
                self._become(recipe, stream, power=False, told=f"told-{rank}.txt")
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if struck is not None and codes[struck] != KILLED:
            raise FaultError(f"rank {struck} ended with {codes[struck]}, expected {KILLED}")
        left = [rank for rank in range(self.ranks) if rank != struck]
        worst = max(left, key=lambda rank: abs(codes[rank]))
        told = [(self.place / f"told-{rank}.txt").read_text(encoding="utf-8") for rank in left]
        return codes[worst], "".join(told)

    def warm_up(self) -> None:
        """Load once what runs load on their way, and keep it out of their garbage collections."""
        from equipoise.cli import app
        from equipoise.commands import convert

        self.command = typer.main.get_command(app)
        convert.resolve = _once(convert.resolve)
        os.environ["EQUIPOISE_CACHE"] = str(self.place / "cache")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            for recipe in RECIPES:
                self.clear()
                with contextlib.suppress(SystemExit), contextlib.redirect_stdout(nowhere):
                    self.convert(recipe)
        gc.collect()
        gc.freeze()

    def convert(self, recipe: str) -> None:
        """The command line."""
        self.command(["convert", str(self.place / "donor"), "--recipe", str(self.place / f"{recipe}.yaml"),
                      "--output", str(self.out), "--resume"], prog_name="equipoise")  # fmt: skip

    def told(self) -> str:
        return (self.place / "told.txt").read_text(encoding="utf-8", errors="replace")

    def _become(self, recipe: str, stream: Stream, power: bool, told: str = "told.txt") -> None:
        """In the child: the command line, and nothing after it."""
        code = 99
        try:
            os.environ["EQUIPOISE_CACHE"] = str(self.place / "cache")
            handle = os.open(self.place / told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            if power:
                self.out.mkdir()
                stream.platter = Platter([self.out, self.place / "cache"])
            install(stream)
            self.convert(recipe)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _once(resolve: Any) -> Any:
    """Settings are frozen: reading a recipe once is enough for all runs of it."""
    known: dict[str, Any] = {}
    return lambda recipe, **given: known.get(recipe) or known.setdefault(recipe, resolve(recipe, **given))


def run_point(world: World, point: Point, seed: int) -> Outcome:
    """Strike one run, resume it, and compare."""
    draw = random.Random(f"{point.name} {seed}")
    recipe, event, kept = "", "", 0
    since = time.perf_counter()
    world.ranks = point.ranks
    try:
        recipe, nth, event = _draw_moment(world, point, draw)
        world.clear()
        stream = Stream(world.place, world.place / "events.log")
        stream.aim(point.at, nth, point.strike(draw))
        if point.ranks > 1:
            code, told = world.run_struck_rank(recipe, draw.randrange(point.ranks), stream)
        else:
            code, told = world.run(recipe, stream, power=point.power)
        _check_end(world, point, code, told)
        _check_kept(world, point)
        if point.tamper is not None:
            point.tamper(world.out, draw)
        kept = _check_passed_over(world, point)
        if point.donor is not None:
            _refused(world, recipe, point.donor, draw)
        if point.again:
            again = Stream(world.place, world.place / "again.log")
            again.aim(lambda e: True, draw.randrange(150), killed)
            if world.run(recipe, again)[0] not in (KILLED, 0, 2):
                raise FaultError(f"struck again, it ended with {world.told()[-300:]!r}")
            kept = _kept_steps(world)
        _resume(world, recipe, kept)
        wrong = ""
    except FaultError as error:
        wrong = str(error)
    return Outcome(point.name, seed, recipe, event, kept, wrong, round(time.perf_counter() - since, 2))


def _refused(world: World, recipe: str, change: Callable[[Path, random.Random], None], draw: Any) -> None:
    """With a shard of its donor changed the run does not go on, says why, and loses nothing."""
    shard = draw.choice(list(world.donor))
    kept = _kept_steps(world)
    change(shard, draw)
    try:
        code, told = world.run(recipe, Stream(world.place))
    finally:
        shard.write_bytes(world.donor[shard])
    if code != 1 or shard.name not in told or "Traceback" in told or "not foreseen" in told:
        raise FaultError(f"with {shard.name} of the donor damaged, it ended with {code}: {told[-300:]!r}")
    if _kept_steps(world) != kept:
        raise FaultError(f"with {shard.name} of the donor damaged, steps were lost")


def _draw_moment(world: World, point: Point, draw: random.Random) -> tuple[str, int, str]:
    """(recipe, which of its matching events, that event's text)."""
    recipes = sorted(RECIPES)
    draw.shuffle(recipes)
    for recipe in recipes:
        found = [e for e in world.refer(recipe) if point.at(e)]
        if point.name == "damaged: best checkpoint" and recipe != "chosen":
            continue
        if point.name.endswith("finished stage") and recipe == "lora":
            continue
        if found:
            nth = draw.randrange(len(found))
            return recipe, nth, str(found[nth])
    raise FaultError("no recipe comes by here")


def _check_end(world: World, point: Point, code: int, told: str) -> None:
    if "Traceback" in told or "not foreseen" in told:
        raise FaultError(f"it ended without a clear message: {told[-500:]!r}")
    if code == 0 and point.name.startswith(("SIG", "files cannot")) and (world.out / "run.json").is_file():
        return  # it came when all was done
    if code != point.ends:
        raise FaultError(f"it ended with {code}, expected {point.ends}: {told[-300:]!r}")
    if code > 0 and not told.rpartition("error: ")[1]:
        raise FaultError(f"it did not say what is wrong: {told[-300:]!r}")
    if point.words and not any(words in told for words in point.words):
        raise FaultError(f"expected {point.words} in {told[-300:]!r}")


def _check_kept(world: World, point: Point) -> None:
    """Every checkpoint that was committed is still there, or a later one; a result is there whole or not."""
    out = world.out
    if (out / "run.json").is_file():
        fault = damage(out)
        if fault is not None:
            raise FaultError(f"run.json is there, but the result is not: {fault}")
        return
    committed = [e.name.split() for e in world.logged() if e.what == "committed"]
    if not committed:
        return
    stage, step = committed[-1][0], int(committed[-1][1])
    place = out / "training" / stage
    if finished_result(place) is not None:
        return
    found = latest_checkpoint(place)
    if found is None or step_of(found) < step:
        raise FaultError(f"checkpoint {step} of {stage} was written, but {found} is the last that is whole")


def _kept_steps(world: World) -> int:
    """Optimiser steps that need not be taken again."""
    if (world.out / "run.json").is_file():
        return 1 << 30
    steps = 0
    for stage in ("transfer", "finetune"):
        place = world.out / "training" / stage
        done: StageResult | None = finished_result(place)
        last = latest_checkpoint(place)
        steps += done.steps if done is not None else step_of(last) if last is not None else 0
    return steps


def _check_passed_over(world: World, point: Point) -> int:
    """The steps kept after the damage: all but those since the checkpoint before."""
    kept = _kept_steps(world)
    committed = [e.name.split() for e in world.logged() if e.what == "committed"]
    if point.tamper is None or point.passed_over is None or point.passed_over == 0 or not committed:
        return kept
    stage = committed[-1][0]
    steps = [int(step) for name, step in committed if name == stage]
    found = latest_checkpoint(world.out / "training" / stage)
    if found is None or step_of(found) < steps[-1 - point.passed_over]:
        raise FaultError(f"of checkpoints {steps} of {stage}, one was damaged, and {found} is the last")
    return kept


def _resume(world: World, recipe: str, kept: int) -> None:
    done = (world.out / "run.json").is_file() and not (world.out / "training").exists()
    log = world.place / "resumed.log"
    log.unlink(missing_ok=True)
    code, told = world.run(recipe, Stream(world.place, log))
    if done:
        if code != 2 or "nothing to resume" not in told:
            raise FaultError(f"finished, then resumed, it ended with {code}: {told[-300:]!r}")
        (world.out / LOCK).unlink(missing_ok=True)
    elif code != 0:
        raise FaultError(f"resumed, it ended with {code}: {told[-500:]!r}")
    total = sum(e.what == "optimised" for e in world.refer(recipe))
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    taken = Counter(line.split()[0] for line in text.splitlines())["optimised"]
    if taken != max(0, total - kept):
        raise FaultError(f"{min(kept, total)} of {total} steps were kept, but {taken} were taken again")
    compare(world.reference(recipe), world.out)


def compare(reference: Path, found: Path) -> None:
    """Equal to the last bit, but for the times in run.json.

    Raises:
        FaultError: names the first file that differs.
    """
    files = [{p.relative_to(d).as_posix() for p in d.rglob("*")} for d in (reference, found)]
    if files[0] != files[1]:
        raise FaultError(f"other files than the run left alone: {sorted(files[0] ^ files[1])}")
    for name in sorted(n for n in files[0] if (reference / n).is_file()):
        one, other = (reference / name).read_bytes(), (found / name).read_bytes()
        if name in ("run.json", "manifest.json"):
            one, other = (_timeless(json.loads(text)) for text in (one, other))
        if one != other:
            raise FaultError(f"{name} differs from the run left alone")


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not k.endswith((*_TIMES, "run.json"))}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def to_json(outcomes: list[Outcome]) -> str:
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=1)
