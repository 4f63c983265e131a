"""Every verb on a tiny donor: what it writes, and where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from equipoise import __version__
from equipoise.audit.report import validate_audit
from equipoise.cli import app
from equipoise.commands.audit import AuditOptions, inspect, read_text
from equipoise.models.branches import BRANCH_STATES
from equipoise.train.recipes import load_recipe, recipe_names

from .conftest import Cli

SMALL = (
    "audit",
    "card",
    "compare",
    "demo",
    "export",
    "generate",
    "import-lolcats",
    "plan",
    "recall-demo",
    "recipes",
    "sweep",
    "verify",
)
VERBS = (*SMALL, "attribute", "convert", "bench", "evaluate", "recall")

QUICK = ("lolcats", "lora-only", "ssd", "swa-sinks", "t2r")
"""Recipes that stand for all where time counts: each takes another way through a conversion."""


@pytest.fixture(scope="module")
def hybrids(donor: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two conversions of the donor, made once."""
    folder = tmp_path_factory.mktemp("hybrids")
    for recipe in ("ssd", "swa-sinks"):
        done = CliRunner().invoke(
            app,
            [
                "convert", str(donor), "--recipe", recipe, "--output", str(folder / recipe), "--data",
                str(corpus), "--max-steps", "2", "--set", "data.context_length=64", "--set",
                "hybrid.window=8",
            ],
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
    return {recipe: folder / recipe for recipe in ("ssd", "swa-sinks")}


# ---- the command itself


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"equipoise {__version__}\n"


def test_no_verb_shows_help_and_is_wrong_usage(cli: Cli) -> None:
    done = cli()
    assert done.exit_code == 2
    assert "Usage: equipoise" in done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_has_an_example(cli: Cli, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli(verb, "--help")
    assert done.exit_code == 0
    assert f"\n  equipoise {verb}" in done.stdout
    assert len(done.stdout.splitlines()) <= (32 if verb in SMALL else 44)


def test_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "equipoise", "--version"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"equipoise {__version__}\n")


# ---- recipes


def test_recipes_lists_all_that_ship(cli: Cli) -> None:
    done = cli("recipes")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in recipe_names())


def test_recipes_json(cli: Cli) -> None:
    listed = json.loads(cli("recipes", "--json").stdout)
    assert [entry["name"] for entry in listed] == recipe_names()
    assert next(e for e in listed if e["name"] == "ssd")["stages"] == ["transfer", "finetune"]


@pytest.mark.parametrize(
    ("name", "options"), [("ssd", ()), *((name, ("--explain",)) for name in recipe_names())]
)
def test_recipe_shown_is_a_recipe(cli: Cli, tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    done = cli("recipes", name, *options)
    assert done.exit_code == 0
    copy = tmp_path / "copy.yaml"
    copy.write_text(done.stdout, encoding="utf-8")
    assert load_recipe(str(copy)) == load_recipe(name)
    assert ("# w, the number of last tokens" in done.stdout) == (bool(options) and name != "lora-only")


def test_recipe_json_is_the_same(cli: Cli) -> None:
    assert json.loads(cli("recipes", "ssd", "--json").stdout) == yaml.safe_load(cli("recipes", "ssd").stdout)


# ---- convert


@pytest.mark.parametrize(
    "recipe",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in recipe_names()],
)
def test_convert_makes_a_model_of_every_recipe(convert: Cli, tmp_path: Path, recipe: str) -> None:
    done = convert(recipe)
    assert done.exit_code == 0, done.stderr
    out = tmp_path / "out"
    assert str(out) in done.stdout
    verb = "generate" if recipe == "lora-only" else "audit"
    assert f"next: equipoise {verb} {out}" in done.stdout
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    assert not (out / "training").exists()
    note = json.loads((out / "run.json").read_text())
    assert {stage["steps"] for stage in note["stages"].values()} <= {2}
    AutoModelForCausalLM.from_pretrained(out)


def test_convert_json_is_the_record(convert: Cli, tmp_path: Path) -> None:
    done = convert("zero-shot", "--json")
    assert done.exit_code == 0, done.stderr
    note = json.loads((tmp_path / "out" / "run.json").read_text())
    assert json.loads(done.stdout) == {"output": str(tmp_path / "out"), **note}


def test_convert_is_reproducible(convert: Cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert convert("zero-shot", "--seed", 3, output=tmp_path / name).exit_code == 0
    weights = [(tmp_path / name / "hybrid.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_convert_takes_a_recipe_file_and_settings(convert: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: zero-shot\nhybrid: {sinks: 2}\n", encoding="utf-8")
    done = convert(str(recipe), "--set", "hybrid.gate=per_head", "--set", "transfer.max_steps=1")
    assert done.exit_code == 0, done.stderr
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert (settings["name"], settings["hybrid"]["sinks"], settings["hybrid"]["gate"]) == (
        "mine",
        2,
        "per_head",
    )
    assert settings["transfer"]["max_steps"] == 1  # --set counts over --max-steps


def test_convert_says_when_a_setting_adds_a_stage(convert: Cli) -> None:
    done = convert("zero-shot", "--set", "finetune.rank=2")
    assert done.exit_code == 0, done.stderr
    assert "no finetune of its own" in done.stderr


# ---- audit


def test_audit_of_two_models_is_one_report(cli: Cli, hybrids: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "audit"
    done = cli("audit", *hybrids.values(), "--output", out, "--context-length", 64, "--resamples", 50)
    assert done.exit_code == 0, done.stderr
    report = json.loads((out / "audit.json").read_text())
    validate_audit(report)
    assert [run["recipe"] for run in report["runs"]] == ["ssd", "swa-sinks"]
    assert report["donor"]["name"] == "donor"
    assert report["metric"]["bootstrap_resamples"] == 50
    assert report["metric"]["data"].endswith("corpus.jsonl (held out)")
    assert "in 9 states" in done.stderr  # the donor is scored with the first model
    assert "in 8 states" in done.stderr  # and not again
    for words in ("ssd: ", "swa-sinks: window only", str(out / "audit.html")):
        assert words in done.stdout


def test_audit_json_is_all_there_is_on_stdout(cli: Cli, hybrids: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "audit"
    done = cli(
        "audit", hybrids["ssd"], "--output", out, "--context-length", 32, "--documents", 2, "--resamples", 20,
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stdout == (out / "audit.json").read_text()


def test_audit_scores_a_file_whole(cli: Cli, hybrids: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "valid.jsonl"
    data.write_text("".join(json.dumps({"body": f"the quick brown fox {i}"}) + "\n" for i in range(6)))
    done = cli(
        "audit", hybrids["ssd"], "--output", tmp_path / "audit", "--data", data, "--text-column", "body",
        "--resamples", 20,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    metric = json.loads((tmp_path / "audit" / "audit.json").read_text())["metric"]
    assert (metric["documents"], metric["data"]) == (6, str(data))


@pytest.mark.parametrize("recorded", ["relative", "absolute"])
@pytest.mark.parametrize(
    "spelling", ["t.jsonl", "./t.jsonl", "sub/../t.jsonl", "absolute", "link.jsonl", None]
)
def test_training_data_is_never_scored_however_it_is_spelt(
    hybrids: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str,
    spelling: str | None,
) -> None:
    model, data = Path(shutil.copytree(hybrids["ssd"], tmp_path / "model")), tmp_path / "t.jsonl"
    shutil.copy(corpus, data)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.jsonl").symlink_to(data)
    note = json.loads((model / "run.json").read_text())
    assert note["settings"]["data"]["source"] == str(corpus.resolve())
    note["settings"]["data"]["source"] = "t.jsonl" if recorded == "relative" else str(data)
    (model / "run.json").write_text(json.dumps(note))
    monkeypatch.chdir(tmp_path)
    subjects = [inspect(str(model))]
    given = str(data) if spelling == "absolute" else spelling
    windows, words = read_text(subjects, AuditOptions(given, None, 64, 200, 4, 8, 0, 20), 64)
    assert words.endswith("t.jsonl (held out)") or words == "link.jsonl (held out)"
    assert len({window.document for window in windows}) < 10  # of 40


@pytest.mark.parametrize(("trained", "scored"), [("texts", "texts/t.jsonl"), ("texts/t.jsonl", "texts")])
def test_a_file_of_a_folder_that_was_trained_on_is_not_new(
    hybrids: dict[str, Path], corpus: Path, tmp_path: Path, trained: str, scored: str
) -> None:
    model = Path(shutil.copytree(hybrids["ssd"], tmp_path / "model"))
    (tmp_path / "texts").mkdir()
    shutil.copy(corpus, tmp_path / "texts" / "t.jsonl")
    note = json.loads((model / "run.json").read_text())
    note["settings"]["data"]["source"] = str(tmp_path / trained)
    (model / "run.json").write_text(json.dumps(note))
    options = AuditOptions(str(tmp_path / scored), None, 64, 200, 4, 8, 0, 20)
    windows, words = read_text([inspect(str(model))], options, 64)
    assert words.endswith("(held out)")
    assert len({window.document for window in windows}) < 10  # of 40


def test_run_json_says_where_local_data_lies(
    convert: Cli, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpus.parent)
    assert convert("zero-shot", data=Path(corpus.name)).exit_code == 0
    note = json.loads((tmp_path / "out" / "run.json").read_text())
    assert note["settings"]["data"]["source"] == str(corpus.resolve())


def test_audit_tells_runs_of_one_recipe_apart(
    cli: Cli, convert: Cli, hybrids: dict[str, Path], tmp_path: Path
) -> None:
    assert convert("swa-sinks", "--set", "hybrid.window=4").exit_code == 0
    done = cli(
        "audit", hybrids["swa-sinks"], tmp_path / "out", "--output", tmp_path / "audit", "--documents", 2,
        "--max-windows", 1, "--context-length", 32, "--resamples", 20,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "stdlib (held out)" in done.stderr  # nothing was trained, so there is no training data
    runs = json.loads((tmp_path / "audit" / "audit.json").read_text())["runs"]
    expected = [f"swa-sinks in {place}" for place in (hybrids["swa-sinks"], tmp_path / "out")]
    assert [run["recipe"] for run in runs] == expected


# ---- generate


def test_generate_writes_only_the_text_to_stdout(cli: Cli, hybrids: dict[str, Path]) -> None:
    done = cli("generate", hybrids["ssd"], "def window", "--max-new-tokens", 5)
    assert done.exit_code == 0, done.stderr
    assert "decode state: " in done.stderr
    quiet = cli("generate", hybrids["ssd"], "def window", "--max-new-tokens", 5, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_generate_json_is_all_there_is_on_stdout(cli: Cli, hybrids: dict[str, Path], donor: Path) -> None:
    common = ("def window", "--max-new-tokens", 5)
    told = json.loads(cli("generate", hybrids["ssd"], *common, "--json").stdout)
    assert told["text"].strip() == cli("generate", hybrids["ssd"], *common).stdout.strip()
    assert (told["prompt"], told["branch"], told["new_tokens"]) == ("def window", "both", 5)
    assert told["state_bytes"] > 0
    assert json.loads(cli("generate", donor, *common, "--json").stdout)["branch"] is None


def test_generate_in_every_state(cli: Cli, hybrids: dict[str, Path]) -> None:
    for state in BRANCH_STATES:
        done = cli("generate", hybrids["ssd"], "def window", "--max-new-tokens", 2, "--branch", state)
        assert done.exit_code == 0, (state, done.stderr)


def test_generate_of_the_softmax_state_is_the_donors(cli: Cli, hybrids: dict[str, Path], donor: Path) -> None:
    common = ("def window", "--max-new-tokens", 12)
    hybrid = cli("generate", hybrids["ssd"], *common, "--branch", "softmax")
    assert hybrid.stdout == cli("generate", donor, *common).stdout


def test_generate_draws_by_seed(cli: Cli, hybrids: dict[str, Path], tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("def window", encoding="utf-8")

    def draw(seed: int, *source: object, stdin: str | None = None) -> str:
        done = cli(
            "generate", hybrids["ssd"], *source, "--max-new-tokens", 12, "--temperature", 1.5,
            "--top-p", 0.95, "--seed", seed, stdin=stdin,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr
        return done.stdout

    first = draw(1, "--prompt-file", prompt)
    assert first == draw(1, "--prompt-file", "-", stdin="def window")
    assert first != draw(2, "def window")


# ---- demo


def test_demo_gets_its_options(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import equipoise.demo

    calls: list[tuple[Path, tuple[int, ...]]] = []

    def run_demo(output: Path, *, seeds: tuple[int, ...], console: object) -> None:
        calls.append((output, seeds))

    monkeypatch.setattr(equipoise.demo, "run_demo", run_demo)
    assert cli("demo", "--output", tmp_path / "demo", "--seeds", "0,2").exit_code == 0
    assert calls == [(tmp_path / "demo", (0, 2))]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "audit.json").write_text("{}\n")
    assert cli("demo", "--output", tmp_path / "demo", "--json").stdout == "{}\n"
    for seeds in ("", "x", "0,0", "-1", "1.5"):
        wrong = cli("demo", "--output", tmp_path / "demo", "--seeds", seeds)
        assert wrong.exit_code == 2
        assert "whole numbers" in wrong.stderr
