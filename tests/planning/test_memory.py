"""Memory and operations of a plan, counted without values: held to steps with values and to conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from typer.testing import CliRunner

from equipoise import hybridize
from equipoise.cli import app
from equipoise.config import ConfigError
from equipoise.planning import simulate
from equipoise.planning.costs import Target, averaged_bytes, gathered_bytes, priced, streamed_bytes
from equipoise.planning.memory import GAPS, LIBRARIES, Need, Weights, at_once, micro_batch, resident
from equipoise.planning.plan import StagePlan, plan_conversion
from equipoise.planning.requirements import Scene, _cost, check_target, hidden_bytes, required
from equipoise.planning.simulate import BATCH, Counted, Footprint, footprint, slice_footprint
from equipoise.planning.slices import Kind
from equipoise.registry import UnknownNameError
from equipoise.train.recipes import load_recipe
from support import FAMILIES, load_tool, tiny_model

ROOT = Path(__file__).parents[2]
CONVERTED: list[Kind] = ["converted", "converted"]
SOFTMAX: list[Kind] = ["softmax", "softmax"]
SMALL = {"hybrid": {"window": 8}, "data": {"context_length": 64}}
LARGE = LlamaConfig(
    vocab_size=128_256, hidden_size=16_384, intermediate_size=53_248, num_hidden_layers=126,
    num_attention_heads=128, num_key_value_heads=8, head_dim=128,
)  # fmt: skip


def test_counts_what_is_held_at_once() -> None:
    with Counted() as counted:
        x = torch.ones(256)
        y = x[:128].exp()
        del x
        z = y.view(16, 8).T + 1
        assert counted.now == 4 * (128 + 128)
        assert counted.peak == 4 * (256 + 128)
        big = torch.empty(simulate.SMALL + 1, dtype=torch.uint8)
        assert (counted.large_peak, counted.small_peak) == (simulate.SMALL + 1, 4 * 384)
    del y, z, big
    with Counted([known := torch.ones(100)]) as counted:
        torch.add(known, 1, out=known)
        assert counted.peak == 0


def test_operations_are_those_of_the_products() -> None:
    left, right = torch.ones(2, 3, 5), torch.ones(2, 5, 7)
    with Counted() as counted:
        torch.bmm(left, right)
        with counted.without_operations():
            torch.bmm(left, right)
    assert counted.flops == 2 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("phase", ["donor", "evaluation", "transfer", "finetune"])
def test_a_step_without_values_is_one_with_values(phase: Any) -> None:
    run = load_recipe("ssd", SMALL)
    config = tiny_model().config
    found = slice_footprint(config, run, phase, [0, 1], CONVERTED, rows=3, length=64, dtype=torch.float32)
    assert run.hybrid is not None
    model = hybridize(tiny_model(), run.hybrid)
    simulate._prepare(model, run, phase)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    batch = {name: torch.zeros(3, 64, dtype=torch.long) for name in BATCH}
    known = [*model.parameters(), *model.buffers(), *batch.values()]
    known += [p.grad for p in model.parameters() if p.grad is not None]
    with Counted(known) as real:
        simulate._run(model, run, phase, batch, real)
    assert found.peak_bytes == pytest.approx(real.peak, rel=0.02)
    assert found.flops == real.flops > 0


def test_operations_of_a_donor() -> None:
    """Two a weight and token, and four a pair of tokens, head and channel."""
    config, length = tiny_model().config, 64
    run = load_recipe("lora-only")
    found = footprint(config, run, "donor", SOFTMAX, rows=2, length=length, dtype=torch.float32)
    layer = sum(p.numel() for p in tiny_model().model.layers.parameters() if p.ndim == 2)
    attention = 2 * 4 * length**2 * config.num_attention_heads * config.head_dim
    assert found.flops == 2 * length * (2 * layer + attention // length)


def test_objectives_that_look_at_predictions_take_two_more_passes() -> None:
    kinds: Any = ["converted"] * 12
    config = tiny_model().config

    def flops(phase: Any, objective: str) -> float:
        run = load_recipe("ssd", {**SMALL, "transfer": {"objectives": {objective: 1.0}}})
        return footprint(config, run, phase, kinds, rows=2, length=64, dtype=torch.float32).flops

    more = flops("transfer", "far-output") - flops("transfer", "output")
    head = 2 * 2 * 63 * config.hidden_size * config.vocab_size  # predictions, that a donor's pass has not
    softmax = flops("donor", "output") + head
    assert 1.5 * softmax < more < 2.1 * softmax  # one of the two sees windows only


@pytest.mark.parametrize("checkpointing", [False, True])
def test_reads_are_computed_a_second_time(checkpointing: bool) -> None:
    kinds: Any = ["converted"] * 4

    def flops(*objectives: str) -> float:
        stage = {"objectives": dict.fromkeys(objectives, 1.0), "train_maps": True}
        own = {"finetune": stage, "gradient_checkpointing": checkpointing}
        run = load_recipe("ssd", {**SMALL, **own})
        return footprint(
            tiny_model().config, run, "finetune", kinds, rows=2, length=64, dtype=torch.float32
        ).flops

    without = flops("far-distillation")
    assert without < flops("far-distillation", "far-reads") < 2 * without


def test_checkpointing_holds_less_and_computes_more() -> None:
    kinds: Any = ["converted"] * 12
    both = [
        footprint(
            tiny_model().config, load_recipe("ssd", SMALL | {"gradient_checkpointing": on}), "finetune",
            kinds, rows=2, length=64, dtype=torch.float32,
        )
        for on in (False, True)
    ]  # fmt: skip
    assert both[1].peak_bytes < both[0].peak_bytes
    assert both[1].flops > both[0].flops


def test_a_405b_layer_takes_no_memory_to_follow() -> None:
    run = load_recipe("ssd")
    found = slice_footprint(
        LARGE, run, "transfer", [0], ["converted"], rows=1, length=128, dtype=torch.bfloat16
    )
    weights = 2 * 16_384 * (2 * 16_384 + 2 * 1024 + 3 * 53_248) * 128
    assert weights < found.flops < 1.1 * weights


def test_long_rows_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*_: Any, length: int, **__: Any) -> Footprint:
        return Footprint(10.0 + 3 * length, 5.0 * length, 2.0 * length, 7.0 * length + length**2)

    monkeypatch.setattr("equipoise.planning.memory.footprint", of)
    found = micro_batch(
        None, load_recipe("ssd"), "finetune", ["converted"], rows=1, length=10_000, dtype=torch.float32
    )
    assert found == of(length=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_followed(family: str) -> None:
    config = tiny_model(family).config
    config._experts_implementation = None
    count = config.num_hidden_layers
    kinds: Any = ["local"] * (count - 2) + ["converted"] * 2
    run = load_recipe("ssd", SMALL)
    found = footprint(config, run, "transfer", kinds, rows=2, length=16, dtype=torch.float32)
    assert found.peak_bytes > 0


# ---- what a process holds


def test_weights_of_ranks_and_of_layers() -> None:
    weights = Weights(parameters=1000, outside=100, layer=90, itemsize=4, stored=2)
    assert weights.held() == 4000
    assert weights.held(ranks=4) == 1000 + 4 * (100 + 2 * 90)
    assert weights.held(layers=True) == 400


def test_parts_of_a_process() -> None:
    weights = Weights(parameters=1000, outside=100, layer=90, itemsize=4, stored=2)
    needs = [
        Need("held-out rows", 0, Footprint(100.0, 60.0, 80.0, 0.0)),
        Need("transfer", 10, Footprint(50.0, 20.0, 30.0, 0.0)),
        Need("finetune", 20, Footprint(500.0, 100.0, 450.0, 0.0)),
    ]
    found = resident(weights, needs, held=4000, tokens=0, device="cpu")
    assert found == {
        "loading": LIBRARIES + 6000,
        "held-out rows": LIBRARIES + 4000 + GAPS * 60 + 80,
        "transfer": LIBRARIES + 4000 + 10 + GAPS * 60 + 30,  # what the rows before left in the heap
        "finetune": LIBRARIES + 4000 + 20 + GAPS * 100 + 450,
    }
    on_device = resident(weights, needs, held=2000, tokens=0, device="h100")
    assert on_device == {"held-out rows": 2100, "transfer": 2060, "finetune": 2520}


def test_rows_of_a_rank() -> None:
    stage = load_recipe("ssd", {"finetune": {"batch_size": 16, "micro_batch_size": 4}}).finetune
    assert stage is not None
    assert [at_once(stage, ranks) for ranks in (1, 2, 4, 8, 16)] == [4, 4, 4, 2, 1]


# ---- rates and bytes


def test_hours_and_bottleneck() -> None:
    assert gathered_bytes(1000, 4, passes=2) == 1500
    assert averaged_bytes(100, 4) == 600
    assert (
        streamed_bytes(rows=2, length=8, hidden=4, layers=3, itemsize=2, passes=1.0) == 2 * 8 * 4 * 2 * 3 * 3
    )
    target = Target(ranks=4, accelerator="h100", utilisation=0.5)
    cost = priced(989e12 * 3600, wire_bytes=450 * 10**9, disk_bytes=0, steps=10, target=target)
    assert (cost.compute_seconds, cost.wire_seconds) == pytest.approx((10 * 1800, 10.0))
    assert (cost.bottleneck, cost.device_hours) == ("compute", pytest.approx(20.0))
    assert priced(1.0, 10**15, 0, 10, target).bottleneck == "wire"
    assert priced(1.0, 1, 1, None, target).device_hours is None
    with pytest.raises(UnknownNameError, match="h100"):
        Target(accelerator="h10")


def scene_of(**target: Any) -> Scene:
    """Of two layers, width 32, a thousand parameters, rows of 16 tokens one at a time."""
    stage = {"batch_size": 8, "micro_batch_size": 1}
    weights = Weights(parameters=1000, outside=100, layer=90, itemsize=2, stored=2)
    held = weights.held(layers="stream_layers" in target)
    return Scene(
        tiny_model().config, load_recipe("ssd", {"transfer": stage, "finetune": stage, "watch": None}),
        CONVERTED, 16, torch.bfloat16, "h100", weights, held, Target(accelerator="h100", **target),
    )  # fmt: skip


def stage_of(name: str) -> StagePlan:
    return StagePlan(
        name=name, steps=5, tokens=5 * 8 * 16, at_most=False, trainable=100, weight_bytes=1000,
        training_bytes=1200,
    )  # fmt: skip


def test_a_sharded_donor_is_gathered_for_every_pass_and_micro_batch() -> None:
    one, scene = Footprint(0.0, 0.0, 0.0, 7.0), scene_of(ranks=2, parallel="fsdp2")
    for name, passes in (("transfer", 1), ("finetune", 2)):
        cost = _cost(stage_of(name), scene, one, 1)
        assert cost.wire_bytes == 4 * passes * 2000 // 2 + 4 * 100  # of 8 rows, 4 are a rank's
        assert cost.flops == 8 * 7.0
    alone = _cost(stage_of("finetune"), scene_of(ranks=2), one, 1)
    assert alone.wire_bytes == 400


def test_beyond_a_node_the_wire_is_slower() -> None:
    within, beyond = (
        priced(1.0, 10**9, 0, 1, Target(ranks=ranks, accelerator="h100")).wire_seconds for ranks in (8, 16)
    )
    assert (within, beyond) == pytest.approx((1 / 450, 1 / 50))


def test_streaming_holds_one_mixer_and_two_layers_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Footprint(50.0, 0.0, 0.0, 7.0)
    monkeypatch.setattr("equipoise.planning.requirements.micro_batch", lambda *_, **__: one)
    scene, stage = scene_of(stream_layers=True), stage_of("transfer")
    _, memory = required([stage], scene, 0)
    assert memory == {"transfer": scene.held + (1000 - scene.held + 1200) // 2 + 50}
    assert hidden_bytes([stage], scene) == 2 * (5 * 8 * 16) * 32 * 2
    assert hidden_bytes([stage], scene_of()) == 0


def test_targets_that_a_recipe_cannot_have() -> None:
    with pytest.raises(ConfigError, match="no stage 1"):
        check_target(load_recipe("lora-only"), Target(stream_layers=True))
    with pytest.raises(ConfigError, match=r"transfer\.batch_size: expected a multiple of 3"):
        check_target(load_recipe("ssd"), Target(ranks=3))


def test_elsewhere_on_the_command_line(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    common = ["plan", str(tmp_path), "--recipe", "ssd", "--max-steps", "3", "--set", "hybrid.window=8"]
    common += ["--set", "data.context_length=64", "--accelerator", "h100"]
    table = CliRunner().invoke(app, [*common, "--ranks", "8", "--parallel", "fsdp2"])
    assert table.exit_code == 0, table.stderr
    for words in ("wire a step and rank", "h100 hours", "30% of the h100's", "in each rank"):
        assert words in table.stdout
    done = CliRunner().invoke(app, [*common, "--stream-layers", "--json"])
    plan = json.loads(done.stdout)
    streamed = plan["stages"][0]["cost"]
    rows, hidden = 3 * 8, 64 * 32 * 2  # bfloat16, as nothing is said
    stored = plan["parameters"] * 2
    assert streamed["disk_bytes"] == stored + rows * hidden * 2 * 3
    assert (plan["target"]["stream_layers"], plan["unmeasured"]) == (True, "an h100 is not here")
    wrong = CliRunner().invoke(app, [*common[:-1], "h10"])
    assert (wrong.exit_code, "h100" in wrong.stderr) == (2, True)


# ---- against conversions


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "dtype"), [("ssd", "float32"), ("lora-only", "bfloat16")])
def test_small_conversions_take_what_was_said(recipe: str, dtype: str) -> None:
    tool = load_tool("plan_memory")
    sizes = tool.sizes(48_000, 128, 256, 2, 2, 2)
    row = tool.row_of("small", tool.Run("llama", sizes, dtype, recipe, tool.batch(4, 512, tool.UNWATCHED)))
    assert row["measured"] > 2 * LIBRARIES
    assert 0.85 < row["ratio"] < 1.15


def test_committed_results_hold() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "plan-memory.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 6
    assert all(0.85 < row["ratio"] < 1.15 for row in rows)
    assert {row["recipe"] for row in rows} >= {"ssd", "hedgecats", "lolcats", "lora-only"}
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert load_tool("plan_memory").table(rows) in page


def test_a_plan_has_memory_without_a_probe(tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    plan = plan_conversion(
        str(tmp_path), load_recipe("ssd", SMALL | {"transfer": {"max_steps": 1}}), probe=False
    )
    assert plan.memory_bytes == max(plan.memory.values()) > LIBRARIES
    assert set(plan.memory) == {"loading", "held-out rows", "transfer", "finetune"}
