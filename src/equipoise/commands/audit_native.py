"""`equipoise audit` of hybrids that ship with transformers."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from equipoise.bars import counted
from equipoise.commands.failures import UsageError
from equipoise.commands.output import progress, results, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from equipoise.audit.native import NativeAudit
    from equipoise.commands.audit import AuditOptions


def all_native(models: list[str]) -> bool:
    """Whether the models are hybrids that ship with transformers; False where none is.

    Raises:
        UsageError: some are and some are not.
        CheckpointError: not a model.
        ConversionError: a hybrid of a type that is not known here.
    """
    from equipoise.audit.native_types import native_type
    from equipoise.models.load import load_config

    native = {model: native_type(load_config(model)) is not None for model in models}
    if len(set(native.values())) > 1:
        listed = "\n".join(
            f"  {model}: {'ships as a hybrid' if ships else 'converted, or plain'}"
            for model, ships in native.items()
        )
        raise UsageError(
            "expected converted models of one donor, or hybrids that ship with transformers, not both in one "
            f"report; got\n{listed}\nAudit each kind on its own."
        )
    return all(native.values())


def audit_native(models: list[str], output: Path, options: AuditOptions, *, as_json: bool) -> None:
    """The verb for native hybrids: native.json, native.md and native.html in a directory that is ready."""
    from equipoise.audit.native_page import native_labels, sentence
    from equipoise.audit.native_report import write_native

    audits, length, words = run_audits(models, options, progress())
    paths = write_native(audits, output, context_length=length, data=words)
    console = progress() if as_json else results()
    if as_json:
        typer.echo(paths["json"].read_text(encoding="utf-8"), nl=False)
    else:
        labels = native_labels(audits)
        console.print(console_table(audits, labels))
        for label, audit in zip(labels, audits, strict=True):
            say(console, f"{label}: {sentence(audit)}")
            say(console, f"What zeroing means in {audit.model_type}: {audit.kind.meaning}")
    say(console, f"report: {paths['html']}\ndata:   {paths['json']}")


def run_audits(
    models: list[str], options: AuditOptions, console: Console
) -> tuple[list[NativeAudit], int, str]:
    """Every model's audit, the context length, and the text in words.

    Raises:
        UsageError: a model twice, or a context longer than a model has.
        CheckpointError, ConversionError, DataError: a model or text that cannot be used.
    """
    if len({Path(model).resolve() for model in models}) < len(models):
        raise UsageError("expected different models, got one of them twice.")
    length = context_length(models, options.context_length)
    audits: list[NativeAudit] = []
    words = ""
    for model in models:
        audit, words = audit_one(model, length, options, console)
        audits.append(audit)
    return audits, length, words


def context_length(models: list[str], wanted: int | None) -> int:
    """Tokens of context: what was asked for, or the most that every model has, up to the audit's default."""
    from equipoise.commands.audit import LONGEST
    from equipoise.models.load import load_config

    limits: list[int] = []
    for model in models:
        text = load_config(model).get_text_config(decoder=True)
        limits += [int(limit)] if (limit := getattr(text, "max_position_embeddings", None)) else []
    if wanted is not None and limits and wanted > min(limits):
        raise UsageError(f"--context-length: expected at most {min(limits)}, the model's, got {wanted}.")
    return wanted or min([LONGEST, *limits])


def audit_one(model: str, length: int, options: AuditOptions, console: Console) -> tuple[NativeAudit, str]:
    """Read the text with the model's own tokenizer, and audit the model on it."""
    from equipoise.audit.evaluate import RunNote
    from equipoise.audit.native import prepare, run_native
    from equipoise.audit.native_scores import passes
    from equipoise.commands.audit import Subject, read_text
    from equipoise.models.load import load_model

    note = RunNote(Path(model).name, 0, 0, 0.0)
    windows, words = read_text([Subject(model, note, {}, length, None)], options, length)
    loaded = load_model(model)
    check_ids(loaded, model, max(int(window.input_ids.max()) for window in windows))
    job = prepare(loaded, windows, seed=options.seed)
    scored = len({window.document for window in job.split.scored})
    say(
        console,
        f"auditing {model} on {words}: {scored} documents, {len(job.split.scored)} contexts of up to "
        f"{length} tokens, {passes(job.states)} times (--documents sets how many)",
    )
    with counted(console) as bar:
        task = bar.add_task(note.recipe, total=job.ticks(options.batch_size))
        audit = run_native(
            loaded, job, name=model, batch_size=options.batch_size, resamples=options.resamples,
            seed=options.seed, tick=lambda: bar.advance(task),
        )  # fmt: skip
    del loaded
    gc.collect()
    return audit, words


def check_ids(model: Any, name: str, highest: int) -> None:
    """Raise unless the model has an embedding for every token of the text.

    Raises:
        DataError: it has not.
    """
    from equipoise.data.sources import DataError

    size = int(model.get_input_embeddings().weight.shape[0])
    if highest >= size:
        raise DataError(
            f"{name}: expected token ids below the vocabulary's size {size}, got up to {highest}; put the "
            "model's own tokenizer beside it."
        )


def console_table(audits: list[NativeAudit], labels: list[str]) -> Table:
    """One row per model and kind of ablation; recovered in percent of the way from no mixer to all."""
    from rich.table import Table
    from rich.text import Text

    from equipoise.audit.native_scores import FILLS
    from equipoise.pages import percent

    table = Table(title=Text("Which mixers do the work?"), title_justify="left")
    for column in ("model", "in their place", "NLL", "attention alone", "linear alone", "linear share"):
        table.add_column(column, overflow="fold", min_width=16 if column == "model" else None)
    table.add_column("verdict", overflow="fold")
    for audit, label in zip(audits, labels, strict=True):
        for fill in FILLS:
            parts = audit.fills[fill]
            word = audit.verdict.word if fill == "zero" else audit.verdict.mean_word
            table.add_row(
                Text(label), "zeros" if fill == "zero" else "means", f"{audit.nll.value:.3f}",
                percent(parts.recovered["attention"], interval=False),
                percent(parts.recovered["linear"], interval=False),
                percent(parts.attribution.linear_share, interval=False), word.replace("_", " "),
            )  # fmt: skip
    return table
