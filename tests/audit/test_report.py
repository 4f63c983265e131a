"""Reports: a fixed JSON layout, and files that appear at once."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.audit.report import (
    AuditReport,
    ControlSetting,
    audit_run,
    to_dict,
    to_json,
    validate_audit,
    write_audit,
)
from equipoise.statistics import Estimate
from sample_audit import PATTERNS, facts, make_report, scores


@pytest.fixture(scope="module")
def report() -> AuditReport:
    return make_report()


def test_verdicts_come_from_the_scores(report: AuditReport) -> None:
    uses = {run.recipe: run.verdict.use for run in report.runs}
    assert uses == {
        "swa-sinks": "window_only",
        "lolcats": "collapsed",
        "hedgecats": "balanced",
        "ssd": "balanced",
        "dead-but-used": "imbalanced",
    }


def test_json_round_trips_and_validates(report: AuditReport) -> None:
    audit = json.loads(to_json(report))
    validate_audit(audit)
    assert audit == to_dict(report)
    run = audit["runs"][1]
    assert run["states"]["none"]["nll"] > run["states"]["both"]["nll"]
    assert run["recovered"]["linear_renormalised"]["value"] == pytest.approx(-0.54, abs=0.01)
    control = run["control"]
    assert control["difference"]["value"] == pytest.approx(control["nll"] - run["states"]["both"]["nll"])
    assert audit["runs"][0]["control"] is None
    assert audit["donor"]["revision"] is None


def test_guards_are_in_the_report(report: AuditReport, tmp_path: Path) -> None:
    audit = to_dict(report)
    assert audit["runs"][0]["guards"] == {
        "windows": 4, "features": 0, "denominators": 3, "state": 0.0005, "layers": [1],
    }  # fmt: skip
    write_audit(report, tmp_path)
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "over 4 windows: 0 features past the dtype, 3 vanishing denominators, 0.05% of" in page
    audit["runs"][0]["guards"] = None
    validate_audit(audit)
    del audit["runs"][0]["guards"]  # audits from before have none
    validate_audit(audit)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 2),
        (("runs",), []),
        (("runs", 0, "verdict", "use"), "great"),
        (("runs", 0, "states", "both", "nll"), None),
        (("runs", 0, "states", "both", "ci95"), [1.0]),
        (("runs", 0, "surprise"), 1),
        (("metric", "interval"), 0.9),
    ],
)
def test_schema_rejects(report: AuditReport, path: tuple[str | int, ...], value: object) -> None:
    audit = json.loads(to_json(report))
    target = audit
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match="violation"):
        validate_audit(audit)


def test_schema_wants_every_state(report: AuditReport) -> None:
    audit = json.loads(to_json(report))
    del audit["runs"][0]["recovered"]["linear_renormalised"]
    with pytest.raises(ValueError, match="runs/0/recovered"):
        validate_audit(audit)


def test_undefined_figures_are_null_and_unmeasured_ones_an_error(report: AuditReport) -> None:
    run = report.runs[0]
    nothing = Estimate(math.nan, (-math.inf, math.inf))
    gaps = replace(report, runs=[replace(run, recovered={**run.recovered, "both": nothing})])
    audit = json.loads(to_json(gaps))
    validate_audit(audit)
    assert audit["runs"][0]["recovered"]["both"] == {"value": None, "ci95": [None, None]}
    broken = replace(report, runs=[replace(run, states={**run.states, "both": nothing})])
    with pytest.raises(ValueError, match="finite NLL"):
        to_dict(broken)


def test_empty_reports_and_shadowed_fields_are_refused(report: AuditReport) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        to_dict(replace(report, runs=[]))
    with pytest.raises(ValueError, match="rename"):
        to_dict(replace(report, donor=replace(report.donor, extra={"nll": 0.0})))


def test_only_likelihoods_are_reported() -> None:
    table = replace(scores(PATTERNS["ssd"]), metric="accuracy")
    with pytest.raises(ValueError, match="'accuracy'"):
        audit_run(
            table, recipe="x", seed=0, has_window=True, has_linear=True, facts=facts(), benefit_reason="none"
        )


def test_a_control_must_be_measured() -> None:
    with pytest.raises(KeyError, match="missing_control"):
        audit_run(
            scores(PATTERNS["ssd"]), recipe="x", seed=0, has_window=True, has_linear=True, facts=facts(),
            benefit_reason="none", resamples=5,
            control=ControlSetting(window=1, sinks=0, state_bytes=1, state="missing_control"),
        )  # fmt: skip


def test_writing(report: AuditReport, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    paths = write_audit(report, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["audit.html", "audit.json", "audit.md"]
    validate_audit(json.loads(paths["json"].read_text(encoding="utf-8")))
    assert paths["json"].stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_report(
    report: AuditReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_audit(report, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_audit(report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_that_cannot_be_rendered_writes_nothing(report: AuditReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one run"):
        write_audit(replace(report, runs=[]), tmp_path / "out")
    assert not (tmp_path / "out").exists()
