"""Names of branch states."""

from __future__ import annotations

import pytest

from equipoise.config import ConfigError
from equipoise.evaluate.states import BranchState, branch_state, chosen_states
from equipoise.registry import UnknownNameError

CONVERTED = {"hybrid": {}}


def names(wanted: str | None, **options: object) -> list[str]:
    settings = {"reading": "literal", "described": CONVERTED, **options}
    return [state.name for state in chosen_states(wanted, **settings)]  # type: ignore[arg-type]


def test_names_hold_the_reading() -> None:
    assert branch_state("window") == BranchState("window", "window", "literal")
    assert branch_state("window", "renormalised") == branch_state("window_renormalised")
    assert branch_state("linear_renormalised") == BranchState("linear_renormalised", "linear", "renormalised")
    assert branch_state("linear_literal", "renormalised") == branch_state("linear")
    assert branch_state("both", "renormalised") == BranchState("both", "both", "literal")
    assert branch_state("softmax_lora") == BranchState("softmax_lora", "softmax_lora", "literal")


@pytest.mark.parametrize(
    ("name", "near"), [("windw", "window"), ("linear_renormalized", "linear_renormalised")]
)
def test_unknown_name(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown branch state '{name}'. Did you mean '{near}'?"):
        branch_state(name)


def test_rows_come_once_with_the_donor_first() -> None:
    assert names(None) == ["softmax", "both", "window", "linear", "none", "sinks"]
    assert names("both,window , both,window_literal") == ["softmax", "both", "window"]
    assert names("window,softmax") == ["softmax", "window"]
    both_readings = ["softmax", "window", "window_renormalised"]
    assert names("window,window_renormalised") == both_readings
    assert names("window", reading="renormalised") == ["softmax", "window_renormalised"]


def test_without_the_donor_only_where_it_is_named() -> None:
    assert names("both,window", donor=False) == ["both", "window"]
    assert names(None, donor=False) == ["both", "window", "linear", "none", "sinks"]
    assert names("both,softmax", donor=False) == ["softmax", "both"]


def test_model_that_is_not_converted_has_the_donor_alone() -> None:
    assert names(None, described=None) == names("softmax", described=None) == ["softmax"]
    with pytest.raises(ConfigError, match="both, none: this model is not converted, so it has no branches"):
        names("both,softmax,none", described=None)


def test_donor_of_merged_adapters_cannot_be_run() -> None:
    merged = {"hybrid": {}, "merged": True}
    assert names(None, described=merged) == ["both", "window", "linear", "none", "sinks"]
    assert names("both,softmax_lora", described=merged) == ["both", "softmax_lora"]
    with pytest.raises(ConfigError, match="adapters of this checkpoint are merged"):
        names("both,softmax", described=merged)


@pytest.mark.parametrize("wanted", ["", "both,", ",", " "])
def test_empty_name(wanted: str) -> None:
    with pytest.raises(ConfigError, match="expected comma-separated branch states"):
        names(wanted)
