"""Work on several ranks: started by torchrun, each of them runs this file on a list of jobs.

A job is a JSON object: ``arguments`` of the `equipoise` command; or ``donor``, ``run`` (a recipe's settings),
``output`` and what else `equipoise.train.convert.convert` takes. ``float64`` converts a donor held in
float64, which no option asks for. ``fault`` breaks one rank in one step of stage 1: it dies, hangs, raises,
gets a signal, or its loss is not a number.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
SEEN = "ranks.json"
"""Beside a job's output: what each rank held when training was over."""


def launch(
    count: int, jobs: list[dict[str, Any]], place: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Do the jobs one after the other, each on so many ranks of this machine over gloo."""
    place.mkdir(parents=True, exist_ok=True)
    written = place / "jobs.json"
    written.write_text(json.dumps(jobs))
    paths = [str(TESTS.parent / "src"), str(TESTS)]
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    surroundings |= {
        "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "", "EQUIPOISE_TIMEOUT": "120", **environment,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
        str(Path(__file__)), str(written),
    ]  # fmt: skip
    return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300, check=False)


def run_job(job: dict[str, Any]) -> None:
    """Do a job in this process."""
    import torch

    import equipoise.train.convert as converting
    from equipoise.config import RunConfig, parse

    job = dict(job)
    load, train = converting.load_donor, converting.train
    with pytest.MonkeyPatch.context() as patch:
        if job.pop("float64", False):
            patch.setattr(converting, "load_donor", lambda *a, **o: load(*a, **o).to(torch.float64))
        if "fault" in job:
            _break(patch, job.pop("fault"))
        if "arguments" in job:
            from equipoise.cli import app

            try:
                return app(job["arguments"], prog_name="equipoise")
            except SystemExit as ended:  # the command's own; the next job follows where all is well
                if ended.code:
                    raise
                return
        run, output = parse(RunConfig, job.pop("run")), Path(job.pop("output"))

        def watched(model: Any, *arguments: Any, **options: Any) -> Any:
            results = train(model, *arguments, **options)
            _note(model, output.with_name(f"{output.name}-{SEEN}"))
            return results

        patch.setattr(converting, "train", watched)
        converting.convert(job.pop("donor"), run, output, **job)


def _note(model: Any, place: Path) -> None:
    """What kinds of parameters the ranks hold, how much of them, and what trained on each."""
    from torch.distributed.tensor import DTensor

    from equipoise.distributed import gathered, ranks

    own = {name: p for name, p in model.named_parameters() if ".hybrid." in name or ".lora_" in name}
    donor = [p for name, p in model.named_parameters() if name not in own]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in donor]
    seen = gathered(
        {
            "sharded": sum(isinstance(p, DTensor) for p in donor), "donor": len(donor),
            "part": sum(p.numel() for p in held) / sum(p.numel() for p in donor),
            "sharded_own": sum(isinstance(p, DTensor) for p in own.values()),
            "own_dtypes": sorted({str(p.dtype) for p in own.values()}),
            "trained": {name: p.double().sum().item() for name, p in own.items()},
        }
    )  # fmt: skip
    if ranks().is_leader:
        place.write_text(json.dumps(seen))


def _break(patch: pytest.MonkeyPatch, fault: dict[str, Any]) -> None:
    import torch

    from equipoise.train.stages import TransferTrainer

    if os.environ.get("RANK", "0") != str(fault["rank"]):
        return
    step = TransferTrainer.training_step

    def broken(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        if self.state.global_step == fault["step"]:
            if fault["kind"] == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault["kind"] == "raise":
                raise ValueError("this rank is broken")
            if fault["kind"] == "hang":
                time.sleep(600)
            if fault["kind"] == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            if fault["kind"] == "nan":
                objective = self.objective
                self.objective = lambda target: objective(target) * torch.nan
        return step(self, model, inputs, *rest)

    patch.setattr(TransferTrainer, "training_step", broken)


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        run_job(each)
