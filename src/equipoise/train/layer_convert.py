"""A whole conversion of a model larger than memory: stage 1 layer by layer, then a normal checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, set_seed

from equipoise.config import ConfigError, RunConfig
from equipoise.data.preparing import HELD_OUT_ROWS, prepare_data
from equipoise.data.sources import absolute_source
from equipoise.models.auto import record_donor
from equipoise.models.layer_loading import LayerLoader, load_skeleton
from equipoise.models.layer_running import LayerRunner
from equipoise.models.load import load_tokenizer
from equipoise.models.surgery import hybridize
from equipoise.train.convert import RunRecord, check_start, completed, describe, save
from equipoise.train.ending import ended_by_sigterm
from equipoise.train.layer_held_out import held_out_losses
from equipoise.train.layer_progress import LayerProgress
from equipoise.train.layer_saving import save_full
from equipoise.train.layer_stream import POLL, LayerStream
from equipoise.train.layer_workers import take_rank
from equipoise.train.objectives import FAR_OBJECTIVES
from equipoise.train.outputs import START, WORK, OutputError, claimed, clean_up, left_behind
from equipoise.train.rank_trainer import TrainingDiverged
from equipoise.train.stage_files import FINISHED, StageResult

STARTED = {"stream_layers": True}
"""Part of what a run is started with, so that it is not resumed the other way."""


def check_streamable(run: RunConfig) -> None:
    """Refuse what needs the whole model at once.

    Raises:
        ConfigError: stage 2, looks at the whole model, a reporter, or nothing to train.
    """
    if run.hybrid is None or run.transfer is None:
        raise ConfigError(
            f"--stream-layers trains stage 1 layer by layer, and {run.name} has no transfer. Choose a recipe "
            "that has (hedgecats, ssd, zero-shot), or convert without --stream-layers."
        )
    reasons, changes = [], []
    if run.finetune is not None:
        reasons.append("stage 2 (finetune) needs all of it, sharded over GPUs by FSDP2")
        changes.append("--set finetune=null")
    far = ", ".join(FAR_OBJECTIVES & run.transfer.objectives.keys())
    if far:
        reasons.append(f"{far} looks at predictions, which all layers make together")
        changes.append("--set 'transfer.objectives={output: 1.0, hybrid-output: 1.0}'")
    if run.transfer.fit_scores:
        reasons.append("fit_scores runs the donor before layers are trained")
        changes.append("--set transfer.fit_scores=false")
    if run.allocation is not None:
        reasons.append("allocation measures all of it")
        changes.append("--set allocation=null")
    if run.watch is not None:
        reasons.append("watch looks at all of it while it trains")
        changes.append("--set watch=null")
    if run.report_to != "none":
        reasons.append(
            f"{run.report_to} would get a run of its own from every layer (the log is in run.json)"
        )
        changes.append("--report-to none")
    if reasons:
        raise ConfigError(
            f"--stream-layers never holds the whole model, and trains stage 1 only: {'; '.join(reasons)}. "
            f"Add `{' '.join(changes)}` to convert by stage 1 of {run.name}."
        )


def convert_by_layers(
    donor: str,
    run: RunConfig,
    output: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    join: bool = False,
    console: Console | None = None,
    trust_remote_code: bool = False,
) -> RunRecord | None:
    """Convert a donor of any size with about one layer in memory; on CPU its maps are those of `convert`.

    Arguments and errors as `equipoise.train.convert.convert`. The result is a normal checkpoint; as ``full``
    it holds copies of the donor's files, in their own dtype.

    Args:
        join: help the run that was started in ``output`` with the same settings, from another process or
            machine that sees the folder; returns None once no work is left. Ranks of torchrun other than the
            first join by themselves.

    Raises:
        ConfigError: see `check_streamable`; to join, also where no such run is under way.
    """
    console = console or Console(stderr=True)
    check_streamable(run)
    output, rank = Path(output), take_rank()
    while rank and not (output / WORK / START).is_file():
        time.sleep(POLL)
    if join or rank:
        if not (output / WORK / START).is_file():
            raise OutputError(
                f"{output}: found no run to join. Start it first: the same command without --join."
            )
        check_start(output / WORK, run, donor, seed, **STARTED)
        with ended_by_sigterm() as ending:
            _help(donor, run, output, seed, console, trust_remote_code, ending)
        return None
    if resume and left_behind(output):
        return completed(output, run, donor, seed, **STARTED)
    with claimed(output, resume=resume), ended_by_sigterm() as ending:
        check_start(output / WORK, run, donor, seed, **STARTED)
        return _convert(donor, run, output, seed, console, trust_remote_code, ending)


@contextmanager
def _streaming(
    donor: str, run: RunConfig, work: Path, seed: int, console: Console, trust_remote_code: bool,
    ending: TrainerCallback,
) -> Generator[LayerStream]:  # fmt: skip
    assert run.hybrid is not None
    model = load_skeleton(donor, trust_remote_code=trust_remote_code)
    hybridize(model, run.hybrid, seed=seed, check=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runner = LayerRunner(model, LayerLoader(model, donor, device=device))
    stream = LayerStream(model, runner, run, work, seed=seed, callbacks=[ending])
    progress = LayerProgress(console, run.name, len(stream.learning), lambda: len(stream.finished()))
    stream.callbacks.insert(0, progress)
    try:
        yield stream
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{str(error).rstrip('.')}.{kept_layers(work)}") from None
    finally:
        progress.close()
        runner.close()


def kept_layers(work: Path) -> str:
    """A sentence on what a run that failed has kept."""
    count = len(list(work.glob(f"layer-*/{FINISHED}")))
    return f" {count} finished layers are kept in {work}; --resume goes on from them." if count else ""


def _help(
    donor: str, run: RunConfig, output: Path, seed: int, console: Console, trust_remote_code: bool,
    ending: TrainerCallback,
) -> None:  # fmt: skip
    with _streaming(donor, run, output / WORK, seed, console, trust_remote_code, ending) as stream:
        while stream.extent() is None and (output / WORK / START).is_file():
            time.sleep(POLL)
        stream.work_off()


def _convert(
    donor: str, run: RunConfig, output: Path, seed: int, console: Console, trust_remote_code: bool,
    ending: TrainerCallback,
) -> RunRecord:  # fmt: skip
    tokenizer = load_tokenizer(donor, trust_remote_code=trust_remote_code)
    work = output / WORK
    with _streaming(donor, run, work, seed, console, trust_remote_code, ending) as stream:
        model: Any = stream.model
        record_donor(model, donor)
        assert run.hybrid is not None
        assert run.transfer is not None
        describe(model, run.hybrid, console)
        data = prepare_data(run, model, tokenizer, seed=seed)
        set_seed(seed)
        stream.embed(data.rows)
        stream.work_off()
        stream.install()
        held_out = held_out_losses(
            stream.runner, [data.held_out[i] for i in range(min(HELD_OUT_ROWS, len(data.held_out)))],
            work / "held-out", batch_size=run.transfer.micro_batch_size or run.transfer.batch_size,
        )  # fmt: skip
        console.print(
            f"held-out loss: donor {held_out['donor']:.4f}, {run.name} {held_out['result']:.4f} nats/token",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        result = together(stream.results())
        settings = run.model_dump(mode="json")
        settings["data"]["source"] = absolute_source(run.data.source)  # an audit may start elsewhere
        record = RunRecord(
            recipe=run.name, settings=settings, donor=donor, seed=seed, train_tokens=result.tokens,
            train_seconds=float(result.seconds), stages={"transfer": asdict(result)}, held_out=held_out,
        )  # fmt: skip
        if run.checkpoint == "delta":
            save(model, tokenizer, record, output, donor=donor)
        else:
            save_full(model, tokenizer, record, output, weights=stream.runner.loader.weights)
    clean_up(output)
    return record


def together(results: dict[int, StageResult]) -> StageResult:
    """One stage of all layers' training, logged as joint training would: losses are means over layers; norms
    of gradients (as a root of squares) and seconds add up."""
    first = next(iter(results.values()))
    history: list[dict[str, float]] = []
    for entries in zip(*(result.history for result in results.values()), strict=True):
        entry = {
            name: combine([float(each[name]) for each in entries])
            for name, combine in _COMBINED.items() if all(name in each for each in entries)
        }  # fmt: skip
        history.append(entry | {name: value for name, value in entries[0].items() if name in _SHARED})
    return StageResult(
        steps=first.steps, tokens=first.tokens, seconds=sum(r.seconds for r in results.values()),
        history=history,
    )  # fmt: skip


_SHARED = ("step", "learning_rate")
_COMBINED: dict[str, Callable[[list[float]], float]] = {
    "loss": fmean, "train_loss": fmean, "grad_norm": lambda norms: math.hypot(*norms),
    "linear_gradient": lambda norms: math.hypot(*norms), "window_gradient": lambda norms: math.hypot(*norms),
    "train_runtime": sum,
}  # fmt: skip
