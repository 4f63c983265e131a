"""Uploading a converted model's directory to the Hub as it lies there, with its card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from equipoise.models.card import CARD
from equipoise.models.hub import public_config, refuse_local_delta
from equipoise.models.storage import CheckpointError
from equipoise.sharing.card import gather, write_card

CONFIG = "config.json"
PARTS = (
    "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges*",
    "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "lora/adapter_config.json", "lora/*.safetensors",
)  # fmt: skip
"""The model's files, beside config.json and the card; `run.json` is not: it holds local paths."""


class HubError(RuntimeError):
    """The Hub could not be reached, or did not take the files; the message says why."""


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub.

    Attributes:
        repo: its name there.
        checkpoint: full or delta.
        files: path in the repository to bytes.
        card: where the card comes from: the directory, written now, or none where the repository has one.
        url: the commit's address; None where nothing was uploaded.
    """

    repo: str
    checkpoint: str
    files: dict[str, int]
    card: str
    url: str | None


def push_directory(
    model: Path,
    repo: str,
    *,
    audit: Path | None = None,
    licence: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Upload:
    """Upload what `equipoise convert` or `export` wrote, in one commit.

    Args:
        model: its directory, full or a delta of a donor on the Hub. Nothing in it is changed.
        repo: owner/name, made where it is not there.
        audit, licence: for a card written now; without either, the directory's README.md, if any, is taken.
        private: whether a new repository is; None leaves it to the Hub.
        dry_run: upload nothing, and ask the Hub nothing.
        say: told what is going on.

    Raises:
        CheckpointError, CardError: as `equipoise.sharing.card.gather`.
        ConversionError: not converted, or a delta whose donor others cannot get.
        HubError: no login, no right, no connection.
    """
    if not model.is_dir():
        raise CheckpointError(f"{model}: expected a local directory of a converted model.")
    sources = gather(str(model), audit, licence=licence)
    described = sources.described
    refuse_local_delta(described, delta=described.get("checkpoint") == "delta")
    own = (model / CARD).is_file() and audit is None and licence is None
    card = (model / CARD).read_bytes() if own else str(write_card(sources, repo)).encode()
    made: dict[str, Any] = {
        CONFIG: public_config((model / CONFIG).read_text(encoding="utf-8")).encode(), CARD: card
    }  # fmt: skip
    made |= {str(path.relative_to(model).as_posix()): path for path in _parts(model)}
    found = Upload(
        repo=repo, checkpoint=str(described.get("checkpoint") or "full"),
        files={name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in made.items()},
        card="directory" if own else "written", url=None,
    )  # fmt: skip
    if dry_run:
        return found
    return _upload(found, made, private, keep_card=not own and audit is None and licence is None, say=say)


def _parts(model: Path) -> list[Path]:
    return sorted({path for pattern in PARTS for path in model.glob(pattern) if path.is_file()})


def _upload(
    found: Upload, files: dict[str, Any], private: bool | None, *, keep_card: bool, say: Callable[[str], None]
) -> Upload:
    """One commit; a card that the repository has is its owner's where nothing better is known."""
    api = HfApi()
    try:
        repo = str(api.create_repo(found.repo, private=private, exist_ok=True).repo_id)
        kept = keep_card and api.file_exists(repo, CARD)
        chosen = {name: content for name, content in files.items() if not (kept and name == CARD)}
        say(f"uploading {len(chosen)} files to {repo} …")
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in chosen.items()
        ]
        commit = api.create_commit(repo, operations, commit_message="Upload model")
    except Exception as error:
        if not _of_the_hub(error):
            raise
        raise HubError(_words(found.repo, error)) from error
    sizes = {name: found.files[name] for name in chosen}
    return Upload(
        repo=repo, checkpoint=found.checkpoint, files=sizes, card="kept" if kept else found.card,
        url=str(commit.commit_url),
    )  # fmt: skip


def _of_the_hub(error: Exception) -> bool:
    """Whether it was refused, or the connection failed; which HTTP library says so depends on the client."""
    known = isinstance(error, (OSError, HFValidationError))  # a response, no login, no network
    return known or any(base.__name__ == "HTTPError" for base in type(error).__mro__)


def _words(repo: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return (
            f"cannot write to {repo} on the Hub ({first}). Log in with a token that may: `hf auth login`, or "
            "set HF_TOKEN."
        )
    if isinstance(error, HFValidationError):
        return f"{repo}: expected a repository as owner/name ({first})."
    return f"the Hub did not take the upload to {repo} ({first}). Nothing is lost: run the command again."
