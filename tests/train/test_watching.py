"""What a look sees, that it leaves no trace in training, and that early stopping can go by it."""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import TrainerCallback

from equipoise.audit.attribution import attribute
from equipoise.config import ConfigError
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.models.branches import branches
from equipoise.ops import Branches
from equipoise.registry import UnknownNameError
from equipoise.statistics import ScoreTable, bootstrap
from equipoise.train.progress import reported
from equipoise.train.stages import StageResult, finetune, transfer
from equipoise.train.watching import (
    Attribution,
    attribution_names,
    check_watched,
    derived,
    linear_share,
    mean_nll,
    spread_rows,
    untouched,
    watched_history,
)

STAGE: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2}
DROPOUT = {"window_dropout": {"probabilities": [0.9, 0.5]}, "train_maps": True}
STAGES: dict[str, dict[str, Any]] = {
    "transfer": {"transfer": STAGE},
    "finetune": {"finetune": STAGE | DROPOUT},
}


class Scripted:
    """A watcher that says what it is told by step, and meddles with everything it can reach."""

    def __init__(self, name: str, values: Mapping[int, float]) -> None:
        self.names = (name,)
        self.values = values
        self.seen: dict[int, dict[str, Tensor]] = {}

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.seen[step] = weights(model)
        torch.rand(3), np.random.rand(), random.random()
        model.train()
        with branches(model, "softmax"):
            pass
        return {self.names[0]: self.values.get(step, float("nan"))}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".hybrid." in n or "lora" in n}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def run_stage(run: Any, model: Any, rows: Any, directory: Path, held_out: Any, **kwargs: Any) -> StageResult:
    if run.transfer is not None:
        return transfer(model, run, rows, directory, held_out=held_out, **kwargs)
    return finetune(model, run, rows, held_out, directory, **kwargs)


class TestAttribution:
    def test_share_by_hand(self) -> None:
        """1/2 [(5 - 3) + (2 - 1)] = 1.5 of 5 - 1."""
        share = {
            values: linear_share(both=values[0], window=values[1], linear=values[2], none=5.0)
            for values in ((1.0, 2.0, 3.0), (1.0, 1.0, 5.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0))
        }
        assert list(share.values()) == [1.5 / 4, 0.0, 1.0, 0.5]  # unused, alone, redundant
        assert np.isnan(linear_share(both=5.0, window=1.0, linear=1.0, none=5.0))

    def test_all_of_it_by_hand(self) -> None:
        nll = {"nll": 2.0, "nll_window": 3.0, "nll_linear": 4.0, "nll_none": 6.0, "nll_donor": 1.0}
        literal = {"nll_window_literal": 5.0, "nll_linear_literal": 5.0}
        assert derived(nll | literal) == nll | literal | {
            "recovered": 0.8, "linear_recovered": 0.4, "gap": 1.0, "linear_share": 3 / 8,
            "linear_share_literal": 0.5,
        }  # fmt: skip

    def test_share_is_the_audits(self) -> None:
        generator = np.random.default_rng(0)
        sums = {state: generator.uniform(1, 5, 9) for state in ("both", "window", "linear")}
        table = ScoreTable.from_nll(
            {
                "both": sums["both"], "none": np.full(9, 6.0), "window": sums["window"],
                "linear": sums["linear"], "window_renormalised": sums["window"],
                "linear_renormalised": sums["linear"],
            },
            np.ones(9),
        )  # fmt: skip
        found = attribute(bootstrap(table, resamples=1), "renormalised").linear_share.value
        means = {state: float(values.mean()) for state, values in sums.items()}
        assert linear_share(none=6.0, **means) == pytest.approx(found, rel=1e-12)

    def test_looks_are_taken_in_the_states_they_name(self, recipe: Any, hybrid: Any, packed: Any) -> None:
        run = recipe(watch={"rows": 5, "literal": True}, hybrid={"gate_value": 0.7})
        model, rows = hybrid(run), packed(5, document=9)
        found = Attribution(run, rows, batch_size=2)(model, 3)
        assert all(mixer.mode == AttentionMode() for mixer in mixers_of(model))
        batch = {n: torch.stack([rows[i][n] for i in range(5)]) for n in rows[0]}
        alone = {"reading": "renormalised"}
        for name, mode in {
            "nll": Branches(), "nll_window": Branches(linear=False, **alone),
            "nll_linear": Branches(window=False, **alone), "nll_window_literal": Branches(linear=False),
            "nll_linear_literal": Branches(window=False), "nll_none": AttentionMode("none"),
            "nll_donor": AttentionMode("softmax"),
        }.items():  # fmt: skip
            with torch.no_grad(), branches(model, mode):
                assert found[name] == pytest.approx(model(**batch).loss.item(), rel=1e-5), name
        assert len({round(found[name], 5) for name in found if name.startswith("nll")}) == 7
        assert tuple(found) == attribution_names(run)

    @pytest.mark.parametrize("targets", [None, ["up_proj", "q_proj"]])
    def test_what_is_scored_once_stays_the_same(
        self, targets: Any, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """The donor is without adapters, and LoRA on attention cannot reach a model without attention."""
        stage = {**STAGE, "learning_rate": 0.1, "targets": targets}
        run = recipe(finetune=stage, watch={"every": 3})
        fresh = Attribution(run, rows, batch_size=8)(hybrid(run), 0)
        model = hybrid(run)
        looks = watched_history(run_stage(run, model, rows, tmp_path, rows).history)
        after = Attribution(run, rows, batch_size=8)(model, 6)
        assert after["nll_donor"] == pytest.approx(fresh["nll_donor"])
        assert (after["nll_none"] == pytest.approx(fresh["nll_none"])) == (targets is None)
        for name, value in after.items():  # what the last look had says the same, known before or not
            assert looks[2].get(name, float("nan")) == pytest.approx(value, rel=1e-3, nan_ok=True)
        assert looks[0]["nll"] == pytest.approx(fresh["nll"])
        assert abs(looks[2]["nll"] - fresh["nll"]) > 1e-2

    @pytest.mark.parametrize("options", [{"window": None}, {"feature_map": None}])
    def test_a_single_branch_has_no_share(self, options: Any, recipe: Any, hybrid: Any, rows: Any) -> None:
        run = recipe(watch={"literal": True}, hybrid=options)
        found = Attribution(run, rows, batch_size=8)(hybrid(run), 0)
        assert set(found) == {"nll", "nll_none", "nll_donor", "recovered"} == set(attribution_names(run))

    def test_nothing_to_see(self, recipe: Any) -> None:
        assert attribution_names(recipe()) == ()
        assert attribution_names(recipe(hybrid=None, watch={})) == ()

    def test_rows_are_spread(self, packed: Any) -> None:
        rows = packed(10)
        chosen = [row["input_ids"] for row in spread_rows(rows, 4)]
        assert all(
            torch.equal(ids, rows[i]["input_ids"]) for ids, i in zip(chosen, (0, 2, 5, 7), strict=True)
        )
        assert len(spread_rows(rows, 99)) == 10

    def test_mean_is_over_tokens(self, recipe: Any, hybrid: Any, packed: Any) -> None:
        """Not over batches: rows differ in what they have to predict."""
        model, rows = hybrid(recipe()), [*spread_rows(packed(2), 2), *spread_rows(packed(1, document=3), 1)]
        batch = {n: torch.stack([row[n] for row in rows]) for n in rows[0]}
        with torch.no_grad():
            expected = model(**batch).loss.item()
        assert mean_nll(model, rows, batch_size=2) == pytest.approx(expected, rel=1e-6)


class RandomStates(TrainerCallback):
    """What the next random numbers would be, as every step begins."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numpy_state: Any = np.random.get_state()
        self.seen.append((torch.get_rng_state().tolist(), numpy_state[1].tolist(), random.getstate()))


class TestNoTrace:
    @pytest.mark.parametrize("stage", list(STAGES))
    def test_training_is_the_same_with_and_without(
        self, stage: str, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """Bit for bit, over an epoch's end, with a watcher that draws and switches what it can."""
        trained, losses, drawn = [], [], []
        for watch in (None, {"every": 2, "rows": 3}):
            run, states = recipe(**STAGES[stage], watch=watch), RandomStates()
            model = hybrid(run)
            torch.manual_seed(1)
            np.random.seed(1)
            random.seed(1)
            result = run_stage(
                run, model, packed(14), tmp_path / str(watch), packed(5, seed=3),
                watchers=[Scripted("odd", {2: 1.0})], callbacks=[states], seed=4,
            )  # fmt: skip
            trained.append(weights(model))
            drawn.append(states.seen)
            losses.append([entry["loss"] for entry in result.history if "loss" in entry])
            steps = [look["step"] for look in watched_history(result.history)]
            assert steps == ([] if watch is None else [0, 2, 4, 6])
        assert_same(*trained)
        assert losses[0] == losses[1]
        assert len(drawn[0]) == 6
        assert drawn[0] == drawn[1]

    def test_left_as_it_came(self, recipe: Any, hybrid: Any) -> None:
        model = hybrid(recipe()).train()
        model.get_decoder().eval()
        flags = [module.training for module in model.modules()]
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]

        def meddle() -> None:
            model.eval()
            torch.rand(3), np.random.rand(), random.random()
            raise RuntimeError("interrupted")

        with pytest.raises(RuntimeError, match="interrupted"), untouched(model):
            meddle()
        assert [module.training for module in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
        assert random.getstate() == states[2]


class KilledError(Exception):
    """The process goes away."""


class KillAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.step:
            raise KilledError


FALL = {"every": 2, "watch": "share", "mode": "fall", "patience": 2}
FALLS_TWICE = {0: 0.9, 2: 0.6, 4: 0.55, 6: 0.6, 8: 0.55, 10: 0.5, 12: 0.9}
"""Twice in a row from step 6 to 10; and from 0 to 4, were the look before training counted."""


class TestStopping:
    def run(self, recipe: Any, **stopping: Any) -> Any:
        stage = {**STAGE, "max_steps": 12, "early_stopping": FALL | stopping}
        return recipe(finetune=stage, watch={"rows": 2})

    def test_a_share_that_falls_twice(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        """The look before training begins is shown, but stage 2 is not judged by it."""
        run, watcher = self.run(recipe), Scripted("share", FALLS_TWICE)
        model = hybrid(run)
        result = run_stage(run, model, rows, tmp_path, rows, watchers=[watcher])
        assert (result.steps, result.kept_step) == (10, 6)
        assert_same(weights(model), watcher.seen[6])
        assert any(not torch.equal(watcher.seen[6][n], watcher.seen[10][n]) for n in watcher.seen[6])
        shares = [look["share"] for look in watched_history(result.history)]
        assert shares == [0.9, 0.6, 0.55, 0.6, 0.55, 0.5]

    def test_steps_that_are_up_in_a_fall(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        run, watcher = self.run(recipe), Scripted("share", dict.fromkeys(range(12), 1.0) | {12: 0.5})
        model = hybrid(run)
        result = run_stage(run, model, rows, tmp_path, rows, watchers=[watcher])
        assert (result.steps, result.kept_step) == (12, 10)
        assert_same(weights(model), watcher.seen[10])

    def test_undefined_looks_do_not_count(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        nan = float("nan")
        values = {2: nan, 4: 0.6, 6: nan, 8: 0.5, 10: nan, 12: 0.4}
        run, watcher = self.run(recipe), Scripted("share", values)
        model = hybrid(run)
        result = run_stage(run, model, rows, tmp_path, rows, watchers=[watcher])
        assert (result.steps, result.kept_step) == (12, 4)
        assert_same(weights(model), watcher.seen[4])
        defined = [look["step"] for look in watched_history(result.history) if "share" in look]
        assert defined == [4, 8, 12]

    @pytest.mark.parametrize(
        "killed_at", [8, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 6, 9))]
    )
    def test_a_killed_run_stops_where_it_would_have(
        self, killed_at: int, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """Before, at and in the middle of the fall; the log is the same to the last look."""
        run, rows, watcher = self.run(recipe), packed(12), Scripted("share", FALLS_TWICE)
        whole = hybrid(run)
        expected = run_stage(run, whole, rows, tmp_path / "whole", rows, watchers=[watcher])
        kill = [KillAfter(killed_at)]
        with pytest.raises(KilledError):
            run_stage(run, hybrid(run), rows, tmp_path / "cut", rows, watchers=[watcher], callbacks=kill)
        model = hybrid(run)
        torch.manual_seed(99)
        result = run_stage(run, model, rows, tmp_path / "cut", rows, watchers=[watcher], resume=True)
        assert (result.steps, result.kept_step) == (expected.steps, expected.kept_step) == (10, 6)
        assert_same(weights(model), weights(whole))
        looks = [watched_history(r.history) for r in (result, expected)]
        assert [{n: v for n, v in look.items() if n != "runtime"} for look in looks[0]] == [
            {n: v for n, v in look.items() if n != "runtime"} for look in looks[1]
        ]

    def test_the_models_own_share(self, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path) -> None:
        """Nothing injected: it stops at the second fall in its own log, whenever that is."""
        stopping = {"every": 1, "watch": "linear_share", "mode": "fall", "patience": 2}
        stage = {**STAGE, "max_steps": 60, "learning_rate": 3e-2, "early_stopping": stopping}
        run = recipe(finetune=stage, watch={"rows": 4})
        result = run_stage(run, hybrid(run), packed(8), tmp_path, packed(4, seed=5))
        shares = [look["linear_share"] for look in watched_history(result.history)][1:]
        falls = [later < earlier for earlier, later in itertools.pairwise(shares)]
        twice = [i for i in range(1, len(falls)) if falls[i] and falls[i - 1]]
        assert len(shares) == result.steps < 60
        assert twice == [len(falls) - 1]
        assert result.kept_step == result.steps - 2

    def test_the_loss_is_watched_beside(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        """The loss over all rows set aside, the branches on few of them."""
        stopping = {"every": 3, "watch": "loss", "mode": "best"}
        run = recipe(finetune={**STAGE, "early_stopping": stopping}, watch={"rows": 2})
        result = run_stage(run, hybrid(run), rows, tmp_path, rows)
        looks = watched_history(result.history)
        assert [look["step"] for look in looks] == [0, 3, 6]
        assert all(look["loss"] != look["nll"] for look in looks)
        assert result.kept_step == 6

    def test_what_nobody_watches_is_refused(self, recipe: Any) -> None:
        run = self.run(recipe, watch="linear_shar")
        with pytest.raises(UnknownNameError, match="Did you mean 'linear_share'"):
            check_watched(run, [])
        check_watched(self.run(recipe, watch="recall"), [Scripted("recall", {})])
        check_watched(self.run(recipe, watch="gap"), [])
        linear_only = recipe(
            finetune={"early_stopping": FALL | {"watch": "gap"}}, watch={}, hybrid={"window": None}
        )
        with pytest.raises(
            UnknownNameError, match=r"unknown value for .*watch 'gap'.* Known: loss, nll, nll_"
        ):
            check_watched(linear_only, [])
        with pytest.raises(ConfigError, match="looks at share, which is watched only with watch"):
            recipe(finetune={"early_stopping": FALL})


def test_progress_shows_the_last_look(recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
    run = recipe(finetune={**STAGE, "max_steps": 12, "early_stopping": FALL}, watch={})
    console = Console(file=io.StringIO())
    with reported(console, "test finetune") as callbacks:
        watchers = [Scripted("share", FALLS_TWICE)]
        run_stage(run, hybrid(run), rows, tmp_path, rows, callbacks=callbacks, watchers=watchers)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert ", held out at 0: linear share " in lines[0]
    assert ", linear alone " in lines[0]
    assert lines[0].endswith("s")
    assert lines[-1].startswith("test finetune stopped: 10 steps, ")
    assert ", held out at 10: linear share " in lines[-1]
    assert lines[-1].endswith("weights of step 6 kept")
