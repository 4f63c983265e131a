"""What stage 2 trains, and what both stages have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode
from equipoise.models.adapters import adapter_layers
from equipoise.models.branches import branches
from equipoise.train.schedules import draw_window_dropout
from equipoise.train.stages import FinetuneTrainer, TransferTrainer, finetune, lora_targets
from equipoise.train.trainer import training_arguments
from stages import STAGE1, STAGE2, assert_close, assert_same, donor_weights, weights
from support import tiny_model


class Modes(TrainerCallback):
    """The modes that mixers ran in: (step, layer, kept windows, reading, window), every forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.step, self.seen = 0, []
        for mixer in mixers_of(model):
            attend = mixer.attend
            mixer.attend = self._recorded(mixer, attend)  # type: ignore[method-assign]

    def _recorded(self, mixer: Any, attend: Callable[..., Any]) -> Callable[..., Any]:
        def attend_and_note(inputs: Any, *, mode: AttentionMode, **kwargs: Any) -> Any:
            kept = mode.branches.window
            if torch.is_grad_enabled():
                note = kept if isinstance(kept, bool) else kept.tolist()
                self.seen.append((self.step, mixer.layer_idx, note, mode.branches.reading, mode.window))
            return attend(inputs, mode=mode, **kwargs)

        return attend_and_note

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step


def tuned(
    run: Any, model: Any, rows: Any, directory: Path, *, held_out: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """The model after stage 2, and what it reported."""
    return model, finetune(model, run, rows, held_out or rows, directory, **kwargs)


class TestFinetune:
    @pytest.mark.parametrize("train_maps", [True, False])
    def test_what_trains(self, train_maps: bool, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        run = recipe(finetune={**STAGE2, "train_maps": train_maps}, hybrid={"gate": "per_head"})
        model = hybrid(run)
        donor, maps = donor_weights(model), weights(model, ".hybrid.")
        _, result = tuned(run, model, rows, tmp_path)
        assert_same(donor_weights(model), donor)
        changed = [not torch.equal(p, maps[n]) for n, p in weights(model, ".hybrid.").items()]
        assert all(changed) if train_maps else not any(changed)
        assert len(adapter_layers(model)) == 8
        assert all(p.any() for n, p in weights(model, "lora_B").items())
        assert result.steps == 4
        assert not any(p.requires_grad for p in model.parameters())
        # and the donor can still be run from it
        tokens = torch.arange(3, 13)[None]
        with torch.no_grad(), branches(model, "softmax"):
            torch.testing.assert_close(
                model(tokens).logits, tiny_model()(tokens).logits, rtol=1e-5, atol=1e-5
            )

    def test_adapters_are_float32_under_a_bfloat16_donor(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(finetune={**STAGE2, "train_maps": True}, precision="bfloat16")
        model = hybrid(run, dtype=torch.bfloat16)
        _, result = tuned(run, model, rows, tmp_path)
        assert {p.dtype for p in weights(model, "lora").values()} == {torch.float32}
        assert {p.dtype for p in weights(model, ".hybrid.").values()} == {torch.float32}
        assert {p.dtype for p in donor_weights(model).values()} == {torch.bfloat16}
        assert all(0 < entry["loss"] < 20 for entry in result.history if "loss" in entry)

    def test_maps_may_learn_at_a_rate_of_their_own(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        rates: list[list[float]] = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
                rates.append([group["lr"] for group in optimizer.param_groups])

        stage = {**STAGE2, "train_maps": True, "map_learning_rate": 0.5, "warmup": 0.0, "decay": "constant"}
        run = recipe(finetune=stage)
        tuned(run, hybrid(run), rows, tmp_path, callbacks=[Watch()])
        assert rates == [[1e-2, 0.5]] * 4

    @pytest.mark.parametrize(
        ("mixing", "expected"), [("convex", [1e-2, 0.5, 1e-3]), ("competing", [1e-2, 0.5])]
    )
    def test_gates_that_can_shut_may_learn_slower(
        self, mixing: str, expected: list[float], recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """A score is on the window's scale, and starts there; a weight is shut by a few large steps."""
        seen: list[tuple[list[float], int]] = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
                groups = optimizer.param_groups
                seen.append(([group["lr"] for group in groups], len(groups[-1]["params"])))

        stage = {
            **STAGE2, "train_maps": True, "map_learning_rate": 0.5, "gate_learning_rate": 1e-3, "warmup": 0.0,
            "decay": "constant",
        }  # fmt: skip
        run = recipe(hybrid={"mixing": mixing, "gate": "quadratic"}, finetune=stage)
        model = hybrid(run)
        tuned(run, model, rows, tmp_path, callbacks=[Watch()])
        last = sum(len(mixer.gate_parameters()) for mixer in mixers_of(model)) or len(
            weights(model, ".hybrid.")
        )
        assert seen == [(expected, last)] * 4

    def test_loss_falls(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        run = recipe(finetune={**STAGE2, "max_steps": 40})
        _, result = tuned(run, hybrid(run), rows, tmp_path)
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        assert losses[-1] < 0.9 * losses[0]

    def test_targets_are_the_projections_there_are(self, recipe: Any) -> None:
        settings = recipe(finetune={}).finetune
        assert lora_targets(tiny_model("llama"), settings) == ("q_proj", "k_proj", "v_proj", "o_proj")
        assert lora_targets(tiny_model("phi3"), settings) == ("o_proj", "qkv_proj")
        chosen = recipe(finetune={"targets": ["up_proj"]}).finetune
        assert lora_targets(tiny_model("llama"), chosen) == ("up_proj",)

    def test_plain_donor_without_a_hybrid(self, recipe: Any, rows: Any, tmp_path: Path) -> None:
        run = recipe(hybrid=None, finetune=STAGE2)
        model, result = tuned(run, tiny_model(), rows, tmp_path)
        assert len(adapter_layers(model)) == 8
        assert "linear_output_share" not in result.history[0]

    @pytest.mark.parametrize("micro", [1, 2])
    def test_accumulation_equals_one_batch(
        self, micro: int, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """The same labels a step and the same windows dropped, also where rows differ in labels."""
        trained = []
        for size in (micro, None):
            dropout = {"probabilities": [0.5], "per": "head"}
            run = recipe(finetune={**STAGE2, "micro_batch_size": size, "window_dropout": dropout})
            model = hybrid(run, dtype=torch.float64)
            tuned(run, model, packed(10, document=7), tmp_path / str(size))
            trained.append(weights(model, "lora"))
        assert {p.dtype for p in trained[0].values()} == {torch.float64}
        assert_close(trained[0], trained[1], rtol=0, atol=1e-9)


class TestWindowDropout:
    @pytest.mark.parametrize("per", ["sample", "layer", "head"])
    def test_modes_follow_the_schedule(
        self, per: str, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        dropout = {"probabilities": [1.0, 0.5, 0.0], "per": per, "reading": "literal"}
        run = recipe(finetune={**STAGE2, "max_steps": 6, "window_dropout": dropout})
        model = hybrid(run)
        modes = Modes(model)
        tuned(run, model, rows, tmp_path, callbacks=[modes], seed=3)
        expected = [
            (step, layer,
             draw_window_dropout([1.0, 1.0, 0.5, 0.5, 0.0, 0.0][step], batch_size=4, heads=4, per=per,  # type: ignore[arg-type]
                                 seed=3, step=step, layer=layer, first_sample=4 * step).tolist(),
             "literal", None)
            for step in range(6) for layer in range(2)
        ]  # fmt: skip
        assert modes.seen == expected
        flat = [torch.tensor(note[2]).float().mean().item() for note in modes.seen]
        assert flat[:4] == [0.0] * 4
        assert flat[8:] == [1.0] * 4
        assert all(mixer.mode == AttentionMode() for mixer in mixers_of(model))

    def test_means_of_the_past_keep_their_windows(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        """There is nothing in them that could answer alone."""
        means = {"feature_map": "constant", "feature_dim": 1, "mixing": "calibrated"}
        run = recipe(
            finetune={**STAGE2, "window_dropout": {"probabilities": [1.0]}}, hybrid={"per_layer": {0: means}}
        )
        model = hybrid(run)
        modes = Modes(model)
        tuned(run, model, rows, tmp_path, callbacks=[modes])
        kept = {layer: note for _, layer, note, *_ in modes.seen}
        assert kept[0] is True
        assert kept[1] == [False] * 4

    def test_micro_batches_draw_as_the_whole_batch(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        seen = []
        for micro in (1, 2, 4):
            dropout = {"probabilities": [0.5], "per": "layer"}
            run = recipe(finetune={**STAGE2, "micro_batch_size": micro, "window_dropout": dropout})
            model = hybrid(run)
            modes = Modes(model)
            tuned(run, model, rows, tmp_path / str(micro), callbacks=[modes])
            by_step = {}
            for step, layer, kept, _, _ in modes.seen:
                by_step[step, layer] = by_step.get((step, layer), []) + kept
            seen.append(by_step)
        assert seen[0] == seen[1] == seen[2]
        assert len({tuple(v) for v in seen[0].values()}) > 2

    def test_dropped_windows_do_not_matter(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        """With p = 1, renormalised, only linear attention answers: gate and window size are idle."""
        dropout = {"probabilities": [1.0]}
        losses = []
        for options in ({}, {"gate_value": 0.9}, {"window": 9}):
            run = recipe(finetune={**STAGE2, "window_dropout": dropout}, hybrid=options)
            _, result = tuned(run, hybrid(run), rows, tmp_path / str(options))
            losses.append(result.history[0]["loss"])
        assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)

    def test_literal_reading_is_honoured(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        losses = []
        for reading in ("literal", "renormalised"):
            dropout = {"probabilities": [1.0], "reading": reading}
            run = recipe(finetune={**STAGE2, "window_dropout": dropout})
            losses.append(tuned(run, hybrid(run), rows, tmp_path / reading)[1].history[0]["loss"])
        assert abs(losses[0] - losses[1]) > 1e-3

    def test_all_of_the_gradient_is_linear_where_the_window_is_dropped(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        shares = {}
        for probability in (0.0, 1.0):
            run = recipe(finetune={**STAGE2, "window_dropout": {"probabilities": [probability]}})
            logs = tuned(run, hybrid(run), rows, tmp_path / str(probability))[1].history[0]
            shares[probability] = (logs.get("window_gradient", 0.0), logs["linear_gradient"])
        assert shares[1.0][0] == 0
        assert shares[0.0][0] > 0
        assert shares[1.0][1] > shares[0.0][1]

    def test_window_sizes_end_at_the_models_own(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(finetune={**STAGE2, "window_sizes": [1, 4]})
        model = hybrid(run)
        modes = Modes(model)
        tuned(run, model, rows, tmp_path, callbacks=[modes])
        assert [note[4] for note in modes.seen] == [1] * 4 + [4] * 4

    def test_a_smaller_window_is_used(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        losses = []
        for index, (own, sizes) in enumerate([(4, [1, 4]), (1, None), (4, None)]):
            run = recipe(finetune={**STAGE2, "window_sizes": sizes}, hybrid={"window": own})
            losses.append(tuned(run, hybrid(run), rows, tmp_path / str(index))[1].history[0]["loss"])
        assert losses[0] == losses[1]
        assert losses[0] != losses[2]


class TestGradientCheckpointing:
    def test_equals_training_without(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        """Bit for bit, windows dropped: the second forward pass must see the same draws as the first."""
        trained, seen = [], []
        for checkpointing in (True, False):
            dropout = {"probabilities": [0.5], "per": "head"}
            stage = {**STAGE2, "train_maps": True, "window_dropout": dropout}
            run = recipe(finetune=stage, gradient_checkpointing=checkpointing)
            model = hybrid(run)
            modes = Modes(model)
            tuned(run, model, rows, tmp_path / str(checkpointing), callbacks=[modes])
            assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
            trained.append(weights(model))
            seen.append(modes.seen)
        assert_same(*trained)
        assert len(seen[0]) == 2 * len(seen[1])  # it did go through every layer twice
        assert {repr(note) for note in seen[0]} == {repr(note) for note in seen[1]}

    @pytest.mark.parametrize("checkpointing", [True, False])
    def test_bfloat16_stays_finite(
        self, checkpointing: bool, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(finetune=STAGE2, precision="bfloat16", gradient_checkpointing=checkpointing)
        _, result = tuned(run, hybrid(run), rows, tmp_path)
        assert 0 < result.history[0]["loss"] < 20


class TestPackedRows:
    def test_a_row_costs_what_its_documents_cost_alone(
        self, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        run = recipe(finetune=STAGE2, transfer=STAGE1, hybrid={"overlap": False})
        model = hybrid(run, dtype=torch.float64)
        row = packed(1, context=24, document=9)[0]
        batch = {name: tensor[None] for name, tensor in row.items()}
        with torch.no_grad():
            whole = model(**batch, use_cache=False)
            total, count = 0.0, 0
            for start, stop in ((0, 9), (9, 18), (18, 24)):
                ids = batch["input_ids"][:, start:stop]
                alone = model(ids, labels=ids, use_cache=False)
                torch.testing.assert_close(whole.logits[:, start:stop], alone.logits)
                total += alone.loss.item() * (stop - start - 1)
                count += stop - start - 1
        assert whole.loss.item() == pytest.approx(total / count, rel=1e-6)

    def test_first_tokens_of_documents_are_not_labels(self, packed: Any) -> None:
        row = packed(1, context=24, document=9)[0]
        assert (row["labels"] == -100).nonzero().flatten().tolist() == [0, 9, 18]

    def test_transfer_loss_of_a_packed_row_is_that_of_its_documents(
        self, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """By the objective itself, summed over rows of attention."""
        from equipoise.models.branches import capture
        from equipoise.train.objectives import OBJECTIVES, LayerTarget

        model = hybrid(recipe(transfer=STAGE1), dtype=torch.float64)
        row = packed(1, context=24, document=9)[0]
        losses: list[Tensor] = []

        def observer(mixer: Any, inputs: Any, output: Tensor) -> None:
            losses.append(OBJECTIVES["weights"](LayerTarget(mixer, inputs, output)) * inputs.q.shape[2])

        arguments = {n: t[None] for n, t in row.items() if n != "labels"}
        with torch.no_grad(), capture(model, observer):
            model(**arguments, use_cache=False)
            for start, stop in ((0, 9), (9, 18), (18, 24)):
                model(row["input_ids"][None, start:stop], use_cache=False)
        whole, parts = losses[:2], losses[2:]
        for layer in (0, 1):
            torch.testing.assert_close(whole[layer], torch.stack(parts[layer::2]).sum())


class TestEarlyStopping:
    def test_stops_and_takes_the_best_weights(
        self, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """A rate far too high: the held-out loss soon rises, and the weights before that count."""
        stopping = {"every": 2, "patience": 2}
        stage = {**STAGE2, "max_steps": 40, "learning_rate": 1.0, "early_stopping": stopping, "warmup": 0.0}
        run = recipe(finetune=stage)
        model = hybrid(run)
        snapshots: dict[int, dict[str, Tensor]] = {}
        looks: list[float] = []

        class Watch(TrainerCallback):
            def on_evaluate(
                self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
            ) -> None:
                snapshots[state.global_step] = weights(kwargs["model"], "lora")
                looks.append(metrics["eval_loss"])

        _, result = tuned(run, model, packed(8), tmp_path, held_out=packed(3, seed=5), callbacks=[Watch()])
        best = 2 * (1 + looks.index(min(looks)))
        assert result.steps == best + 4 < 40
        assert_same(weights(model, "lora"), snapshots[best])
        assert any(not torch.equal(snapshots[best][n], snapshots[result.steps][n]) for n in snapshots[best])

    def test_held_out_loss_is_of_the_whole_hybrid(
        self, recipe: Any, hybrid: Any, packed: Any, tmp_path: Path
    ) -> None:
        """No window dropped while looking, and no row left out."""
        dropout, stopping = {"probabilities": [1.0]}, {"every": 1, "patience": 9}
        stage = {**STAGE2, "max_steps": 1, "window_dropout": dropout, "early_stopping": stopping}
        run = recipe(finetune=stage)
        held_out = packed(3, seed=5, document=24)
        model, result = tuned(run, hybrid(run), packed(8), tmp_path, held_out=held_out)
        logged = next(entry["eval_loss"] for entry in result.history if "eval_loss" in entry)
        batch = {n: torch.stack([held_out[i][n] for i in range(3)]) for n in held_out[0]}
        with torch.no_grad():
            assert logged == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def test_trainers_can_be_used_alone(recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
    """The classes are public: a script of one's own may drive them."""
    run = recipe(transfer=STAGE1, finetune=STAGE2)
    model = hybrid(run)
    arguments = training_arguments(run, run.transfer, tmp_path, seed=0)
    seen = itertools.count()
    trainer = TransferTrainer(model, arguments, rows, objective=lambda t: next(seen) * t.features[0].sum())
    assert trainer.micro_step() == 0
    assert trainer.micro_step() == 1
    arguments = training_arguments(run, run.finetune, tmp_path, seed=0)
    assert FinetuneTrainer(model, arguments, rows, settings=run.finetune).logs_this_step
