"""Arguments and options that several verbs share: one name, one meaning, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# ---- models and how they attend

AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, or a name on the Hub.")]
ConvertedModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory of a converted model, or Hub name.")
]
StateFile = Annotated[Path, typer.Argument(metavar="STATE", help="File that `state save` wrote.")]
_BRANCH = typer.Option(
    "--branch", metavar="STATE", help="both, window, linear, none, sinks, softmax or softmax_lora."
)
Branch = Annotated[str, _BRANCH]
OptionalBranch = Annotated[str | None, _BRANCH]
Reading = Annotated[
    Literal["literal", "renormalised"],
    typer.Option("--reading", help="One branch alone: at its weight in the hybrid, or at weight 1."),
]

# ---- conversions

Recipe = Annotated[str, typer.Option("--recipe", metavar="NAME|FILE", help="Its name, or a YAML file.")]
DEFAULT_RECIPE = "equipoise"
StateBytes = Annotated[
    int | None,
    typer.Option("--state-bytes", metavar="N", min=1, help="State, shared out by measurement."),
]
TrainingData = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="File, folder, Hub data set or `stdlib`, to train on."),
]
Streaming = Annotated[
    bool, typer.Option("--streaming", help="Read while training; needs --max-steps or data.max_tokens.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe; repeatable."),
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", metavar="N", min=1, help="Optimiser steps of each stage.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the donor.")
]

# ---- generating

PromptFile = Annotated[
    str | None, typer.Option("--prompt-file", metavar="FILE", help="Read the prompt there; - for stdin.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Stop after so many.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0, help="0 takes the likeliest token.")
]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", min=0, max=1, help="Draw from this share of probability.")
]
DrawSeed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the draws.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing on stderr.")]
TextAsJson = Annotated[bool, typer.Option("--json", help="Print text and figures as JSON.")]

# ---- scoring

Report = Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory for the report.")]
ScoredData = Annotated[
    str | None,
    typer.Option("--data", metavar="SOURCE", help="Text to score; default: held out from training."),
]
TextColumn = Annotated[
    str | None, typer.Option("--text-column", metavar="NAME", help="Column of --data with the text.")
]
ContextLength = Annotated[
    int | None,
    typer.Option("--context-length", metavar="N", min=2, help="Tokens at a time; default: up to 1024."),
]
Documents = Annotated[int, typer.Option("--documents", metavar="N", min=2, help="How many at most.")]
MaxWindows = Annotated[
    int, typer.Option("--max-windows", metavar="N", min=1, help="Contexts of each document at most.")
]
Contexts = Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="Contexts at a time.")]
Resamples = Annotated[
    int, typer.Option("--resamples", metavar="N", min=1, help="Bootstrap resamples behind an interval.")
]
