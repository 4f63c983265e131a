"""requirements.lock is what `make setup` installs: it follows constraints.txt, by hash."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_lock_follows_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().partition("\n")[2].strip())
    locked = {m[1]: m[2] for e in entries if (m := re.match(r"([a-z0-9-]+)==(\S+)", e))}
    assert len(locked) == len(entries)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    wanted = {name.replace("_", "-"): version for name, version in pins.items() if name != "torch"}
    assert {name: locked.get(name) for name in wanted} == wanted, "run: make lock"
