"""docs/how-to-tell.md: its commands exist, its words are the verdicts', and its cheap part runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from equipoise.audit.verdict import Benefit, Use
from equipoise.cli import app
from equipoise.train.recipes import load_recipe
from support import tiny_model, tiny_tokenizer

from .conftest import Cli

TEXT = (Path(__file__).parents[2] / "docs" / "how-to-tell.md").read_text(encoding="utf-8")
LISTED = "\n".join(re.findall(r"^```bash\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
COMMANDS = [
    shlex.split(line)[1:]
    for line in [*LISTED.splitlines(), *re.findall(r"`(equipoise [^`]+)`", TEXT)]
    if line.startswith("equipoise ") and " -" in line
]


def listed(verb: str, word: str) -> list[str]:
    """The page's first command of a verb that has this word in it."""
    return next(command for command in COMMANDS if command[0] == verb and any(word in c for c in command))


def test_the_page_has_its_commands() -> None:
    assert len(COMMANDS) >= 12
    assert {command[0] for command in COMMANDS} >= {"demo", "convert", "audit", "attribute", "recall"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command: list[str]) -> None:
    """The verb exists, and takes these options."""
    verbs: Any = typer.main.get_command(app)
    assert command[0] in verbs.commands
    verbs.commands[command[0]].make_context(command[0], command[1:])


def test_words_are_those_of_the_verdict() -> None:
    named = [set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", part, re.MULTILINE))))
             for part in TEXT.split("| benefit |")]  # fmt: skip
    assert named[0] == set(get_args(Use))
    assert named[1] >= set(get_args(Benefit))


def test_recipes_and_settings_exist() -> None:
    for recipe in re.findall(r"--recipe ([\w-]+)", TEXT):
        load_recipe(recipe)
    named = re.findall(r"\b(data|hybrid|transfer|finetune)\.(\w+)", TEXT)
    assert ("hybrid", "feature_multiple") in named
    for part, name in named:
        assert hasattr(getattr(load_recipe("hedgecats"), part), name)


@pytest.mark.slow
def test_a_narrow_hybrid_of_the_demo_donor_can_be_tested(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page says of reach holds for the demo's shape: random weights and two steps stand in."""
    monkeypatch.chdir(tmp_path)
    shape: dict[str, int] = {
        "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 344, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300,
    }  # fmt: skip
    tiny_model("llama", **shape).save_pretrained("out/demo/donor")
    tiny_tokenizer().save_pretrained("out/demo/donor")
    rows = (json.dumps({"text": f"def window{i}(size):\n    return size + {i}\n" * 24}) for i in range(60))
    (tmp_path / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")
    short = {"stdlib": "corpus.jsonl", "transfer.max_steps=150": "transfer.max_steps=2",
             "finetune.max_steps=50": "finetune.max_steps=2"}  # fmt: skip
    for command in (listed("convert", "out/narrow"), listed("audit", "out/narrow-audit")):
        done = cli(*(short.get(part, part) for part in command))
        assert done.exit_code == 0, done.stderr
    run = json.loads(Path("out/narrow-audit/audit.json").read_text(encoding="utf-8"))["runs"][0]
    assert run["verdict"]["benefit"] != "untested"
    assert f"{run['reach']} tokens" in TEXT
