"""What stage 1 trains, on what, and that neither order nor size of what is held in memory matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.train.stages import transfer
from stages import STAGE1, assert_close, assert_same, donor_weights, weights


class TestTransfer:
    def test_only_mixers_change(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        run = recipe(transfer={**STAGE1, "objectives": {"hybrid-output": 1.0}}, hybrid={"gate": "per_head"})
        model = hybrid(run)
        donor, mixers = donor_weights(model), weights(model, ".hybrid.")
        transfer(model, run, rows, tmp_path)
        assert_same(donor_weights(model), donor)
        assert len(mixers) == 6
        assert all(not torch.equal(p, mixers[n]) for n, p in weights(model, ".hybrid.").items())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert not model.training
        assert all(mixer.mode == AttentionMode() for mixer in mixers_of(model))

    @pytest.mark.parametrize("max_grad_norm", [1.0, 1e-2])
    def test_joint_training_equals_training_layer_by_layer(
        self, max_grad_norm: float, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """Bit for bit, clipping included: the gradients of one layer must not scale those of another."""
        stage = {**STAGE1, "max_grad_norm": max_grad_norm}
        run = recipe(transfer=stage)
        joint = hybrid(run)
        transfer(joint, run, rows, tmp_path / "joint")
        for layer in (0, 1):
            alone = hybrid(recipe(hybrid={"layers": [layer]}))
            transfer(alone, run, rows, tmp_path / f"{layer}")
            assert_same(weights(alone, ".hybrid."), weights(joint, f"layers.{layer}.self_attn.hybrid."))

    def test_clipping_is_in_force(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        norms: list[float] = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
                grads = [[p.grad for p in m.parameters()] for m in mixers_of(model)]
                norms.extend(torch.nn.utils.get_total_norm(g).item() for g in grads)  # type: ignore[arg-type]

        run = recipe(transfer={**STAGE1, "max_grad_norm": 1e-3})
        transfer(hybrid(run), run, rows, tmp_path, callbacks=[Watch()])
        assert norms == pytest.approx([1e-3] * 8, rel=1e-2)

    @pytest.mark.parametrize("micro", [1, 2])
    def test_accumulation_equals_one_batch(
        self, micro: int, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """Also over epochs whose rows do not fill the last step: 10 rows, 4 a step."""
        trained = []
        for size in (micro, None):
            stage = {**STAGE1, "micro_batch_size": size, "epochs": 2.5, "max_steps": None}
            run = recipe(transfer=stage)
            model = hybrid(run, dtype=torch.float64)
            result = transfer(model, run, packed(10), tmp_path / str(size))
            assert result.steps == 5
            assert result.tokens == 5 * 4 * 24
            trained.append((weights(model, ".hybrid."), result.history[0]["loss"]))
        assert_close(trained[0][0], trained[1][0], rtol=0, atol=1e-9)
        assert trained[0][1] == pytest.approx(trained[1][1], rel=1e-6)

    def test_a_seed_fixes_everything_and_another_does_not(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(transfer=STAGE1)
        trained = []
        for index, seed in enumerate((1, 1, 2)):
            torch.manual_seed(index)
            model = hybrid(run)
            transfer(model, run, rows, tmp_path / str(index), seed=seed)
            trained.append(weights(model, ".hybrid."))
        assert_same(trained[0], trained[1])
        assert any(not torch.equal(trained[0][n], trained[2][n]) for n in trained[0])

    @pytest.mark.parametrize("feature_map", ["hedgehog", "exp", "elu", "relu"])
    def test_loss_falls(self, feature_map: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        stage = {**STAGE1, "max_steps": 30, "warmup": 0.0, "decay": "constant"}
        run = recipe(transfer=stage, hybrid={"feature_map": feature_map})
        result = transfer(hybrid(run), run, rows, tmp_path)
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        assert losses[-1] < 0.97 * losses[0]

    def test_logs_tell_the_branches_apart(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        stage = {**STAGE1, "objectives": {"hybrid-output": 1.0}}
        run = recipe(transfer=stage, hybrid={"gate": "per_head"})
        logs = transfer(hybrid(run), run, rows, tmp_path).history[0]
        assert 0 < logs["linear_output_share"] < 1
        assert logs["linear_gradient"] > 0
        assert logs["window_gradient"] > 0

    def test_one_layers_graph_at_a_time(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        """Tensors saved for backward do not pile up over the layers."""
        peaks = []
        for layers in (1, 4):
            run = recipe(transfer={**STAGE1, "max_steps": 1})
            model = hybrid(run, num_hidden_layers=layers)
            live = peak = 0

            class Saved:
                def __init__(self, tensor: Tensor) -> None:
                    nonlocal live, peak
                    self.tensor = tensor
                    live += tensor.numel()
                    peak = max(peak, live)

                def __del__(self) -> None:
                    nonlocal live
                    live -= self.tensor.numel()

            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                transfer(model, run, rows, tmp_path / str(layers))
            assert peak > 0
            peaks.append(peak)
        assert peaks[1] == peaks[0]

    def test_autocast_leaves_maps_in_float32(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """As in every forward pass of the hybrid; only the donor runs in bfloat16."""
        run = recipe(transfer=STAGE1, precision="bfloat16")
        model = hybrid(run)
        seen: list[torch.dtype] = []
        for mixer in mixers_of(model):
            assert mixer.phi_k is not None
            mixer.phi_k.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
            mixer.phi_k.register_forward_pre_hook(
                lambda module, args: seen.append((args[0] @ args[0].mT).dtype)
            )
        donor: list[torch.dtype] = []
        projection = model.get_decoder().layers[0].self_attn.k_proj
        projection.register_forward_hook(lambda module, args, out: donor.append(out.dtype))
        result = transfer(model, run, rows, tmp_path)
        assert set(donor) == {torch.bfloat16}
        assert set(seen) == {torch.float32}
        assert result.history[0]["loss"] > 0

    def test_layers_left_alone_do_not_train(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(transfer=STAGE1, hybrid={"layers": [1]})
        model = hybrid(run)
        before = donor_weights(model)
        transfer(model, run, rows, tmp_path)
        assert_same(donor_weights(model), before)


def test_far_output_learns_from_tokens_that_windows_get_wrong(
    recipe: Any, hybrid: Any, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(transfer={**STAGE1, "max_steps": 2, "objectives": {"far-output": 1.0}})
    model, seen = hybrid(run), list[Any]()
    monkeypatch.setattr(
        "equipoise.train.objectives.LayerTarget.far_mean",
        lambda self, per_token: seen.append(self.astray) or per_token.mean(),
    )
    transfer(model, run, rows, tmp_path / "stage")
    weights = seen[0]
    assert weights.shape == (run.transfer.batch_size, len(rows[0]["input_ids"]))
    assert not weights[:, -1].any()
    first = run.hybrid.window - 1
    assert not weights[:, :1].any()  # the first token sees all there is
    assert weights[:, first:-1].max() > 0
    assert weights.min() > -1e-6
    layers = sum(mixer.phi_q is not None for mixer in mixers_of(model))
    assert all(torch.equal(seen[0], other) for other in seen[:layers])  # one pair of passes for all layers


def test_a_layer_without_a_linear_branch_has_nothing_to_learn(
    recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
) -> None:
    """And the other learns what it learns where both have one; only its chosen heads have maps."""
    whole, part = (
        recipe(transfer=STAGE1, hybrid=own) for own in ({}, {"per_layer": {0: {"feature_map": None}}})
    )
    both, one = hybrid(whole), hybrid(part)
    transfer(both, whole, rows, tmp_path / "both")
    transfer(one, part, rows, tmp_path / "one")
    assert set(weights(one, ".hybrid.")) == set(weights(one, "layers.1.self_attn.hybrid."))
    assert_same(weights(one, ".hybrid."), weights(both, "layers.1.self_attn.hybrid."))
    few = recipe(hybrid={"linear_heads": [1], "write_gate": "per_token"}, transfer=STAGE1)
    model = hybrid(few)
    before = weights(model, ".hybrid.")
    transfer(model, few, rows, tmp_path / "few")
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(model, ".hybrid.").items())
