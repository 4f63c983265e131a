"""Run a sweep: every cell is a conversion and its audit; the audits end in one comparison.

OUTPUT/sweep.json                 what was asked for
OUTPUT/cells/ROW-seedN/cell.json  the cell's settings, their hash, and how it went
OUTPUT/cells/ROW-seedN/model      the converted model
OUTPUT/cells/ROW-seedN/audit.*    its audit
OUTPUT/compare.*                  all of them together
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text

from equipoise import __version__
from equipoise.audit.compare import Comparison, compare, read_audit
from equipoise.audit.compare_page import write_comparison
from equipoise.audit.documents import text_fingerprint
from equipoise.audit.evaluate import DocumentScores, RunNote, audit_model
from equipoise.audit.report import AuditReport, Donor, Metric, RunAudit, write_audit
from equipoise.config import ConfigError, RunConfig
from equipoise.data.packing import EvaluationWindow, evaluation_windows
from equipoise.data.sources import absolute_source, load_documents
from equipoise.demo_donor import DonorSettings, cached_donor
from equipoise.files import write_text
from equipoise.models.load import load_config, load_model, load_tokenizer
from equipoise.models.storage import describe_donor
from equipoise.secrets import without_secrets
from equipoise.statistics import ScoreTable
from equipoise.sweep_plan import DEMO, Cell, SweepConfig
from equipoise.train.convert import convert
from equipoise.train.outputs import RUN, START, WORK, prepare_output
from equipoise.train.watching import Watcher

MARK, MANIFEST, CELLS, MODEL = "sweep.json", "cell.json", "cells", "model"
LOCK = ".sweep.lock"
State = Literal["new", "killed", "failed", "changed", "done"]


class SweepError(RuntimeError):
    """A sweep that another process runs, or of which no cell could be finished."""


@dataclass(frozen=True)
class SweepDonor:
    """The model that all cells convert.

    Attributes:
        path: directory, or name on the Hub.
        name: what reports call it.
        described: name, revision and fingerprint, as a checkpoint records them.
    """

    path: str
    name: str
    described: Mapping[str, Any]

    @classmethod
    def of(cls, name_or_path: str, console: Console, *, settings: DonorSettings | None = None) -> SweepDonor:
        """A directory, a name on the Hub, or `demo` for the demo's donor, trained if it is not cached.

        Raises:
            CheckpointError: not a model.
        """
        path = (
            str(cached_donor(settings or DonorSettings(), console)) if name_or_path == DEMO else name_or_path
        )
        described = describe_donor(path, load_config(path))
        name = "the demo's donor" if name_or_path == DEMO else Path(path).name or path
        return cls(path, name if described["fingerprint"] else path, described)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another donor; a directory that was moved is the same one."""
        kept = ("fingerprint",) if self.described["fingerprint"] else ("name", "revision")
        return {key: self.described[key] for key in kept}


WatchersOf = Callable[[RunConfig, str], Sequence[Watcher]]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep came to: its comparison's files by suffix, and why cells failed, by their folder."""

    comparison: Comparison
    paths: Mapping[str, Path]
    failures: Mapping[str, str]


def settings_of(config: SweepConfig, cell: Cell, donor: SweepDonor) -> dict[str, Any]:
    """All that a cell's result depends on. Settings at their defaults are left out, so that a later version
    with one more setting still knows the cell."""
    run = cell.run.model_dump(mode="json", exclude_defaults=True)
    run["data"] = {**run.get("data", {}), "source": absolute_source(cell.run.data.source)}
    return {
        "donor": donor.identity,
        "seed": cell.seed,
        "run": {key: value for key, value in run.items() if key not in ("name", "summary", "reference")},
        "audit": config.audit.model_dump(mode="json", exclude_defaults=True, exclude={"batch_size"}),
    }


def state_of(folder: Path, settings: Mapping[str, Any]) -> tuple[State, list[str]]:
    """Where a cell stands, and which settings differ from those that it was made with."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        before, state = manifest["settings"], manifest["state"]
    except FileNotFoundError:
        return "new", []
    except (ValueError, KeyError, TypeError):  # not what a sweep writes: nothing beside it is trusted
        return "failed", []
    differing = _differences(before, settings)
    if state == "finished":
        if differing:
            return "changed", differing
        return ("done" if (folder / "audit.json").is_file() else "killed"), []
    return ("failed" if state == "failed" or differing else "killed"), []


def run_sweep(
    config: SweepConfig,
    cells: Sequence[Cell],
    donor: SweepDonor,
    output: Path,
    *,
    redo: bool = False,
    console: Console | None = None,
    watchers: WatchersOf | None = None,
) -> SweepResult:
    """Run every cell that is not done, then compare all that are.

    Args:
        config, cells: from `equipoise.sweep_plan`.
        donor: what is converted.
        output: new, empty, or of the same sweep: cells that are done are kept.
        redo: replace cells that were made with other settings; otherwise they are refused.
        console: where progress goes.
        watchers: those a cell's recipe asks for, by its settings and the donor's name; none where None.

    Raises:
        OutputError: the directory holds something else, or cannot be written.
        ConfigError: cells made with other settings, or of different texts.
        SweepError: another process runs this sweep, or no cell could be finished.
    """
    console = console or Console(stderr=True)
    prepare_output(output, shared=(output / MARK).is_file())
    try:
        with FileLock(output / LOCK, timeout=0):
            return _Sweep(config, cells, donor, output, console, watchers).run(redo=redo)
    except Timeout:
        raise SweepError(
            f"{output}: another process is running a sweep there. Wait for it, or choose another --output."
        ) from None


class _Sweep:
    """One run of a sweep, in one process."""

    def __init__(
        self,
        config: SweepConfig,
        cells: Sequence[Cell],
        donor: SweepDonor,
        output: Path,
        console: Console,
        watchers: WatchersOf | None,
    ) -> None:
        self.config, self.cells, self.donor = config, cells, donor
        self.output, self.console, self.watchers = output, console, watchers
        self.settings = {cell.folder: settings_of(config, cell, donor) for cell in cells}
        self.source = config.audit.source or _one_source(cells)
        self._windows: list[EvaluationWindow] | None = None
        self._donor_scores: DocumentScores | None = None

    def run(self, *, redo: bool) -> SweepResult:
        asked = {
            "name": self.config.name,
            "donor": dict(self.donor.described),
            "equipoise_version": __version__,
        }
        _write_json(self.output / MARK, {**asked, "sweep": self.config.model_dump(mode="json")})
        waiting = self._waiting(redo=redo)
        failures: dict[str, str] = {}
        started = time.monotonic()
        for number, cell in enumerate(waiting, 1):
            self._announce(cell, number, len(waiting), time.monotonic() - started)
            try:
                self._run_cell(cell)
            except Exception as error:
                failures[cell.folder] = without_secrets(f"{type(error).__name__}: {error}")
                self._note(cell, "failed", error=failures[cell.folder])
                self._say(f"failed, going on: {failures[cell.folder]}", style="red")
            gc.collect()
        return self._compare(failures)

    def _waiting(self, *, redo: bool) -> list[Cell]:
        """The cells to run; those that are in the way of a changed one are refused or announced."""
        states = {cell.folder: state_of(self._place(cell), self.settings[cell.folder]) for cell in self.cells}
        changed = {folder: differing for folder, (state, differing) in states.items() if state == "changed"}
        if changed:
            listed = "\n".join(f"  {folder}: {'; '.join(what)}" for folder, what in changed.items())
            if not redo:
                raise ConfigError(
                    f"{self.output}: expected the settings that these cells were made with, got others:\n"
                    f"{listed}\nChoose another --output, give the same settings, or replace the cells with "
                    "--redo."
                )
            self._say(f"made with other settings, and made again:\n{listed}", style="yellow")
        done = sum(state == "done" for state, _ in states.values())
        if done:
            self._say(f"{done} of {len(self.cells)} cells are done already")
        return [cell for cell in self.cells if states[cell.folder][0] != "done"]

    def _run_cell(self, cell: Cell) -> None:
        place, started = self._place(cell), time.monotonic()
        goes_on = state_of(place, self.settings[cell.folder])[0] == "killed" and (place / MANIFEST).is_file()
        model = place / MODEL
        if not goes_on or not ((model / RUN).is_file() or (model / WORK / START).is_file()):
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        self._note(cell, "started")
        if not (model / RUN).is_file():
            resume = (model / WORK / START).is_file()
            watchers = () if self.watchers is None else self.watchers(cell.run, self.donor.path)
            convert(
                self.donor.path, cell.run, model, seed=cell.seed, resume=resume, console=self.console,
                watchers=watchers,
            )  # fmt: skip
        table, audit = self._audit(model)
        write_audit(self._report(table, audit), place)
        self._note(cell, "finished", seconds=round(time.monotonic() - started, 1))

    def _audit(self, model: Path) -> tuple[ScoreTable, RunAudit]:
        audit, table, self._donor_scores = audit_model(
            load_model(str(model)), self.windows, RunNote.read(model),
            batch_size=self.config.audit.batch_size, donor=self._donor_scores,
        )  # fmt: skip
        use = audit.verdict.use.replace("_", " ")
        alone = audit.recovered["linear_renormalised"].value
        self._say(
            f"NLL {audit.states['both'].value:.3f}, linear alone recovers {alone:.1%}, {use}", style="green"
        )
        return table, audit

    def _report(self, table: ScoreTable, audit: RunAudit) -> AuditReport:
        donor = Donor.of(table, name=self.donor.name)
        extra = {key: self.donor.described[key] for key in ("revision", "fingerprint")}
        metric = Metric.of(
            table, context_length=self.context, data=f"{self.source} (held out)",
            text_sha256=text_fingerprint(self.windows),
        )  # fmt: skip
        return AuditReport(donor=replace(donor, extra=extra), metric=metric, runs=(audit,))

    @property
    def context(self) -> int:
        """Tokens of context of the audit: as asked, or as in training, and no more than the donor takes."""
        text: Any = load_config(self.donor.path).get_text_config(decoder=True)
        length = self.config.audit.context_length or self.cells[0].run.data.context_length
        return min(length, int(text.max_position_embeddings or length))

    @property
    def windows(self) -> list[EvaluationWindow]:
        """The held-out text, cut once for all cells."""
        if self._windows is None:
            data, audit = self.cells[0].run.data, self.config.audit
            own = audit.source is None
            documents = load_documents(
                self.source, split="validation", subset=data.subset if own else None,
                text_column=data.text_column if own else None,
            )  # fmt: skip
            self._windows = evaluation_windows(
                documents, load_tokenizer(self.donor.path), context_length=self.context,
                limit_documents=audit.documents, max_windows_per_document=audit.max_windows,
            )  # fmt: skip
        return self._windows

    def _compare(self, failures: Mapping[str, str]) -> SweepResult:
        finished = [cell for cell in self.cells if cell.folder not in failures]
        if not finished:
            reasons = "\n".join(f"  {folder}: {why}" for folder, why in failures.items())
            raise SweepError(f"no cell of the sweep could be finished:\n{reasons}")
        comparison = compare(
            [read_audit(self._place(cell)) for cell in finished], judge=self.config.judge,
            published=None if self.config.published is None
            else (self.config.published.label, self.config.published.values),
        )  # fmt: skip
        paths = write_comparison(
            comparison, self.output, title=f"Sweep: {self.config.name}", question=self.config.summary,
            missing=tuple(failures),
        )  # fmt: skip
        return SweepResult(comparison, paths, failures)

    def _place(self, cell: Cell) -> Path:
        return self.output / CELLS / cell.folder

    def _note(self, cell: Cell, state: str, **more: Any) -> None:
        settings = self.settings[cell.folder]
        self._place(cell).mkdir(parents=True, exist_ok=True)
        noted = {
            "state": state,
            "row": cell.row,
            "hash": settings_hash(settings),
            "settings": settings,
            **more,
        }
        _write_json(self._place(cell) / MANIFEST, {**noted, "equipoise_version": __version__})

    def _announce(self, cell: Cell, number: int, total: int, seconds: float) -> None:
        left = (
            f", about {_duration(seconds / (number - 1) * (total - number + 1))} left" if number > 1 else ""
        )
        self._say(f"\ncell {number} of {total}: {cell.row}, seed {cell.seed}{left}", style="bold")

    def _say(self, message: str, *, style: str = "") -> None:
        self.console.print(Text(message, style=style), soft_wrap=True)


def settings_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of a cell's settings, in hexadecimal."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _one_source(cells: Sequence[Cell]) -> str:
    """The one text that all cells train on.

    Raises:
        ConfigError: they train on several.
    """
    sources = sorted({cell.run.data.source for cell in cells})
    if len(sources) > 1:
        raise ConfigError(
            f"expected one text to audit all cells on, but they train on {', '.join(sources)}; name one in "
            "the sweep file, as audit: {source: …}."
        )
    return sources[0]


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{prefix}.{key}".strip("."))
        ]
    return [] if before == now else [f"{prefix} was {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{minutes} min"
        if minutes < 100
        else f"{minutes / 60:.1f} h"
    )


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_text(path, text)


__all__ = ["SweepDonor", "SweepError", "SweepResult", "run_sweep", "settings_of", "state_of"]
