"""Model cards: what stands in them, and what does not because nobody measured it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner, Result

from equipoise import HybridConfig, hybridize, record_donor
from equipoise.audit.report import to_dict, write_audit
from equipoise.cli import app
from equipoise.models.card import introduction
from equipoise.sharing.card_sections import limits_section
from equipoise.train.recipes import load_recipe
from sample_audit import make_report
from support import tiny_model


def write(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs with planted scores, their directory."""
    folder = tmp_path_factory.mktemp("audit")
    write_audit(make_report(), folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of a local donor with a licence, and the record of a run."""
    folder = tmp_path_factory.mktemp("secret")
    tiny_model().save_pretrained(folder / "donor")
    (folder / "donor" / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# donor\n")
    run = load_recipe("ssd", {"data": {"source": str(folder / "corpus.jsonl")}})
    assert run.hybrid is not None
    model = hybridize(tiny_model(), HybridConfig(window=5))
    record_donor(model, str(folder / "donor"))
    model.save_pretrained(folder / "ssd", delta=True)
    looks = [{"step": step, "eval_linear_share": step / 200, "eval_nll": 3.0} for step in range(0, 200, 10)]
    losses = [{"step": step, "loss": 4.0 - step / 100} for step in range(10, 200, 10)]
    stage = {"steps": 190, "tokens": 400_000, "seconds": 31.2, "kept_step": None}
    note = {
        "recipe": "ssd", "settings": run.model_dump(mode="json"), "donor": str(folder / "donor"), "seed": 0,
        "train_tokens": 1_000_000, "train_seconds": 62.5, "held_out": {"donor": 3.1, "result": 3.2},
        "stages": {"transfer": stage | {"history": losses}, "finetune": stage | {"history": looks + losses}},
        "equipoise_version": "0.1.0",
    }  # fmt: skip
    (folder / "ssd" / "run.json").write_text(json.dumps(note))
    return folder / "ssd"


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    """A copy to write to, beside its donor."""
    shutil.copytree(made.parent, tmp_path / "secret")
    return tmp_path / "secret" / "ssd"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_card_holds_what_was_measured(model: Path, audit: Path) -> None:
    done = write(model, "--audit", audit, "--repo", "me/llama-ssd")
    assert done.exit_code == 0, done.stderr
    card = ModelCard.load(model / "README.md")
    assert card.data.to_dict() == {
        "library_name": "equipoise", "license": "apache-2.0", "pipeline_tag": "text-generation",
        "tags": ["equipoise", "hybrid-attention", "linear-attention", "sliding-window-attention"],
    }  # fmt: skip
    text = card.text
    run = next(run for run in to_dict(make_report())["runs"] if run["recipe"] == "ssd")
    assert f"**{run['verdict']['use']}, beneficial.** {run['verdict']['reason']}" in text
    low, high = run["states"]["both"]["ci95"]
    recovered = run["recovered"]["both"]
    assert f"| both branches | {run['states']['both']['nll']:.3f} [{low:.3f}, {high:.3f}] | " in text
    assert f"{recovered['value']:.1%} [{100 * recovered['ci95'][0]:.1f}" in text
    for words in (
        'from_pretrained("me/llama-ssd")', "| seed | 0 |", "SSD, arXiv 2510.05901", "1,000,000 tokens",
        "190 steps, 400,000 tokens, 31 s, learning rate 0.01", "donor 3.100, this model 3.200",
        "lolcats (seed 0) collapsed, untested", "`apache-2.0` (from the donor's card)", "1.5 MiB a sequence",
        "window of 144 tokens and 4 sinks", "Other seeds", "1 local", "252 tokens at most",
        "| finetune | 190 | 2.1 | 3.000 | 95.0% |", "This is a delta",
    ):  # fmt: skip
        assert words in text, words
    assert text.count("| finetune |") == 1 + 12  # of 20 looks
    assert text.count("| transfer |") == 1 + 12  # of 19 logged losses
    assert "secret" not in text  # the folders of whoever made it are nobody's business


def test_what_was_not_measured_is_said_to_be_missing(model: Path) -> None:
    (model.parent / "donor" / "README.md").unlink()
    (model / "run.json").unlink()
    config = json.loads((model / "config.json").read_text())
    config["equipoise"]["donor"]["name"] = "/moved/donor"  # found beside the model instead
    (model / "config.json").write_text(json.dumps(config))
    done = write(model, "--json")
    assert json.loads(done.stdout) == {
        "card": str(model / "README.md"), "audited": False, "recorded": False, "licence": None,
        "verdict": None,
    }  # fmt: skip
    card = ModelCard.load(model / "README.md")
    assert "license" not in card.data.to_dict()
    for words in (
        "Not audited", "recipe, data and seed are not known",
        "Not known here: the donor's card was not found",
        "- Which branch does the work",
    ):  # fmt: skip
        assert words in card.text
    for word in ("balanced", "collapsed", "recovered", "While training", "%", "arXiv"):
        assert word not in card.text


def test_an_untested_benefit_is_listed(model: Path, audit: Path) -> None:
    edit(model / "run.json", recipe="hedgecats")
    assert write(model, "--audit", audit / "audit.json").exit_code == 0
    assert "no such token was scored" in (model / "README.md").read_text()


def test_front_matter_of_what_is_on_the_hub(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["equipoise"]["donor"] = {"name": "owner/donor", "revision": "a" * 40, "fingerprint": None}
    (model / "config.json").write_text(json.dumps(config))
    note = json.loads((model / "run.json").read_text())
    note["settings"]["data"]["source"] = "yahma/alpaca-cleaned"
    (model / "run.json").write_text(json.dumps(note))
    assert write(model, "--license", "llama3.2").exit_code == 0
    data = ModelCard.load(model / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("owner/donor", "finetune")
    assert (data["datasets"], data["license"]) == (["yahma/alpaca-cleaned"], "llama3.2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 7}, "got 0; it holds swa-sinks (seed 0)"),
        ({"train_tokens": 5}, "5 training tokens) in the audit, got 0"),
        ({"recipe": "t2r"}, "expected one run of t2r"),
    ],
)
def test_an_audit_of_other_models_is_refused(
    model: Path, audit: Path, change: dict[str, Any], words: str
) -> None:
    edit(model / "run.json", **change)
    done = write(model, "--audit", audit)
    assert (done.exit_code, words in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert not (model / "README.md").exists()


def test_refusals(model: Path, audit: Path, tmp_path: Path) -> None:
    broken = tmp_path / "audit.json"
    broken.write_text('{"schema_version": 1}')
    for arguments, code, words in (
        ((model, "--audit", broken), 2, "expected an audit of schema version"),
        ((model, "--audit", tmp_path / "none"), 1, "cannot be read"),
        ((model.parent / "donor", "--output", tmp_path / "x.md"), 2, "got a plain llama"),
        (("owner/name",), 2, "--output FILE"),
    ):
        done = write(*arguments)
        assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr
    assert not (model / "README.md").exists()
    assert write(model).exit_code == 0
    before = (model / "README.md").read_text()
    again = write(model, "--audit", audit)
    assert (again.exit_code, "--force" in again.stderr) == (2, True)
    assert (model / "README.md").read_text() == before
    assert write(model, "--audit", audit, "--force").exit_code == 0
    assert (model / "README.md").read_text() != before


@pytest.mark.parametrize(
    ("own", "window", "some"),
    [
        ({}, "64", False),
        ({0: {"window": 8, "feature_map": None}, 1: {"window": 64}}, "8 to 64", True),
        ({1: {"linear_heads": (0,)}}, "64", True),
        ({1: {"linear_heads": (0,), "head_windows": (64, 4)}}, "4 to 64", True),
    ],
)
def test_layers_that_differ_are_told_apart(own: Any, window: str, some: bool) -> None:
    described = {"hybrid": HybridConfig(window=64, per_layer=own).model_dump(mode="json"), "donor": None}
    text = introduction(described)
    assert f"a sliding window of {window} tokens" in text
    assert ("in some heads" in text) == some
    limits = limits_section(described, None)
    assert f"the last {window} tokens" in limits
    assert ("in the heads that have one" in limits) == some
