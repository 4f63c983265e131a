"""Ask PyPI for known vulnerabilities of what requirements.lock pins, through pip-audit: `make advisories`.

Exit code 0: every package was asked about, and nothing is known. 1: something is. 3: not all could be asked
about, so this says nothing (pip-audit itself ends with 0 then). pip-audit is no dependency: it is installed
into out/pip-audit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
LOCK, HOME, VERSION = ROOT / "requirements.lock", ROOT / "out" / "pip-audit", "2.9.0"
ASKED = "https://pypi.org/pypi/pip/json"
"""Answers with a list of vulnerabilities where the advisory service can be reached."""
NOTHING_KNOWN, KNOWN, NOT_ASKED = 0, 1, 3


def unreachable() -> str | None:
    """Why the advisory service cannot be asked; None where it can."""
    try:
        with urlopen(ASKED, timeout=10) as answer:
            found: Any = json.load(answer)
    except (URLError, OSError, ValueError) as error:
        return f"{ASKED} does not answer ({getattr(error, 'reason', error)})"
    return None if "vulnerabilities" in found else f"{ASKED} does not list vulnerabilities: a mirror?"


def audited() -> list[dict[str, Any]]:
    """What pip-audit says of each locked package.

    Raises:
        RuntimeError: it could not be installed, or did not answer.
    """
    if not (HOME / "bin" / "pip-audit").exists():
        venv.create(HOME, with_pip=True)
        _run([str(HOME / "bin" / "pip"), "install", "-q", f"pip-audit=={VERSION}"])
    options = [
        "--disable-pip",
        "--require-hashes",
        "--progress-spinner",
        "off",
        "-f",
        "json",
        "-r",
        str(LOCK),
    ]
    told = _run([str(HOME / "bin" / "pip-audit"), *options])
    try:
        return json.loads(told)["dependencies"]
    except (ValueError, KeyError) as error:
        raise RuntimeError(f"pip-audit did not answer with what it found ({error})") from None


def _run(command: list[str]) -> str:
    """What a command prints; pip-audit ends with 1 where it finds something."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not done.stdout.strip():
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}: {last}")
    return done.stdout


def verdict(packages: list[dict[str, Any]]) -> tuple[int, list[str]]:
    """(exit code, lines to print) of what pip-audit says."""
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no release'}"
        for package in packages for found in package.get("vulns", [])
    ]  # fmt: skip
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    known = len(lines)
    if skipped or not packages:
        lines.append(
            f"NOT CHECKED: {len(skipped)} of {len(packages)} packages, {', '.join(skipped[:5])} among them"
        )
    if known:
        return KNOWN, [*lines, f"{known} known vulnerabilities in {len(packages)} locked packages"]
    if skipped or not packages:
        return NOT_ASKED, lines
    return NOTHING_KNOWN, [f"{len(packages)} locked packages, no known vulnerability"]


def main() -> int:
    """Ask, print, and return the exit code."""
    reason = unreachable()
    if reason is None:
        try:
            code, lines = verdict(audited())
        except (RuntimeError, OSError) as error:
            code, lines, reason = NOT_ASKED, list[str](), str(error)
        print(*lines, sep="\n")
    else:
        code = NOT_ASKED
    if reason is not None:
        print(f"NOT CHECKED: {reason}. Nothing is said about any package; run it where PyPI can be reached.")
    return code


if __name__ == "__main__":
    sys.exit(main())
