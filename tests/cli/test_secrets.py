"""Passwords and tokens: refused where files would carry them on, and never in a file or a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equipoise.config import ConfigError
from equipoise.secrets import HIDDEN, has_secret, without_secrets
from equipoise.train.convert import check_no_secret

from .conftest import Cli

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
PASSWORD = "correct-horse-battery"
ADDRESSES = [
    f"https://someone:{PASSWORD}@host.example/data.jsonl", f"https://{PASSWORD}@host.example/x",
    f"s3://key:{PASSWORD}@bucket/x", f"{TOKEN}/name", f"https://host.example/{TOKEN}/data",
    f"https://host.example/x?token={PASSWORD}", f"https://host.example/x?a=1&X-Amz-Signature={PASSWORD}",
]  # fmt: skip
PLAIN = [
    "meta-llama/Llama-3.2-1B", "/data/some@place/x.jsonl", "https://host.example/x@v1?page=2",
    "hf_transfer/x", "git@host.example:a/b", "C:\\models\\x", "stdlib",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_with_a_secret_are_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.source: expected a name or address without") as refused:
        check_no_secret(address, "data.source")
    assert PASSWORD not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert PASSWORD not in without_secrets(f"cannot reach '{address}', no answer")
    assert TOKEN not in without_secrets(f"cannot reach {address}.")


@pytest.mark.parametrize("address", PLAIN)
def test_others_are_not(address: str) -> None:
    check_no_secret(address, "DONOR")
    assert without_secrets(address) == address


def test_what_the_environment_calls_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"401 for key {PASSWORD}; Authorization: Bearer abc.DEF-123456"
    assert without_secrets(text) == f"401 for key {PASSWORD}; Authorization: Bearer {HIDDEN}"
    monkeypatch.setenv("HF_TOKEN", PASSWORD)
    assert without_secrets(text) == f"401 for key {HIDDEN}; Authorization: Bearer {HIDDEN}"
    monkeypatch.setenv("HF_TOKEN", "none")  # too short to be one
    assert not has_secret("none of it")


@pytest.mark.parametrize("options", [(), ("--stream-layers", "--set", "watch=null")])
@pytest.mark.parametrize("what", ["donor", "data"])
def test_convert_leaves_nothing_behind(
    convert: Cli, donor: Path, corpus: Path, tmp_path: Path, options: Any, what: str
) -> None:
    address: Any = ADDRESSES[0]
    given = {"source": address} if what == "donor" else {"data": address}
    done = convert("zero-shot", *options, **given)
    assert done.exit_code == 2, done.stderr
    assert "without a user, password or token" in done.stderr
    assert PASSWORD not in done.output
    assert not (tmp_path / "out").exists()


def test_other_verbs_refuse_them_too(cli: Cli, convert: Cli, tmp_path: Path) -> None:
    assert convert("swa-sinks").exit_code == 0
    for arguments in (
        ("audit", tmp_path / "out", "--output", tmp_path / "audit", "--data", ADDRESSES[0]),
        ("plan", ADDRESSES[0], "--recipe", "ssd", "--max-steps", 1),
        ("generate", ADDRESSES[0], "x"),
    ):
        done = cli(*arguments)
        assert done.exit_code in (1, 2)
        assert "without a user, password or token" in done.stderr, done.stderr
        assert PASSWORD not in done.output
    assert not (tmp_path / "audit").exists()


def test_the_token_of_the_environment_is_in_no_file(
    cli: Cli, convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told = convert("zero-shot", "--set", "report_to=tensorboard").output
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "the quick brown"}\n{"text": "fox jumps over"}\n')
    out = tmp_path / "out"
    for arguments in (
        ("audit", out, "--output", tmp_path / "audit", "--data", data, "--resamples", 20),
        ("card", out, "--output", tmp_path / "README.md"),
    ):
        done = cli(*arguments)
        assert done.exit_code == 0, done.stderr
        told += done.output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "README.md", "audit.json", "audit.html"} <= {path.name for path in written}
    assert any(path.name.startswith("events.") for path in written)
    assert [str(path) for path in written if TOKEN.encode() in path.read_bytes()] == []
    assert TOKEN not in told


def test_a_token_in_an_error_is_not_told(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(
            f"401 Client Error for https://u:{PASSWORD}@host.example, Authorization: Bearer {TOKEN}"
        )

    monkeypatch.setattr("equipoise.train.recipes.load_recipe", fail)
    done = cli("recipes", "ssd")
    assert done.exit_code == 1
    assert f"401 Client Error for https://{HIDDEN}@host.example" in done.stderr
    assert TOKEN not in done.output
    assert PASSWORD not in done.output
