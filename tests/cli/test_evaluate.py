"""equipoise evaluate and equipoise lm-eval, from the command line to the files they write."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager

import equipoise
from benchmark_support import write_tasks
from equipoise.config import HybridConfig
from equipoise.evaluate import benchmark_run
from equipoise.models.auto import record_donor
from equipoise.models.load import load_donor
from support import tiny_tokenizer

from .conftest import Cli


@pytest.fixture(scope="module", autouse=True)
def own_data_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def hybrid(donor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta checkpoint of the tiny donor."""
    place = tmp_path_factory.mktemp("hybrids") / "hybrid"
    model: Any = equipoise.hybridize(load_donor(str(donor)), HybridConfig(window=4))
    record_donor(model, str(donor))
    model.save_pretrained(place, delta=True)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def evaluate(cli: Cli, hybrid: Path, folder: Path, tmp_path: Path) -> Cli:
    """The verb on the hybrid and the local tasks, results in tmp_path/out; options can be added."""

    def run(*more: object, model: Path = hybrid, tasks: str = "two,pair", where: Path = folder) -> Any:
        return cli(
            "evaluate", model, "--tasks", tasks, "--include-path", where, "--output", tmp_path / "out",
            "--resamples", 50, *more,
        )  # fmt: skip

    return run


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "out" / "evaluate.json").read_text())


def test_evaluate_writes_table_and_report(evaluate: Cli, hybrid: Path, folder: Path, tmp_path: Path) -> None:
    branches = "both,window_renormalised,none"
    done = evaluate("--branches", branches, "--limit", 2, "--num-fewshot", "0,two=2", tasks="two,pair,told")
    assert done.exit_code == 0, done.stderr
    assert "in 4 states: softmax, both, window_renormalised, none" in done.stderr
    assert "softmax (donor)" in done.stdout
    assert re.search(r"branch state .*two.*told.*average.*pair.*recovered.*above chance", done.stdout)
    data = results(tmp_path)
    assert list(data["states"]) == ["softmax", "both", "window_renormalised", "none"]
    assert data["settings"]["lm_eval"].startswith("0.4.")
    assert data["settings"]["seeds"] == {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    facts = {
        name: (task["documents"], task["num_fewshot"], task["version"])
        for name, task in data["tasks"].items()
    }
    assert facts == {
        "two": (2, 2, "1.5"), "pair_small": (2, 0, "1.5"), "pair_large": (2, 0, "1.5"), "told": (2, 0, "1.5"),
    }  # fmt: skip
    donor = data["states"]["softmax"]
    parts = [donor["scores"][name]["value"] for name in ("two", "pair", "told")]
    assert donor["average"]["value"] == pytest.approx(sum(parts) / 3)
    assert donor["recovered"]["value"] in (1, None)  # None where nothing was answered
    for file in ("evaluate.md", "evaluate.html"):
        assert "window_renormalised" in (tmp_path / "out" / file).read_text()
    for file in data["settings"]["score_files"].values():
        assert (tmp_path / "out" / file).is_file()


def test_json_is_all_there_is_on_stdout(evaluate: Cli, tmp_path: Path) -> None:
    done = evaluate("--branches", "both", "--limit", 2, "--no-donor", "--json", tasks="two")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "evaluate.json").read_text()
    assert list(results(tmp_path)["states"]) == ["both"]


def test_interrupted_run_goes_on_without_repeating_states(
    evaluate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    score, stop_at = benchmark_run.score_state, ["window"]

    def counted(lm: Any, state: Any, *rest: Any, **settings: Any) -> Any:
        if state.name in stop_at:
            raise KeyboardInterrupt
        ran.append(state.name)
        return score(lm, state, *rest, **settings)

    monkeypatch.setattr(benchmark_run, "score_state", counted)
    command = ("--branches", "both,window,none", "--limit", 3)
    stopped = evaluate(*command)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in stopped.stderr
    assert ran == ["softmax", "both"]
    assert not (tmp_path / "out" / "evaluate.json").exists()
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 2

    stop_at.clear()
    done = evaluate(*command)
    assert done.exit_code == 0, done.stderr
    assert "kept from before: softmax, both" in done.stderr
    assert ran == ["softmax", "both", "window", "none"]
    whole = results(tmp_path)

    monkeypatch.setattr(benchmark_run, "EquipoiseLM", None)  # the report alone needs no model
    again = evaluate(*command)
    assert again.exit_code == 0, again.stderr
    assert results(tmp_path) == whole


@pytest.mark.parametrize("change", ["limit", "seed", "data", "model"])
def test_other_settings_are_not_taken_for_the_same(
    evaluate: Cli, hybrid: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    where = write_tasks(tmp_path / "tasks")
    assert evaluate("--branches", "both", "--no-donor", "--limit", 2, tasks="two", where=where).exit_code == 0
    options: dict[str, Any] = {"limit": 2, "model": hybrid}
    more: tuple[object, ...] = ()
    if change == "limit":
        options["limit"] = 3
    elif change == "seed":
        more = ("--seed", 1)
    elif change == "data":
        lines = (where / "two.jsonl").read_text().splitlines()
        (where / "two.jsonl").write_text("\n".join(reversed(lines)))
    else:
        monkeypatch.setattr(benchmark_run, "model_fingerprint", lambda name: "another")
    done = evaluate(
        "--branches", "both", "--no-donor", "--limit", options["limit"], *more, tasks="two", where=where
    )
    assert done.exit_code == 0, done.stderr
    assert "kept from before" not in done.stderr
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 2


def test_plain_model_has_the_row_softmax(evaluate: Cli, donor: Path, tmp_path: Path) -> None:
    done = evaluate("--limit", 2, model=donor, tasks="two")
    assert done.exit_code == 0, done.stderr
    assert list(results(tmp_path)["states"]) == ["softmax"]


@pytest.mark.parametrize(
    ("options", "tasks", "code", "words"),
    [
        (("--branches", "windw"), "two", 2, ("unknown branch state 'windw'", "Did you mean 'window'?")),
        (("--branches", ""), "two", 2, ("comma-separated branch states",)),
        ((), "pair,pair_small", 2, ("task pair_small is asked for twice",)),
        ((), "two,", 2, ("--tasks: expected comma-separated names",)),
        (("--limit", "1"), "two", 2, ("--limit",)),
        (("--num-fewshot", "x"), "two", 2, ("--num-fewshot: expected a whole number",)),
        (("--metric", "acc"), "two", 2, ("--metric: expected TASK=NAME",)),
        (("--metadata", "{"), "two", 2, ("--metadata: expected JSON",)),
        (("--metadata", "[1]"), "two", 2, ("--metadata: expected a JSON object",)),
    ],
)
def test_options_that_cannot_be_used(
    evaluate: Cli, tmp_path: Path, options: tuple[str, ...], tasks: str, code: int, words: tuple[str, ...]
) -> None:
    done = evaluate(*options, tasks=tasks)
    assert done.exit_code == code, done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (tmp_path / "out").exists()
    for word in words:
        assert word in done.stderr


def test_unknown_task(evaluate: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _leave_out_lm_evals_own_tasks(monkeypatch)
    done = evaluate(tasks="twoo")
    assert done.exit_code == 2
    assert "unknown task 'twoo'. Did you mean 'two'? Readable tasks in" in done.stderr
    assert not (tmp_path / "out").exists()


def test_branches_of_a_model_without(evaluate: Cli, donor: Path, tmp_path: Path) -> None:
    done = evaluate("--branches", "both,none", model=donor)
    assert done.exit_code == 2
    assert "this model is not converted, so it has no branches to switch" in done.stderr


def test_without_lm_eval(evaluate: Cli, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "equipoise.evaluate"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("harness", "benchmark_run"):
        monkeypatch.delattr(sys.modules.get("equipoise.evaluate", object), name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for done in (evaluate(), cli("lm-eval", "ls", "tasks")):
        assert done.exit_code == 1
        assert "lm-eval is not installed" in done.stderr
        assert "pip install 'equipoise[eval]'" in done.stderr
    assert not (tmp_path / "out").exists()


def _leave_out_lm_evals_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading its 14,000 takes seconds."""
    real = TaskManager.__init__

    def init(self: Any, *args: Any, **settings: Any) -> None:
        real(self, *args, **{**settings, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", init)


def test_listing_in_the_guide_runs(
    cli: Cli, hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    (tmp_path / "my-tasks").mkdir()
    for kind, name in (("yaml", "opposites.yaml"), ("json", "opposites.jsonl")):
        (listing,) = re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        (tmp_path / "my-tasks" / name).write_text(listing, encoding="utf-8")
    command = next(
        line for line in text.splitlines() if line.startswith("equipoise evaluate out/ssd --tasks opposites")
    )
    monkeypatch.chdir(tmp_path)
    done = cli(*command.replace("out/ssd", str(hybrid)).split()[1:], "--resamples", 20)
    assert done.exit_code == 0, done.stderr
    table = json.loads((tmp_path / "out" / "opposites" / "evaluate.json").read_text())
    assert (table["tasks"]["opposites"]["documents"], table["average_chance"]) == (3, 0.5)


# ---- lm-eval's own command line


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """lm-eval's command line sets up its logger for the whole process."""
    logger = logging.getLogger("lm_eval")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.mark.usefixtures("logging_as_before")
@pytest.mark.filterwarnings("ignore")  # of what lm-eval asks about the machine
def test_passthrough_and_evaluate_agree(
    evaluate: Cli, cli: Cli, hybrid: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator

    _leave_out_lm_evals_own_tasks(monkeypatch)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # runs pip, among others
    done = cli(
        "lm-eval", "run", "--model", "equipoise", "--model_args", f"pretrained={hybrid},branch=linear",
        "--tasks", "pair,two", "--include_path", folder, "--output_path", tmp_path / "raw",
        "--num_fewshot", 1, "--batch_size", 4,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    (file,) = (tmp_path / "raw").rglob("results_*.json")
    raw = json.loads(file.read_text())["results"]
    ours = evaluate("--branches", "linear", "--no-donor", "--num-fewshot", 1)
    assert ours.exit_code == 0, ours.stderr
    state = results(tmp_path)["states"]["linear"]
    assert state["scores"]["two"]["value"] == pytest.approx(raw["two"]["acc,none"])
    assert state["scores"]["pair"]["value"] == pytest.approx(raw["pair"]["acc,none"])
    for task in ("two", "pair_small", "pair_large"):
        assert state["reported"][task]["acc,none"] == pytest.approx(raw[task]["acc,none"])


@pytest.mark.usefixtures("logging_as_before")
def test_passthrough_shows_lm_evals_own_help_and_errors(cli: Cli, hybrid: Path) -> None:
    helped = cli("lm-eval", "run", "--help")
    assert helped.exit_code == 0
    assert "--model_args" in helped.stdout
    assert "--model equipoise --model_args pretrained=DIR,branch=window" in helped.stderr
    assert cli("lm-eval", "run", "--no-such-option").exit_code == 2


@pytest.mark.usefixtures("logging_as_before")
def test_passthrough_words_what_goes_wrong(
    cli: Cli, hybrid: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _leave_out_lm_evals_own_tasks(monkeypatch)
    common = ("lm-eval", "--model", "equipoise", "--include_path", folder)
    unknown = cli(*common, "--model_args", f"pretrained={hybrid},brnch=window", "--tasks", "two")
    assert (unknown.exit_code, "Did you mean 'branch'?" in unknown.stderr) == (2, True)
    missing = cli(*common, "--model_args", f"pretrained={hybrid}", "--tasks", "twoo")
    assert (missing.exit_code, "error: lm-eval: Tasks not found: twoo" in missing.stderr) == (1, True)
