"""`equipoise audit`."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from equipoise.bars import counted
from equipoise.commands.failures import INTERRUPTED, UsageError, VerbError, told_when_full
from equipoise.commands.options import (
    ContextLength,
    Contexts,
    Documents,
    MaxWindows,
    Report,
    Resamples,
    ScoredData,
    TextColumn,
)
from equipoise.commands.output import progress, quieten, results, say

if TYPE_CHECKING:
    from rich.console import Console

    from equipoise.audit.evaluate import DocumentScores, RunNote, SoftmaxReference
    from equipoise.audit.report import AuditReport, RunAudit
    from equipoise.data.packing import EvaluationWindow

LONGEST = 1024
"""Context of an audit where none is asked for, if the donor has as much."""


@dataclass(frozen=True)
class AuditOptions:
    """What was asked for; None where a default depends on the models."""

    data: str | None
    text_column: str | None
    context_length: int | None
    documents: int
    max_windows: int
    batch_size: int
    seed: int
    resamples: int


@dataclass(frozen=True)
class Subject:
    """A model to audit, as far as it is known before its weights are read.

    `softmax` marks the donor with adapters of its own (recipe `lora-only`): a reference, not a hybrid.
    """

    model: str
    note: RunNote
    donor: dict[str, Any]
    context: int
    trained_on: str | None
    softmax: bool = False


def audit_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Converted models of one donor.")],
    output: Report,
    data: ScoredData = None,
    text_column: TextColumn = None,
    context_length: ContextLength = None,
    documents: Documents = 200,
    max_windows: MaxWindows = 4,
    batch_size: Contexts = 8,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the bootstrap.")] = 0,
    resamples: Resamples = 2000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON to stdout.")] = False,
) -> None:
    """Show which branch of converted models does the work: audit.json, audit.md and audit.html.

    A --data source other than the training data is scored whole. An earlier report in the
    directory is replaced.

    \b
    equipoise audit out/ssd out/lolcats --output out/audit --data validation.jsonl
    torchrun --nproc-per-node 8 -m equipoise audit out/ssd --output out/audit
    """
    options = AuditOptions(
        data, text_column, context_length, documents, max_windows, batch_size, seed, resamples
    )
    quieten()
    from equipoise.audit.render import run_labels
    from equipoise.audit.report import console_table, to_json, write_audit
    from equipoise.commands.audit_native import all_native, audit_native
    from equipoise.distributed import joined
    from equipoise.train.outputs import claimed_by_leader

    try:
        with (
            told_when_full(output, "No report was written."),
            joined() as here,
            claimed_by_leader(output, shared=True),
        ):
            if all_native(models):
                if here.count > 1:
                    raise UsageError("hybrids that ship with transformers are audited in one process.")
                return audit_native(models, output, options, as_json=as_json)
            report = run_audit(models, options, progress())
            if not here.is_leader:
                return
            paths = write_audit(report, output)
    except KeyboardInterrupt:
        raise VerbError("interrupted; no report was written.", INTERRUPTED) from None
    console = progress() if as_json else results()
    if as_json:
        typer.echo(to_json(report), nl=False)
    else:
        console.print(console_table(report))
        for label, run in zip(run_labels(report), report.runs, strict=True):
            say(console, f"{label}: {verdict_sentence(run)}")
    say(console, f"report: {paths['html']}\ndata:   {paths['json']}")


def verdict_sentence(run: RunAudit) -> str:
    """The verdict's two words, why, and what to do next."""
    words = (word.replace("_", " ") for word in (run.verdict.use, run.verdict.benefit))
    return f"{', '.join(words)}. {run.verdict.reason.rstrip('.')}. {run.verdict.advice}"


def run_audit(models: list[str], options: AuditOptions, console: Console) -> AuditReport:
    """Score every model on the same text; the donor only once.

    Raises:
        UsageError: models of different donors, or text that the options do not settle.
        CheckpointError, ConversionError, DataError: a model or text that cannot be used.
    """
    from equipoise.audit.documents import text_fingerprint
    from equipoise.audit.report import AuditReport, Donor, Metric
    from equipoise.distributed import in_turn

    if len({Path(model).resolve() for model in models}) < len(models):
        raise UsageError("expected different models, got one of them twice.")
    subjects = distinct([inspect(model) for model in models])
    if all(subject.softmax for subject in subjects):
        raise UsageError(
            "expected at least one hybrid, got the softmax donor with adapters only: it has no branches. "
            "Give it beside a hybrid of the same donor, as what the hybrid is compared with."
        )
    check_one_donor(subjects)
    length = _context_length(subjects, options.context_length)
    windows, words = in_turn(lambda: read_text(subjects, options, length))
    documents = len({window.document for window in windows})
    size = f"{documents} documents, {len(windows)} contexts of up to {length} tokens"
    say(console, f"auditing on {words}: {size}")
    references = [
        score_reference(subject, windows, options, console) for subject in subjects if subject.softmax
    ]
    runs: list[RunAudit] = []
    table, known = None, None
    for subject in subjects:
        if not subject.softmax:
            audit, table, known = score(subject, windows, known, references, options, console)
            runs.append(audit)
    assert table is not None
    described = subjects[0].donor
    name = str(described.get("name") or "unknown donor")
    donor = Donor.of(
        table, name=Path(name).name if described.get("fingerprint") else name, resamples=options.resamples,
        seed=options.seed,
    )  # fmt: skip
    return AuditReport(
        donor=replace(donor, extra={key: described.get(key) for key in ("revision", "fingerprint")}),
        metric=Metric.of(
            table,
            context_length=length,
            data=words,
            resamples=options.resamples,
            text_sha256=text_fingerprint(windows),
        ),
        runs=tuple(runs),
    )


def inspect(model: str) -> Subject:
    """What a model's configuration and `run.json` say.

    Raises:
        CheckpointError: not a model.
        ConversionError: not a converted one.
    """
    from equipoise.audit.evaluate import RunNote
    from equipoise.audit.native_types import supported
    from equipoise.models.families import ConversionError
    from equipoise.models.load import adapters_base, load_config
    from equipoise.models.storage import describe_donor

    config = load_config(model)
    described = getattr(config, "equipoise", None)
    base = adapters_base(model)
    if base is not None and not described:
        described = {"donor": describe_donor(base, config)}
    if not described:
        raise ConversionError(
            f"{model}: expected a converted model, got a plain {config.model_type}. An audit compares the "
            "branches of a hybrid; make one first: equipoise convert DONOR --recipe ssd --output DIR; or "
            f"give a hybrid that ships with transformers ({supported()})."
        )
    note, text = RunNote.read(Path(model)), config.get_text_config(decoder=True)
    return Subject(
        model=model,
        note=note,
        donor=described.get("donor") or {},
        context=int(text.max_position_embeddings or LONGEST),
        trained_on=note.source if note.train_tokens else None,
        softmax=base is not None,
    )


def distinct(subjects: list[Subject]) -> list[Subject]:
    """Runs of one recipe and seed told apart by their directories."""
    keys = [(subject.note.recipe, subject.note.seed) for subject in subjects]
    return [
        subject
        if keys.count(key) == 1
        else replace(subject, note=replace(subject.note, recipe=f"{key[0]} in {subject.model}"))
        for key, subject in zip(keys, subjects, strict=True)
    ]


def check_one_donor(subjects: list[Subject]) -> None:
    """Raise unless one report can hold all models.

    Raises:
        UsageError: several models that were not made from the same donor.
    """
    if len(subjects) == 1:
        return
    donors = {s.donor.get("fingerprint") or (s.donor.get("name"), s.donor.get("revision")) for s in subjects}
    if len(donors) == 1 and all(s.donor for s in subjects):
        return
    listed = "\n".join(f"  {s.model}: {s.donor.get('name') or 'does not say'}" for s in subjects)
    raise UsageError(f"expected models of one donor, got\n{listed}\nAudit each donor's models on their own.")


def _context_length(subjects: list[Subject], wanted: int | None) -> int:
    limit = min(subject.context for subject in subjects)
    if wanted is not None and wanted > limit:
        raise UsageError(f"--context-length: expected at most {limit}, the donor's context, got {wanted}.")
    return wanted or min(LONGEST, limit)


def read_text(
    subjects: list[Subject], options: AuditOptions, length: int
) -> tuple[list[EvaluationWindow], str]:
    """Windows of the text to score, and what it is in words.

    Raises:
        UsageError: the models were trained on different data and none is given.
        DataError: text that cannot be used, or fewer than two documents of it.
    """
    from equipoise.data.packing import evaluation_windows
    from equipoise.data.shards import ShardedDocuments
    from equipoise.data.sources import DataError, absolute_source, load_documents, overlaps
    from equipoise.models.load import load_tokenizer

    notes = {absolute_source(s.trained_on): s.note for s in reversed(subjects) if s.trained_on is not None}
    trained = sorted(notes)
    if options.data is None and len(trained) > 1:
        listed = ", ".join(trained)
        raise UsageError(f"the models were trained on different data ({listed}): choose with --data.")
    source = options.data or (trained or ["stdlib"])[0]
    # A file of a folder that was trained on, say, is not new: equal documents are held out in both.
    seen = next((note for name, note in notes.items() if overlaps(source, name)), None)
    whole = seen is None and Path(source).expanduser().exists()
    column = options.text_column or (None if seen is None else seen.text_column)
    if seen is not None and seen.streaming:  # more than fits: the first held-out documents
        documents = ShardedDocuments(source, side="validation", subset=seen.subset, text_column=column).first(
            options.documents
        )
    else:
        documents = load_documents(
            source, split="validation", held_out=not whole, subset=None if seen is None else seen.subset,
            text_column=column,
        )  # fmt: skip
    windows = evaluation_windows(
        documents, load_tokenizer(subjects[0].model), context_length=length,
        limit_documents=options.documents, max_windows_per_document=options.max_windows,
    )  # fmt: skip
    if len({window.document for window in windows}) < 2:
        raise DataError(
            f"expected at least 2 documents to audit on (intervals resample them), got 1 from {source!r}; "
            "a text file is one document: give a folder of them, or JSON lines"
        )
    return windows, source if whole else f"{source} (held out)"


def score(
    subject: Subject,
    windows: list[EvaluationWindow],
    donor: DocumentScores | None,
    references: list[SoftmaxReference],
    options: AuditOptions,
    console: Console,
) -> tuple[RunAudit, Any, DocumentScores]:
    """Audit one model, with a bar where there is a terminal."""
    from equipoise.audit.evaluate import STATES, audit_model
    from equipoise.models.load import load_model

    states = len(STATES) + (donor is None)  # the control, and the donor unless its scores are known
    batches = -(-len(windows) // options.batch_size)
    model = load_model(subject.model)
    with counted(console) as bar:
        task = bar.add_task(subject.note.recipe, total=states * batches)
        scored = audit_model(
            model, windows, subject.note, batch_size=options.batch_size, resamples=options.resamples,
            seed=options.seed, donor=donor, references=references, tick=lambda: bar.advance(task),
        )  # fmt: skip
    say(console, f"scored {subject.note.recipe} (seed {subject.note.seed}) in {states} states")
    del model
    gc.collect()
    return scored


def score_reference(
    subject: Subject, windows: list[EvaluationWindow], options: AuditOptions, console: Console
) -> SoftmaxReference:
    """Score a softmax model on the audit's text."""
    from equipoise.audit.evaluate import SoftmaxReference, score_documents
    from equipoise.models.load import load_model

    scores = score_documents(
        load_model(subject.model), windows, beyond=None, batch_size=options.batch_size, tick=lambda: None
    )
    say(console, f"scored {subject.note.recipe} (seed {subject.note.seed}), which stays softmax")
    return SoftmaxReference(subject.note.recipe, subject.note.train_tokens, scores)
