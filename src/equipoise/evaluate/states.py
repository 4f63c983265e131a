"""Names of the branch states to evaluate: a state and the reading of it in one word, as in audits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from equipoise.config import ConfigError
from equipoise.models.branches import BRANCH_STATES
from equipoise.ops.types import Reading
from equipoise.registry import unknown_name

READINGS: tuple[Reading, ...] = get_args(Reading)
DONOR = "softmax"
DEFAULT = ("both", "window", "linear", "none", "sinks", DONOR)
"""The rows of the paper's Table 1."""
_SINGLE = ("window", "linear")
NAMES = (*BRANCH_STATES, *(f"{branch}_{reading}" for branch in _SINGLE for reading in READINGS))


@dataclass(frozen=True, slots=True)
class BranchState:
    """One row of a result.

    Attributes:
        name: `window` and `linear` are read literally, `window_renormalised` and the like are not.
        state, reading: what `equipoise.branches` takes.
    """

    name: str
    state: str
    reading: Reading


def branch_state(name: str, reading: Reading = "literal") -> BranchState:
    """The state behind a name.

    Args:
        name: of `NAMES`.
        reading: of `window` and `linear` where the name does not end in one.

    Raises:
        UnknownNameError: no such state.
    """
    if name not in NAMES:
        raise unknown_name("branch state", name, NAMES)
    state, _, named = name.partition("_") if name.startswith(_SINGLE) else (name, "", "")
    read = cast(Reading, named or (reading if state in _SINGLE else "literal"))
    return BranchState(state if read == "literal" else f"{state}_{read}", state, read)


def chosen_states(
    wanted: str | None, reading: Reading, described: Mapping[str, Any] | None, *, donor: bool = True
) -> tuple[BranchState, ...]:
    """The states to run, in order and each once.

    The donor is added where it was not named, since what a state recovers is its share of the donor's score.

    Args:
        wanted: comma-separated names; None for `DEFAULT`, of which a model that is not converted has the
            donor alone.
        reading: see `branch_state`.
        described: the `equipoise` entry of the model's configuration; None if it is not converted.
        donor: whether to add the donor.

    Raises:
        UnknownNameError: a name that is none.
        ConfigError: no name, or a state that the model does not have.
    """
    default = DEFAULT if described else (DONOR,)
    names = [part.strip() for part in wanted.split(",")] if wanted is not None else list(default)
    if not all(names):
        raise ConfigError(
            f"expected comma-separated branch states, got {wanted!r}; {','.join(default)} is the default"
        )
    states = list(dict.fromkeys(branch_state(name, reading) for name in names))
    others = [state.name for state in states if state.name != DONOR]
    if not described and others:
        raise ConfigError(
            f"branch states {', '.join(others)}: this model is not converted, so it has no branches to "
            f"switch; only {DONOR}, the model as it is, can be evaluated. `equipoise convert` makes a "
            "hybrid of it."
        )
    merged = bool((described or {}).get("merged"))
    if merged and wanted is not None and any(state.name == DONOR for state in states):
        raise ConfigError(
            f"branch state {DONOR}: the LoRA adapters of this checkpoint are merged, so the donor cannot be "
            "run from it. Evaluate the donor itself, or a checkpoint saved without merging."
        )
    kept = [state for state in states if state.name != DONOR or (donor and not merged) or wanted is not None]
    if donor and not merged:
        kept.append(branch_state(DONOR))
    return tuple(sorted(dict.fromkeys(kept), key=lambda state: state.name != DONOR))
