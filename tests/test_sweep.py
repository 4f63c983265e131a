"""Running sweeps: a directory that is made, resumed, refused and repaired."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from rich.console import Console

from equipoise import sweep as sweep_module
from equipoise.audit.report import AuditReport, to_json, validate_audit
from equipoise.config import ConfigError
from equipoise.sweep import LOCK, SweepDonor, SweepError, SweepResult, run_sweep
from equipoise.sweep_plan import SweepConfig, load_sweep, plan
from equipoise.train.convert import convert
from equipoise.train.outputs import OutputError
from support import tiny_model, tiny_tokenizer


def write(folder: Path, name: str = "mine", **values: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> SweepDonor:
    place = tmp_path_factory.mktemp("donors") / "donor"
    tiny_model("llama", vocab_size=300).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return SweepDonor.of(str(place), Console(quiet=True))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    lines = (json.dumps({"text": f"def window{i}(size):\n    return size + {i}\n" * 4}) for i in range(40))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Sweep:
    """A sweep of two windows on the tiny donor, run into one directory."""

    def __init__(self, tmp_path: Path, donor: SweepDonor, corpus: Path) -> None:
        self.output, self.donor = tmp_path / "out", donor
        base = {"data.source": str(corpus), "data.context_length": 64, "transfer.max_steps": 2}
        name = write(
            tmp_path, recipe="zero-shot", base=base, axes={"hybrid.window": [4, 8]}, seeds=[0],
            audit={"documents": 6}, summary="Which window?",
        )  # fmt: skip
        self.config: SweepConfig = load_sweep(name)
        self.console = Console(record=True, width=200, file=io.StringIO())

    def run(self, *, redo: bool = False, **changes: Any) -> SweepResult:
        cells = plan(self.config, **changes)
        return run_sweep(self.config, cells, self.donor, self.output, redo=redo, console=self.console)

    def cell(self, row: str = "window=4") -> Path:
        return self.output / "cells" / f"{row}-seed0"

    def manifest(self, row: str = "window=4") -> dict[str, Any]:
        return json.loads((self.cell(row) / "cell.json").read_text(encoding="utf-8"))

    @property
    def said(self) -> str:
        return self.console.export_text()


@pytest.fixture
def sweep(tmp_path: Path, donor: SweepDonor, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(sweep_module, "write_audit", data_alone)
    return Sweep(tmp_path, donor, corpus)


def data_alone(report: AuditReport, directory: Path) -> None:
    """`write_audit` without its pages, which take longer than all else here."""
    (directory / "audit.json").write_text(to_json(report), encoding="utf-8")


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory, donor: SweepDonor, corpus: Path) -> Path:
    made = Sweep(tmp_path_factory.mktemp("finished"), donor, corpus)
    made.run()
    return made.output


@pytest.fixture
def finished(sweep: Sweep, finished_once: Path) -> Sweep:
    """A sweep that has run."""
    shutil.copytree(finished_once, sweep.output)
    return sweep


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that are really converted."""
    names: list[str] = []

    def noted(donor: str, run: Any, output: Path, **options: Any) -> Any:
        names.append(output.parent.name)
        return convert(donor, run, output, **options)

    monkeypatch.setattr(sweep_module, "convert", noted)
    return names


@pytest.mark.slow
def test_a_sweep_converts_audits_and_compares(
    tmp_path: Path, donor: SweepDonor, corpus: Path, converted: list[str]
) -> None:
    sweep = Sweep(tmp_path, donor, corpus)
    result = sweep.run()
    assert converted == ["window=4-seed0", "window=8-seed0"]
    assert {row.name for row in result.comparison.rows} == {"window=4", "window=8"}
    assert result.failures == {}
    for row in ("window=4", "window=8"):
        audit = json.loads((sweep.cell(row) / "audit.json").read_text(encoding="utf-8"))
        validate_audit(audit)
        assert audit["runs"][0]["recipe"] == row
        assert audit["metric"]["documents"] == len(audit["runs"][0]["documents"]["tokens"])
        assert sweep.manifest(row)["state"] == "finished"
        assert (sweep.cell(row) / "audit.html").is_file()
    assert audit["donor"]["fingerprint"]
    data = json.loads(result.paths["json"].read_text(encoding="utf-8"))
    assert len(data["rows"]) == 2
    assert "Which window?" in (sweep.output / "compare.md").read_text(encoding="utf-8")
    assert "cell 2 of 2: window=8, seed 0, about" in sweep.said


@pytest.mark.slow
def test_a_finished_sweep_is_only_compared_again(finished: Sweep, converted: list[str]) -> None:
    place = finished.output / "compare.json"
    before = place.read_text(encoding="utf-8")
    place.unlink()
    finished.run()
    assert converted == []
    assert place.read_text(encoding="utf-8") == before


@pytest.mark.slow
def test_cells_that_were_killed_or_damaged_are_done_again(finished: Sweep, converted: list[str]) -> None:
    sweep = finished
    killed = {**sweep.manifest(), "state": "started"}
    (sweep.cell() / "cell.json").write_text(json.dumps(killed), encoding="utf-8")
    (sweep.cell() / "model" / "run.json").unlink()  # while converting, without a checkpoint
    (sweep.cell("window=8") / "audit.json").unlink()  # while auditing: the model is whole
    assert len(sweep.run().comparison.rows) == 2
    assert converted == ["window=4-seed0"]
    (sweep.cell() / "cell.json").write_text("{", encoding="utf-8")
    sweep.run()
    assert converted == ["window=4-seed0"] * 2


@pytest.mark.slow
def test_a_killed_conversion_goes_on_from_its_checkpoint(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    """What the conversion itself makes of it is tested in tests/train/test_convert.py."""
    seen: list[bool] = []

    def killed(donor: str, run: Any, output: Path, *, resume: bool, **options: Any) -> Any:
        seen.append(resume)
        if len(seen) == 1:
            (output / "training").mkdir(parents=True)
            start = {"donor": donor, "seed": options["seed"], **run.model_dump(mode="json")}
            (output / "training" / "start.json").write_text(json.dumps(start), encoding="utf-8")
            raise KeyboardInterrupt
        return convert(donor, run, output, resume=resume, **options)

    monkeypatch.setattr(sweep_module, "convert", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    assert sweep.manifest()["state"] == "started"
    sweep.run()
    assert seen == [False, True, False]


@pytest.mark.slow
def test_changed_settings_are_refused(finished: Sweep, converted: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"window=4-seed0: run\.transfer\.max_steps was 2, now 1") as error:
        finished.run(assignments=["transfer.max_steps=1"])
    assert "--redo" in str(error.value)
    assert converted == []


@pytest.mark.slow
def test_changed_settings_are_redone_on_request(finished: Sweep, converted: list[str]) -> None:
    sweep = finished
    before = sweep.manifest()["hash"]
    sweep.run(assignments=["transfer.max_steps=1"], redo=True)
    assert len(converted) == 2
    assert sweep.manifest()["hash"] != before
    assert "made again" in sweep.said


@pytest.mark.slow
def test_another_donor_is_another_setting(finished: Sweep, tmp_path: Path) -> None:
    sweep = finished
    place = tmp_path / "other"
    tiny_model("llama", vocab_size=300, seed=1).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    sweep.donor = SweepDonor.of(str(place), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"donor\.fingerprint was"):
        sweep.run()


@pytest.mark.slow
def test_a_cell_that_fails_is_left_out_and_tried_again(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    def failing(donor: str, run: Any, output: Path, **options: Any) -> Any:
        if run.hybrid.window == 4:
            raise RuntimeError("out of luck")
        return convert(donor, run, output, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sweep_module, "convert", failing)
        result = sweep.run()
    assert result.failures == {"window=4-seed0": "RuntimeError: out of luck"}
    assert [row.name for row in result.comparison.rows] == ["window=8"]
    assert sweep.manifest()["error"] == "RuntimeError: out of luck"
    assert "window=4-seed0" in (sweep.output / "compare.md").read_text(encoding="utf-8")
    assert sweep.run().failures == {}
    assert converted == ["window=4-seed0"]


def test_a_sweep_of_failures_fails(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(sweep_module, "convert", failing)
    with pytest.raises(SweepError, match=r"no cell[\s\S]*window=8-seed0: RuntimeError: out of luck"):
        sweep.run()


def test_two_processes_are_refused(sweep: Sweep, converted: list[str]) -> None:
    sweep.output.mkdir()
    (sweep.output / "sweep.json").touch()
    with FileLock(sweep.output / LOCK), pytest.raises(SweepError, match="another process"):
        sweep.run()
    assert converted == []


def test_somebody_elses_files_are_not_touched(sweep: Sweep) -> None:
    sweep.output.mkdir()
    (sweep.output / "thesis.txt").write_text("three years")
    with pytest.raises(OutputError, match="not empty"):
        sweep.run()


def test_cells_of_different_texts_need_one_to_be_audited_on(sweep: Sweep, tmp_path: Path) -> None:
    axes = {"data.source": ["one.txt", "two.txt"]}
    sweep.config = load_sweep(write(tmp_path, "texts", recipe="zero-shot", axes=axes))
    with pytest.raises(ConfigError, match="name one in the sweep file"):
        sweep.run()
