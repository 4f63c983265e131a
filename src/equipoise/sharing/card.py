"""A model's card, written from what was recorded and measured; what was not is said to be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils.hub import cached_file

from equipoise.audit.schema import validate_audit
from equipoise.config import ConfigError
from equipoise.data.sources import absolute_source
from equipoise.models.card import CARD, UNMEASURED, card, introduction, loading, metadata
from equipoise.models.families import ConversionError
from equipoise.models.load import load_config
from equipoise.models.storage import CheckpointError, resolve_donor
from equipoise.sharing.card_sections import (
    curve_section,
    limits_section,
    making_section,
    measured_section,
    missing,
)
from equipoise.train.outputs import RUN

AUDIT = "audit.json"


class CardError(ConfigError):
    """An audit that does not belong to the model; the message says why."""


@dataclass(frozen=True)
class Sources:
    """What a card is written from.

    Attributes:
        described: the ``equipoise`` entry of the model's configuration.
        note: `run.json`; None where the model has none.
        audit: `audit.json`; None where there is none.
        run: the model's own entry in it.
        licence: the Hub's identifier of the donor's licence; None where it is not known.
        licence_from: where that stands, in words.
    """

    described: dict[str, Any]
    note: dict[str, Any] | None
    audit: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    licence: str | None = None
    licence_from: str = ""


def gather(model: str, audit: Path | None, *, licence: str | None = None) -> Sources:
    """Read what is known of a converted model.

    Args:
        model: its directory, or a name on the Hub.
        audit: directory of an audit, or its `audit.json`.
        licence: the donor's, where the donor's own card does not say.

    Raises:
        ConversionError: not a converted model.
        CheckpointError: files that cannot be read.
        CardError: the audit is of other models.
    """
    config = load_config(model)
    described: dict[str, Any] = getattr(config, "equipoise", None) or {}
    if not described:
        raise ConversionError(f"{model}: expected a converted model, got a plain {config.model_type}.")
    note = _read(Path(model) / RUN) if (Path(model) / RUN).is_file() else None
    known, where = (licence, "given by who wrote this card") if licence else donor_licence(model, described)
    sources = Sources(described, note, licence=known, licence_from=where)
    if audit is None:
        return sources
    report = _read(audit / AUDIT if audit.is_dir() else audit)
    try:
        validate_audit(report)
    except ValueError as error:
        raise CardError(f"{audit}: {error}.") from None
    run = own_run(report, note, described, model)
    return Sources(described, note, report, run, known, where)


def own_run(
    report: dict[str, Any], note: dict[str, Any] | None, described: dict[str, Any], model: str
) -> dict[str, Any]:
    """The entry of an audit that is about this model: same donor, recipe, seed and training tokens.

    Raises:
        CardError: none or several are.
    """
    if note is None:
        raise CardError(f"{model}: has no {RUN}, so nothing ties it to a run of the audit.")
    print_of = (described.get("donor") or {}).get("fingerprint")
    if print_of is not None and report["donor"].get("fingerprint") not in (None, print_of):
        raise CardError(f"the audit is of hybrids of another donor ({report['donor']['name']}).")
    key = (note["recipe"], note["seed"], note["train_tokens"])
    ours = f"{note['recipe']} in "  # how an audit tells runs of one recipe and seed apart: by directory
    found = [
        run
        for run in report["runs"]
        if (run["recipe"].partition(" in ")[0], run["seed"], run["train_tokens"]) == key
    ]
    if len(found) > 1:
        here = Path(model).resolve()
        found = [run for run in found if Path(run["recipe"].removeprefix(ours)).resolve() == here]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{run['recipe']} (seed {run['seed']})" for run in report["runs"])
    raise CardError(
        f"expected one run of {note['recipe']} (seed {note['seed']}, {note['train_tokens']:,} training "
        f"tokens) in the audit, got {len(found)}; it holds {listed}. Give this model's audit."
    )


def donor_licence(model: str, described: dict[str, Any]) -> tuple[str | None, str]:
    """(identifier, where it stands) of the licence in the donor's own card; (None, why) without one."""
    missing_card = None, "the donor's card was not found"
    try:
        name, revision = resolve_donor(model, described.get("donor"))
        local = Path(name).is_dir()
        found = Path(name) / CARD if local else cached_file(name, CARD, revision=revision or "main")
    except (CheckpointError, OSError, HfHubHTTPError):
        return missing_card
    if found is None or not Path(found).is_file():
        return missing_card
    path = Path(found)
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return None, "the donor's card cannot be read"
    licence = getattr(data, "license", None)
    if not isinstance(licence, str):
        return None, "the donor's card names no licence"
    return licence, "from the donor's card"


def write_card(sources: Sources, place: str) -> ModelCard:
    """The card.

    Args:
        sources: see `gather`.
        place: what the snippet loads: a name on the Hub, or a directory.
    """
    described, note = sources.described, sources.note
    measured = (
        UNMEASURED
        if sources.audit is None or sources.run is None
        else measured_section(sources.audit, sources.run)
    )
    parts = [
        f"# {place.rstrip('/').rpartition('/')[2]}",
        introduction(described),
        "## Loading",
        loading(described, place),
        "## How it was made",
        making_section(described, note),
        "## What was measured",
        measured,
        *(["## While training", curve] if (curve := curve_section(note)) else []),
        "## Limits",
        limits_section(described, sources.run),
        "## Not measured",
        "\n".join(f"- {line}" for line in missing(sources.audit, sources.run)),
        "## Licence",
        licence_section(sources),
    ]
    return card(
        metadata(described, licence=sources.licence, datasets=hub_datasets(note)), "\n\n".join(parts) + "\n"
    )


def licence_section(sources: Sources) -> str:
    """Which licence holds, and how that is known."""
    if sources.licence is None:
        return (
            f"Not known here: {sources.licence_from}. The donor's licence holds for its weights and what is "
            "derived from them; look it up before you share or use this model."
        )
    return (
        f"`{sources.licence}` ({sources.licence_from}): the weights are derived from the donor's, and its "
        "licence holds for them."
    )


def hub_datasets(note: dict[str, Any] | None) -> list[str]:
    """Names of data sets on the Hub that a run trained on."""
    if note is None or not note["train_tokens"]:
        return []
    source = str(note["settings"]["data"]["source"])
    local = source == "stdlib" or Path(source).is_absolute() or absolute_source(source) != source
    return [] if local else [source]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}).") from None
