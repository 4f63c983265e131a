"""Several processes on one run: who we are, and what ranks do together.

A rank is one process of a run that torchrun or accelerate launch started; rank 0 is the leader, which alone
writes and speaks. With one process everything here is a plain call. torch is imported where it is used:
`equipoise --help` asks for ranks too.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from equipoise.settings import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = "EQUIPOISE_TIMEOUT"
"""Environment variable: seconds that ranks wait for one another in a collective."""
DEFAULT_TIMEOUT = 600.0
_POLL = 0.05
_LOST = ("gloo", "nccl", "connection", "socket", "tcpstore", "broken pipe")
"""Words of what torch raises where another rank is gone; no backend has a type of its own for it."""

T = TypeVar("T")
U = TypeVar("U")


class PeerLost(RuntimeError):  # noqa: N818 (it tells what happened)
    """Another rank of this run stopped, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        rank: from 0.
        count: how many there are.
        local: rank among the processes of this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_leader(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0


class _State:
    """What `joined` leaves for the rest of the process."""

    store: Any = None
    groups: int = 0
    meetings: int = 0
    is_first_to_fail: bool | None = None


def launched() -> Ranks:
    """What torchrun, accelerate launch or Slurm's environment says; one process where it says nothing.

    Raises:
        ConfigError: RANK and WORLD_SIZE that are no numbers, or do not go together.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [os.environ.get(name) for name in names]
    if given[0] is None or given[1] is None:
        return Ranks()
    try:
        rank, count, local = (int(value) if value is not None else 0 for value in given)
    except ValueError:
        rank, count, local = -1, 0, 0
    if not 0 <= rank < count:
        raise ConfigError(
            f"expected RANK below WORLD_SIZE in the environment, as torchrun sets them, got RANK={given[0]} "
            f"and WORLD_SIZE={given[1]}; unset both to run in one process."
        )
    return Ranks(rank, count, local)


def is_launched() -> bool:
    """Whether a launcher started this process, be it as the only one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks() -> Ranks:
    """This process among those it has joined; alone where it has joined none."""
    distributed = _distributed()
    if distributed is None:
        return Ranks()
    return Ranks(distributed.get_rank(), distributed.get_world_size(), launched().local)


def _distributed() -> Any:
    """torch.distributed where a process group is up."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as distributed

    return distributed if distributed.is_available() and distributed.is_initialized() else None


# ---- joining, and failing together


@contextmanager
def joined() -> Generator[Ranks]:
    """Join the processes that were launched together, for the time of the block; nothing with one process.

    Collectives run over NCCL between GPUs and gloo between CPUs, and give up after `TIMEOUT` seconds (600
    unless set). Where the block fails, the other ranks learn of it.

    Raises:
        ConfigError: more processes on this machine than it has GPUs, or a timeout that is none.
        PeerLost: another rank stopped or does not answer.
    """
    here = launched()
    if not is_launched() or _distributed() is not None:
        yield ranks()
        return
    import torch
    import torch.distributed as distributed

    has_gpus = torch.cuda.is_available()
    if has_gpus and here.local >= torch.cuda.device_count():
        raise ConfigError(
            f"expected at most one process for each of the {torch.cuda.device_count()} GPUs of a machine, "
            f"got local rank {here.local}: lower --nproc-per-node, or hide the GPUs (CUDA_VISIBLE_DEVICES=) "
            "to run on CPU."
        )
    if has_gpus:
        torch.cuda.set_device(here.local)
    patience = timedelta(seconds=_timeout())
    _State.groups += 1  # a launcher's store outlives the group, and its keys would be found by the next
    try:
        store, rank, count = next(iter(distributed.rendezvous("env://", timeout=patience)))
        own = distributed.PrefixStore(f"equipoise-{_State.groups}", store)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpus else "gloo", store=distributed.PrefixStore("group", own),
            rank=rank, world_size=count, timeout=patience,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise PeerLost(
            f"rank {here.rank} cannot reach the other processes of this run through {place} (MASTER_ADDR and "
            f"MASTER_PORT, which torchrun sets): {str(error).strip().splitlines()[0]}"
        ) from error
    _State.store, _State.meetings = own, 0
    _State.is_first_to_fail = None
    try:
        yield ranks()
    except BaseException as error:
        _announce()
        if count > 1 and threading.current_thread() is threading.main_thread():
            # the launcher sends it to the ranks that are left, which still have to say why they end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not isinstance(error, PeerLost) and count > 1 and _is_loss(error):
            raise PeerLost(_loss(error)) from error
        raise
    else:  # a broken group may not come apart cleanly, and its process ends anyway
        distributed.barrier()  # the store may live in the leader, and others may still read from it
        distributed.destroy_process_group()
        _State.store = None


def _timeout() -> float:
    text = os.environ.get(TIMEOUT)
    try:
        seconds = DEFAULT_TIMEOUT if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{TIMEOUT}: expected a number of seconds above 0, got {text!r}.")
    return seconds


def _announce() -> None:
    try:
        _State.is_first_to_fail = _State.store.add("failed", 1) == 1
    except Exception:  # the store went with the rank that held it: then nobody is left to be told
        _State.is_first_to_fail = True


def speaks_of_failure(*, usage: bool) -> bool:
    """Whether this rank is the one to tell of a failure: the others fail because of it, or in the same way.

    ``usage`` marks a command that is wrong, which every rank finds out before they have joined.
    """
    if _State.is_first_to_fail is not None:
        return _State.is_first_to_fail
    try:
        return not usage or launched().is_leader
    except ConfigError:
        return True


def _is_loss(error: BaseException) -> bool:
    """Whether a failure is that of a collective."""
    text = str(error).lower()
    named = type(error).__name__.startswith("Dist")
    return isinstance(error, RuntimeError) and (named or any(word in text for word in _LOST))


def _loss(error: BaseException) -> str:
    late = any(word in str(error).lower() for word in ("timed out", "timeout"))
    what = f"did not answer within {_timeout():g} seconds ({TIMEOUT})" if late else "stopped"
    return f"another of the {ranks().count} processes of this run {what}."


# ---- together


def meet() -> None:
    """Wait for all ranks, for as long as it takes: one of them may be reading or writing a large model.

    Raises:
        PeerLost: one of them failed meanwhile.
    """
    distributed, store = _distributed(), _State.store
    if distributed is None or distributed.get_world_size() == 1:
        return
    if store is None:
        distributed.barrier()
        return
    _State.meetings += 1
    key, count = f"meeting-{_State.meetings}", distributed.get_world_size()
    there = store.add(key, 1)
    while there < count:
        if store.add("failed", 0):
            raise PeerLost("another process of this run failed; its message says why.")
        time.sleep(_POLL)
        there = store.add(key, 0)


def leader_does(work: Callable[[], object]) -> None:
    """Have the leader do something while the others wait; where it fails, they fail too."""
    if ranks().is_leader:
        work()
    meet()


def in_turn(work: Callable[[], T]) -> T:
    """The first rank of each machine works, then the others: they find in a cache what it left there."""
    if ranks().local != 0:
        meet()
        return work()
    done = work()
    meet()
    return done


def from_leader(value: T) -> T:
    """The leader's value, on every rank."""
    distributed = _distributed()
    if distributed is None or distributed.get_world_size() == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def gathered(value: T) -> list[T]:
    """Everybody's value in the order of ranks, on every rank."""
    distributed = _distributed()
    if distributed is None or distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return any(gathered(flag))


def spread(
    units: Sequence[U], work: Callable[[U], T], *, tick: Callable[[], object] = lambda: None
) -> list[T]:
    """``work`` of every unit, in their order and on every rank; ranks share them out one by one.

    A unit's result does not depend on how many ranks there are, so that sums over them in order do not
    either. Ranks that run out of units repeat the last one: a sharded model's forward pass needs all ranks.
    ``tick`` is called once a unit.
    """
    here = ranks()
    mine: list[T] = []
    for start in range(0, len(units), here.count):
        at = start + here.rank
        result = work(units[min(at, len(units) - 1)])
        if at < len(units):
            mine.append(result)
        for _ in units[start : start + here.count]:
            tick()
    by_rank = gathered(mine)
    return [by_rank[i % here.count][i // here.count] for i in range(len(units))]


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors with the leader's, in place."""
    distributed = _distributed()
    if distributed is not None and distributed.get_world_size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
