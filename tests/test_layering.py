"""The architecture's arrows, and what stays light to import."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch", "transformers", "peft", "accelerate", "datasets", "matplotlib", "lm_eval", "triton", "fastapi",
    "uvicorn",
}  # fmt: skip


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A fresh interpreter: this one has the heavy modules loaded already.
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def heavy_imports(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter loads while it runs `code`."""
    trace = run_python("-X", "importtime", "-c", code).stderr
    reports = [line for line in trace.splitlines() if line.startswith("import time:")]
    loaded = {line.rpartition("|")[2].strip() for line in reports}
    assert "equipoise" in loaded, trace
    return HEAVY & {name.partition(".")[0] for name in loaded}


def test_import_contracts_hold() -> None:
    # The function behind lint-imports, since the script's own place depends on how pytest was started.
    run_python("-c", "from importlinter.cli import lint_imports_command as lint; lint(['--no-cache'])")


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import equipoise", id="import"),
        pytest.param("import equipoise; dir(equipoise)", id="dir"),
        pytest.param(
            "import sys; sys.argv[1:] = ['--help']; from equipoise.cli import main; main()", id="help"
        ),
    ],
)
def test_stays_light(code: str) -> None:
    assert heavy_imports(code) == set()


def test_typing_marker_ships() -> None:
    assert (ROOT / "src" / "equipoise" / "py.typed").is_file()
