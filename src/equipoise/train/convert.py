"""A whole conversion: donor and recipe in, a model's directory out, written at the end or not at all."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from equipoise import __version__
from equipoise.config import ConfigError, HybridConfig, RunConfig
from equipoise.data.packing import PackedDataset
from equipoise.data.preparing import HELD_OUT_ROWS, TrainingData, prepare_data
from equipoise.data.sources import absolute_source
from equipoise.distributed import from_leader, in_turn, joined, leader_does, meet, ranks
from equipoise.files import make_directory, write_text
from equipoise.layers.interface import mixers_of
from equipoise.models import adapters
from equipoise.models.auto import record_donor
from equipoise.models.branches import branches
from equipoise.models.card import window_in_words
from equipoise.models.layout import reach, report_layers, state_bytes
from equipoise.models.load import load_donor, load_tokenizer
from equipoise.models.sharding import own_class, shard, whole_weights
from equipoise.models.surgery import hybridize
from equipoise.secrets import has_secret
from equipoise.train.allocating import allocated, as_dict
from equipoise.train.ending import ended_by_sigterm, only_run
from equipoise.train.heard import Heard, as_json, heard, tell
from equipoise.train.outputs import RUN, START, WORK, claimed_by_leader, clean_up, left_behind, staged
from equipoise.train.parallel import check_batches, chosen_parallel
from equipoise.train.progress import reported
from equipoise.train.reporting import LOGS, check_reporter, reporting
from equipoise.train.stage_files import StageResult, finished_result, latest_checkpoint
from equipoise.train.stages import finetune, lora_targets, transfer
from equipoise.train.watching import Watcher, check_watched, mean_nll

LOOK_ROWS = 8
"""Rows that are scored at once, at most."""


@dataclass(frozen=True)
class RunRecord:
    """What a conversion did, as `run.json` holds it.

    Attributes:
        recipe: name of the recipe.
        settings: all of its settings.
        donor: name or path of the donor.
        seed: of initialisation, order of data and dropout draws.
        train_tokens, train_seconds: of both stages together.
        stages: steps, tokens, seconds and log of each stage; the log holds every watched value by step
            (`equipoise.train.watching.watched_history`).
        held_out: mean loss in nats per token on held-out rows: the donor's and the result's.
        allocation: where the bytes of state went, and why (`equipoise.models.allocation.Allocation`).
        heard: by layer and head, the linear branch's part of the output on held-out rows, where windows lose
            most (`equipoise.train.heard`); empty where they are enough, or nothing was asked.
        equipoise_version: that made it.
    """

    recipe: str
    settings: dict[str, Any]
    donor: str
    seed: int
    train_tokens: int
    train_seconds: float
    stages: dict[str, dict[str, Any]]
    held_out: dict[str, float]
    allocation: dict[str, Any] | None = None
    heard: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    equipoise_version: str = __version__


def rows_at_once(run: RunConfig) -> int:
    """Rows to score at once: no more than a stage trains on at once, as their logits weigh as much."""
    stages = [stage for stage in (run.transfer, run.finetune) if stage is not None]
    return min([LOOK_ROWS, *(stage.micro_batch_size or stage.batch_size for stage in stages)])


def mean_loss(model: PreTrainedModel, rows: PackedDataset, *, batch_size: int = LOOK_ROWS) -> float:
    """Mean next-token loss on packed rows, in nats per token, in the state the model is in."""
    subset = [rows[i] for i in range(min(HELD_OUT_ROWS, len(rows)))]
    return mean_nll(model, subset, batch_size=batch_size)


def convert(
    donor: str,
    run: RunConfig,
    output: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    console: Console | None = None,
    trust_remote_code: bool = False,
    watchers: Sequence[Watcher] = (),
    parallel: str = "auto",
) -> RunRecord:
    """Convert a donor by a recipe and write the result to a new directory.

    Where torchrun or accelerate launch started several processes, all of them call this with the same
    arguments; rank 0 alone writes and speaks, and the result is that of one process.

    Args:
        donor: directory, or name on the Hub.
        run: the recipe.
        output: where the model goes; must be new or empty.
        seed: of everything random.
        resume: go on with a run that was killed, from its last training checkpoint, if there is one.
        console: where progress goes.
        trust_remote_code: run code that comes with the donor (off unless asked).
        watchers: what to look at while training, beside the branches, where the recipe watches.
        parallel: what several processes do: ddp, fsdp2 (the donor sharded over them), or auto; see
            `equipoise.train.parallel`.

    Raises:
        ConfigError, UnknownNameError, CheckpointError, ConversionError, DataError, TrainingDiverged: each
            says what to do.
        Terminated: SIGTERM came; the optimiser step under way was finished and saved.
        PeerLost: another process of the run failed or does not answer.
    """
    output = Path(output)
    check_reporter(run.report_to)
    check_watched(run, watchers)
    check_no_secret(donor, "DONOR")
    check_no_secret(run.data.source, "data.source")
    way = chosen_parallel(parallel)
    with joined() as here:
        check_batches(run)
        if resume and from_leader(left_behind(output)):
            return completed(output, run, donor, seed)
        if console is None or not here.is_leader:
            console = Console(stderr=True, quiet=not here.is_leader)
        with claimed_by_leader(output, resume=resume), ended_by_sigterm() as ending:
            leader_does(partial(check_start, output / WORK, run, donor, seed))
            sharded = way == "fsdp2"
            if sharded and run.allocation is not None:
                raise ConfigError(
                    "allocation measures a whole donor, and fsdp2 shards it: run `equipoise allocate` on one "
                    "process, and convert by the recipe it writes."
                )
            return _convert(
                donor, run, output, seed, resume, console, trust_remote_code, watchers, ending, sharded
            )


def _convert(
    donor: str,
    run: RunConfig,
    output: Path,
    seed: int,
    resume: bool,
    console: Console,
    trust_remote_code: bool,
    watchers: Sequence[Watcher],
    ending: TrainerCallback,
    sharded: bool,
) -> RunRecord:
    model = load_donor(donor, trust_remote_code=trust_remote_code, to_shard=sharded)
    tokenizer = load_tokenizer(donor, trust_remote_code=trust_remote_code)
    trains = run.transfer is not None or run.finetune is not None
    data, allocation = None, None
    if run.allocation is not None:
        data = in_turn(lambda: prepare_data(run, model, tokenizer, seed=seed))
        allocation = allocated(
            model, run, data.rows, output / WORK, batch_size=rows_at_once(run), console=console
        )
        run = run.model_copy(update={"hybrid": allocation.hybrid})
    if run.hybrid is not None:
        hybridize(model, run.hybrid, seed=seed, check=not sharded or ranks().is_leader)
        record_donor(model, donor)
        describe(model, run.hybrid, console)
    if sharded:
        shard(model)
    if data is None and trains:
        data = in_turn(lambda: prepare_data(run, model, tokenizer, seed=seed))
    held_out = {"donor": _donor_loss(model, run, data)} if data is not None else {}
    results: dict[str, StageResult] = {}
    if data is not None:
        results = train(
            model, run, data, output / WORK, seed=seed, resume=resume, console=console, watchers=watchers,
            callbacks=[ending],
        )  # fmt: skip
        held_out["result"] = mean_loss(model, data.held_out, batch_size=rows_at_once(run))
        console.print(
            f"held-out loss: donor {held_out['donor']:.4f}, {run.name} {held_out['result']:.4f} nats/token",
            highlight=False,
            soft_wrap=True,
        )
    listened = {} if sharded or data is None else _listened(model, data, console)
    settings = run.model_dump(mode="json")
    settings["data"]["source"] = absolute_source(run.data.source)  # an audit may start elsewhere
    record = RunRecord(
        recipe=run.name, settings=settings, donor=donor, seed=seed,
        train_tokens=sum(r.tokens for r in results.values()),
        train_seconds=float(sum(r.seconds for r in results.values())),
        stages={name: asdict(result) for name, result in results.items()}, held_out=held_out,
        allocation=None if allocation is None else as_dict(allocation), heard=as_json(listened),
    )  # fmt: skip
    weights = whole_weights(model) if run.checkpoint == "full" else None
    if ranks().is_leader:
        with own_class(model):
            save(model, tokenizer, record, output, donor=donor, weights=weights)
        clean_up(output)
    meet()
    return record


def completed(output: Path, run: RunConfig, donor: str, seed: int, **more: Any) -> RunRecord:
    """The record of a run that was killed when its result was in place, but not its checkpoints out of it."""
    with only_run(output) if ranks().is_leader else nullcontext():
        leader_does(partial(check_start, output / WORK, run, donor, seed, **more))
        record = RunRecord(**json.loads((output / RUN).read_text(encoding="utf-8")))
        leader_does(partial(clean_up, output))
    return record


def check_no_secret(address: str, what: str) -> None:
    """Refuse an address with a password or token in it, since `run.json` and cards would carry it on.

    Raises:
        ConfigError: names the setting, and not the secret.
    """
    if has_secret(address):
        raise ConfigError(
            f"{what}: expected a name or address without a user, password or token in it, since it is "
            "written to run.json. Give the token as HF_TOKEN, or log in with `hf auth login`."
        )


def check_start(work: Path, run: RunConfig, donor: str, seed: int, **more: Any) -> None:
    """Note what a run is started with, and ``more``; a resumed one must be started with the same.

    Raises:
        ConfigError: it is not; names what differs.
    """
    check_no_secret(donor, "DONOR")
    check_no_secret(run.data.source, "data.source")
    started = {"donor": donor, "seed": seed, **more, **run.model_dump(mode="json")}
    place = work / START
    if not place.is_file():
        make_directory(work)
        write_text(place, json.dumps(started, indent=2))
        return
    try:
        before: dict[str, Any] = dict(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{place}: what the run was started with cannot be read ({error}), so it cannot be resumed with "
            "the same. Put the file back, or start anew in another --output."
        ) from None
    changed = _differences(before, started)
    if changed:
        raise ConfigError(
            f"{work.parent}: a run is resumed as it was started, but this one differs in "
            f"{'; '.join(changed)}. Give the same settings, or start anew in another --output."
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    changed: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            changed.append(f"{prefix}{key} (was {old}, now {new})")
    return changed


def _donor_loss(model: PreTrainedModel, run: RunConfig, data: TrainingData) -> float:
    if run.hybrid is None:
        return mean_loss(model, data.held_out, batch_size=rows_at_once(run))
    with branches(model, "softmax"):
        return mean_loss(model, data.held_out, batch_size=rows_at_once(run))


def _listened(model: PreTrainedModel, data: TrainingData, console: Console) -> Heard:
    """What is heard of the linear branches of a hybrid that has windows everywhere."""
    if not (mixers := mixers_of(model)) or any(mixer.config.window is None for mixer in mixers):
        return {}
    rows = [data.held_out[i] for i in range(min(LOOK_ROWS, len(data.held_out)))]
    found = heard(model, rows)
    tell(found, console)
    return found


def describe(model: PreTrainedModel, hybrid: HybridConfig, console: Console) -> None:
    """Say what was converted, how far it reaches and what its state weighs."""
    layers = report_layers(model)
    left = {"local": layers.local, "softmax": layers.softmax}
    kept = [f"{len(indices)} left {kind}" for kind, indices in left.items() if indices]
    limit = reach(model)
    console.print(
        f"{', '.join([f'converted {len(layers.converted)} layers', *kept])}; window "
        f"{'none' if hybrid.window is None else window_in_words(hybrid.model_dump(mode='json'))}, "
        f"reach {'unlimited' if limit is None else limit} tokens, decode state {state_bytes(model):,} bytes",
        highlight=False,
        soft_wrap=True,
    )


def train(
    model: PreTrainedModel,
    run: RunConfig,
    data: TrainingData,
    work: Path,
    *,
    seed: int,
    resume: bool = False,
    console: Console | None = None,
    watchers: Sequence[Watcher] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, StageResult]:
    """Run a recipe's stages on a converted model, in place; ``watchers`` as in `convert`.

    ``callbacks`` are of both stages, beside those that show and report them.
    """
    console = console or Console(stderr=True, quiet=True)
    results: dict[str, StageResult] = {}
    if run.finetune is not None:
        lora_targets(model, run.finetune)  # a wrong name is known before stage 1 has run for hours
    set_seed(seed)
    config: Any = model.config
    use_cache = config.use_cache
    rows, looked_at = data.rows, data.held_out if data.aside is None else data.aside
    if run.transfer is not None:
        place = work / "transfer"
        with _shown(console, run, place, resume=resume) as shown:
            results["transfer"] = transfer(
                model, run, rows, place, held_out=looked_at, seed=seed, callbacks=[*shown, *callbacks],
                watchers=watchers, resume=resume,
            )  # fmt: skip
    if run.finetune is not None:
        place = work / "finetune"
        with _shown(console, run, place, resume=resume) as shown:
            results["finetune"] = finetune(
                model, run, rows, looked_at, place, seed=seed, callbacks=[*shown, *callbacks],
                watchers=watchers, resume=resume,
            )  # fmt: skip
    config.use_cache = use_cache  # Trainer switches it off
    return results


@contextmanager
def _shown(
    console: Console, run: RunConfig, place: Path, *, resume: bool
) -> Generator[list[TrainerCallback]]:
    """Callbacks of one stage: progress, and the reporter that the recipe asks for."""
    last = latest_checkpoint(place) if resume else None
    resumed_at = None if last is None else int(last.name.rpartition("-")[2])
    reports = ranks().is_leader and not (resume and finished_result(place) is not None)
    reporter = run.report_to if reports else "none"
    logs = place.parent.parent / LOGS / place.name
    with (
        reported(console, f"{run.name} {place.name}") as shown,
        reporting(reporter, logs, resumed_at=resumed_at) as sent,
    ):
        yield [*shown, *sent]


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    output: Path,
    *,
    donor: str,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write model, tokenizer and `run.json`; files move into place complete, config.json after weights.

    ``weights`` stand for the model's own where it is sharded (`equipoise.models.sharding.whole_weights`).
    """
    with staged(output) as staging:
        tokenizer.save_pretrained(staging)
        if record.settings["hybrid"] is None:
            adapters.save_adapter_checkpoint(model, staging, donor)
        else:
            delta = record.settings["checkpoint"] == "delta"
            model.save_pretrained(staging, delta=delta, state_dict=weights)  # pyright: ignore[reportCallIssue]
        write_text(staging / RUN, json.dumps(asdict(record), indent=2))
