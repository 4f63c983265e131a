"""Uploading converted models to the Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from equipoise.files import write_text
from equipoise.models.card import CARD, public_name, unmeasured_card
from equipoise.models.families import ConversionError


def push(
    model: Any,
    repo_id: str,
    *,
    delta: bool,
    commit_message: str | None,
    commit_description: str | None,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    **saving: Any,
) -> str:
    """Save a hybrid to a temporary directory and upload that; see `HybridModel.push_to_hub`.

    Raises:
        ConversionError: a delta whose donor others cannot get; nothing is uploaded then.
    """
    refuse_local_delta(model.config.equipoise or {}, delta=delta)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place, delta=delta, **saving)
        config = place / "config.json"
        write_text(config, public_config(config.read_text(encoding="utf-8")))
        repo_id = str(api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        if not api.file_exists(repo_id, CARD, revision=revision, token=token):
            unmeasured_card(model.config.equipoise, repo_id).save(place / CARD)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=place, token=token, revision=revision, create_pr=create_pr,
            commit_message=commit_message or "Upload model", commit_description=commit_description,
        )  # fmt: skip
    return str(commit.commit_url)


def refuse_local_delta(described: dict[str, Any], *, delta: bool) -> None:
    """Raise for a delta that nobody else could load.

    Args:
        described: the ``equipoise`` entry of a model's configuration.
        delta: whether a delta is to be uploaded.

    Raises:
        ConversionError: its donor is a local directory.
    """
    donor: dict[str, Any] = described.get("donor") or {}
    if delta and donor.get("fingerprint") is not None:
        raise ConversionError(
            f"a delta on the Hub has to name a donor on the Hub, and this one's is a local directory "
            f"({donor['name']}). Name it with record_donor(model, 'owner/name') if it is a copy of that, or "
            "push all weights: `equipoise export`, or push_to_hub with delta=False."
        )


def public_config(text: str) -> str:
    """A converted model's config.json for others: of a local donor only the name and fingerprint."""
    config = json.loads(text)
    donor = config["equipoise"].get("donor")
    if donor is None:
        return text
    donor["name"] = public_name(donor["name"])
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
