"""Both stages count where numbers end, once whatever the micro batches, and say so when they are done."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from equipoise.train.progress import reported
from equipoise.train.stages import finetune, transfer
from stages import STAGE1, STAGE2


@pytest.mark.parametrize("stage", ["transfer", "finetune"])
def test_counts_are_in_the_log_and_warned_of(
    stage: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Any
) -> None:
    """The `none` map changes sign; to make its denominators vanish outright its weights are set to 0."""
    counts: list[float] = []
    for micro in (4, 2):
        settings = {**(STAGE1 if stage == "transfer" else STAGE2), "max_steps": 2, "micro_batch_size": micro}
        objectives = {"objectives": {"output": 1.0}} if stage == "transfer" else {}
        run = recipe(hybrid={"feature_map": "none"}, **{stage: {**settings, **objectives}})
        model = hybrid(run)
        for layer in model.get_decoder().layers:
            layer.self_attn.hybrid.phi_q.weight.data.zero_()
        told = Console(file=io.StringIO(), width=200)
        with reported(told, stage) as callbacks:
            if stage == "transfer":
                result = transfer(model, run, rows, tmp_path / str(micro), callbacks=callbacks)
            else:
                result = finetune(model, run, rows, None, tmp_path / str(micro), callbacks=callbacks)
        counts.append(result.history[0]["guard_denominators"])
        assert result.history[0]["guard_features"] == 0
        assert f"warning: {stage}: guard_denominators: in " in told.file.getvalue()  # pyright: ignore
    assert counts == [2 * 4 * 4 * 24] * 2  # layers, heads, rows, tokens


def test_nothing_is_said_where_all_is_well(recipe: Any, hybrid: Any, rows: Any, tmp_path: Any) -> None:
    run = recipe(transfer={**STAGE1, "max_steps": 2})
    told = Console(file=io.StringIO(), width=200)
    with reported(told, "transfer") as callbacks:
        result = transfer(hybrid(run), run, rows, tmp_path, callbacks=callbacks)
    assert result.history[0]["guard_denominators"] == 0
    assert "warning" not in told.file.getvalue()  # pyright: ignore
