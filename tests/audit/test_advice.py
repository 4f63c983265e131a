"""Advice names only settings that exist, with values that they take."""

from __future__ import annotations

import re
from itertools import product
from typing import get_args

import pytest
import typer
from pydantic import BaseModel

from equipoise.audit.advice import Imbalance, Situation, advise
from equipoise.audit.verdict import Benefit, Use
from equipoise.cli import app
from equipoise.config import FinetuneConfig, HybridConfig, RunConfig, TransferConfig, parse_assignments
from equipoise.train.recipes import load_recipe, recipe_names


def texts() -> list[str]:
    """Every advice there is."""
    uses, benefits = get_args(Use), get_args(Benefit)
    cases = [("imbalanced", benefits[0], kind, None, False) for kind in get_args(Imbalance)]
    cases += [
        (use, benefit, None, lead, control)
        for use, benefit, lead, control in product(uses, benefits, (None, 0.03), (False, True))
        if use != "imbalanced"
    ]
    return sorted(
        {
            advise(Situation(use=u, benefit=b, imbalance=i, window_lead=w, control_is_better=c))
            for u, b, i, w, c in cases
        }
    )


def exists(path: str) -> bool:
    """Whether `RunConfig` has a setting of this path."""
    sections: dict[str, type[BaseModel]] = {
        "hybrid": HybridConfig, "transfer": TransferConfig, "finetune": FinetuneConfig,
        "data": type(RunConfig(name="x").data),
    }  # fmt: skip
    section, _, field = path.partition(".")
    return section in RunConfig.model_fields and field in sections[section].model_fields


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_setting_named_exists() -> None:
    named = {span.partition("=")[0] for text in texts() for span in spans(text) if not span.startswith("--")}
    assert len(named) > 10
    assert sorted(name for name in named if not exists(name)) == []
    assert not exists("hybrid.read_gate")


def test_no_setting_is_named_outside_backticks() -> None:
    for text in texts():
        assert not re.search(r"\b(hybrid|transfer|finetune|data)\.\w", re.sub(r"`[^`]+`", "", text))


def test_every_value_named_can_be_set() -> None:
    given = {span for text in texts() for span in spans(text) if "=" in span}
    assert {"hybrid.gate=per_head", "hybrid.gate=per_token", "hybrid.gate_value=0.9"} <= given
    for assignment in given:
        recipe = load_recipe("zero-shot" if assignment == "hybrid.window=null" else "ssd")
        load_recipe(recipe.name, parse_assignments([assignment]))


def test_every_option_and_recipe_named_exists() -> None:
    command = typer.main.get_command(app).get_command(None, "audit")  # pyright: ignore
    options = {option for parameter in command.params for option in parameter.opts}
    for text in texts():
        assert {span for span in spans(text) if span.startswith("--")} <= options
        assert set(re.findall(r"([\w-]+) recipe\b", text)) <= set(recipe_names())


@pytest.mark.parametrize("text", texts())
def test_advice_is_one_sentence(text: str) -> None:
    assert text.endswith(".")
    assert ". " not in text
