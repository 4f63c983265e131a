"""The layout of `audit.json`, as shipped in `audit.schema.json`, and a check against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

SCHEMA_VERSION = 1
Json = dict[str, Any]


def validate_audit(audit: Mapping[str, Any]) -> None:
    """Check a decoded `audit.json` against the shipped schema.

    Raises:
        ValueError: the first violation by position in the document, with its path.
    """
    from jsonschema import Draft202012Validator

    errors = sorted(
        Draft202012Validator(audit_schema()).iter_errors(audit), key=lambda error: list(map(str, error.path))
    )
    if errors:
        where = "/".join(map(str, errors[0].absolute_path)) or "the top level"
        raise ValueError(
            f"expected an audit of schema version {SCHEMA_VERSION}, got {len(errors)} violation(s), the "
            f"first at {where}: {errors[0].message[:300]}; write the file with write_audit, or fix that field"
        )


def audit_schema() -> Json:
    """The JSON Schema of `audit.json`."""
    return json.loads(
        resources.files("equipoise.audit").joinpath("audit.schema.json").read_text(encoding="utf-8")
    )
