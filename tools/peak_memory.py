"""Run a command of equipoise in a process of its own and say how much memory it took at most (Linux).

    python tools/peak_memory.py convert DONOR --recipe ssd --output OUT …

Printed in MiB, each also above the baseline, which is a process that has imported what `convert` imports:
VmHWM (all resident pages at most, mapped files included), and the peaks of anonymous and of file pages,
polled every 20 ms.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FIELDS = ("VmHWM", "RssAnon", "RssFile")
_BASELINE = "import equipoise.train.layer_convert, time; print(flush=True); time.sleep(60)"


def status(pid: int) -> dict[str, int]:
    """Fields of /proc/PID/status in KiB; empty once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(FIELDS)}
    return {name: int(value) for name, value in values.items()}


def baseline() -> dict[str, int]:
    """What importing takes."""
    with subprocess.Popen([sys.executable, "-c", _BASELINE], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = status(process.pid)
        process.kill()
    return found


def peak(command: list[str]) -> tuple[int, dict[str, int]]:
    """(exit code, highest values seen) of a command."""
    highest: dict[str, int] = dict.fromkeys(FIELDS, 0)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            for name, value in status(process.pid).items():
                highest[name] = max(highest[name], value)
            time.sleep(0.02)
    return process.returncode, highest


if __name__ == "__main__":
    before = baseline()
    code, after = peak([sys.executable, "-m", "equipoise", *sys.argv[1:]])
    for field in FIELDS:
        over = (after[field] - before[field]) / 1024
        print(f"{field}: {after[field] / 1024:,.0f} MiB, {over:,.0f} MiB above the baseline")
    raise SystemExit(code)
