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
    donor: dict[str, Any] = (model.config.equipoise or {}).get("donor") or {}
    if delta and donor.get("fingerprint") is not None:
        raise ConversionError(
            f"a delta on the Hub has to name a donor on the Hub, and this one's is a local directory "
            f"({donor['name']}). Name it with record_donor(model, 'owner/name') if it is a copy of that, or "
            "push with delta=False."
        )
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model.save_pretrained(place, delta=delta, **saving)
        _take_out_paths(place / "config.json")
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


def _take_out_paths(path: Path) -> None:
    """Of a local donor only the name and fingerprint are for others."""
    config = json.loads(path.read_text(encoding="utf-8"))
    donor = config["equipoise"].get("donor")
    if donor is not None:
        donor["name"] = public_name(donor["name"])
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_text(path, text)
