"""Objectives of stage 2 against formulas written out, and training with them."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from equipoise.config import ConfigError, RunConfig, parse
from equipoise.data.packing import IGNORED_LABEL
from equipoise.layers.interface import mixers_of
from equipoise.models.adapters import adapter_layers, adapters_disabled, add_lora
from equipoise.models.branches import branches, observe
from equipoise.models.families import ConversionError
from equipoise.ops import Branches
from equipoise.registry import UnknownNameError
from equipoise.train.losses import (
    DONOR,
    FINETUNE_OBJECTIVES,
    WINDOWED_DONOR,
    Predictions,
    finetune_loss,
    is_plain,
)
from equipoise.train.reads import Keys, Reads
from equipoise.train.recipes import check_names
from equipoise.train.stages import FinetuneTrainer, finetune, recomputing
from equipoise.train.trainer import training_arguments
from stages import STAGE2, assert_close, weights
from support import random_tokens, tiny_model

F64 = torch.float64
DISTILLED = {"next-token": 0.5, "distillation": 1.0, "far-distillation": 2.0}
READING = {**DISTILLED, "far-reads": 1.0, "keys-apart": 0.5, "hidden-states": 1.0}


def predictions(seed: int = 0) -> Predictions:
    """Two rows of five predictions over seven words; one target is not trained on."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randn(2, 5, 7, generator=generator, dtype=F64) * 2

    targets = torch.randint(0, 7, (2, 5), generator=generator)
    targets[1, 2] = IGNORED_LABEL
    references = {DONOR: drawn().log_softmax(-1), WINDOWED_DONOR: drawn().log_softmax(-1)}
    return Predictions(drawn(), targets, references)


def apart(phi_k: Tensor, k: Tensor, sequences: Tensor | None = None) -> Tensor:
    """The objective keys-apart of the predictions above, with such keys."""
    nothing = torch.zeros(2, 1, 5, 1, dtype=F64)
    sequences = torch.zeros(2, 5, dtype=torch.long) if sequences is None else sequences
    seen = replace(predictions(), reads=[Reads(nothing, nothing, Keys(phi_k, k, sequences))])
    return FINETUNE_OBJECTIVES["keys-apart"].per_token(seen)


def relative_entropy(of: Tensor, to: Tensor) -> Tensor:
    """Word by word, from log-probabilities."""
    return sum(of[..., v].exp() * (of[..., v] - to[..., v]) for v in range(of.shape[-1]))  # type: ignore[return-value]


class TestObjectives:
    def test_next_token(self) -> None:
        seen = predictions()
        loss = FINETUNE_OBJECTIVES["next-token"].per_token(seen)
        for b, t in ((0, 0), (0, 4), (1, 3)):
            expected = -torch.log(seen.logits[b, t].exp()[seen.targets[b, t]] / seen.logits[b, t].exp().sum())
            torch.testing.assert_close(loss[b, t], expected)
        assert loss[1, 2] == 0

    def test_distillation(self) -> None:
        seen = predictions()
        own = seen.logits - seen.logits.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(
            FINETUNE_OBJECTIVES["distillation"].per_token(seen), relative_entropy(seen.references[DONOR], own)
        )

    def test_far_distillation_counts_tokens_by_what_windows_lose(self) -> None:
        seen = predictions()
        own = seen.logits - seen.logits.logsumexp(-1, keepdim=True)
        donor, near = seen.references[DONOR], seen.references[WINDOWED_DONOR]
        torch.testing.assert_close(
            FINETUNE_OBJECTIVES["far-distillation"].per_token(seen),
            relative_entropy(donor, near) * relative_entropy(donor, own),
        )
        same = Predictions(seen.logits, seen.targets, {DONOR: donor, WINDOWED_DONOR: donor})
        assert not FINETUNE_OBJECTIVES["far-distillation"].per_token(same).any()

    def test_far_reads_counts_tokens_by_the_square_of_what_windows_lose(self) -> None:
        seen, generator = predictions(), torch.Generator().manual_seed(3)
        own, donor = (torch.randn(2, 3, 5, 4, generator=generator, dtype=F64) for _ in range(2))
        lost = relative_entropy(seen.references[DONOR], seen.references[WINDOWED_DONOR])
        weight = torch.where(seen.targets == IGNORED_LABEL, 0.0, lost.square())
        weight = weight / (weight.sum(1, keepdim=True) / 5)
        expected = torch.zeros(2, 5, dtype=F64)
        for b in range(2):
            for h in range(3):
                alike, size = (
                    sum(weight[b, t] * own[b, h, t] @ to[b, h, t] for t in range(5)) for to in (donor, own)
                )
                scale = min(max(float(alike / size), 0.1), 10.0)  # one below, where reads point elsewhere
                error = (scale * own[b, h] - donor[b, h]).square().mean(-1) / donor[b].square().mean()
                expected[b] += weight[b] * error / 3
        found = FINETUNE_OBJECTIVES["far-reads"].per_token(replace(seen, reads=[Reads(own, donor)]))
        torch.testing.assert_close(found, expected)
        twice = replace(seen, reads=[Reads(own, donor), Reads(3 * donor, donor)])
        torch.testing.assert_close(FINETUNE_OBJECTIVES["far-reads"].per_token(twice), expected / 2)

    def test_how_loud_reads_are_is_not_asked(self) -> None:
        seen, generator = predictions(), torch.Generator().manual_seed(3)
        own, donor = (torch.randn(2, 3, 5, 4, generator=generator, dtype=F64) for _ in range(2))
        own = (own + donor).requires_grad_()
        error = FINETUNE_OBJECTIVES["far-reads"].per_token(replace(seen, reads=[Reads(own, donor)]))
        louder = FINETUNE_OBJECTIVES["far-reads"].per_token(replace(seen, reads=[Reads(2 * own, donor)]))
        torch.testing.assert_close(error, louder)
        (grad,) = torch.autograd.grad(error.sum(), own)
        # along what would make all reads of one head of one row larger
        torch.testing.assert_close((grad * own).sum((2, 3)), torch.zeros(2, 3, dtype=F64))

    def test_keys_apart_adds_up_squared_cosines_of_what_is_written(self) -> None:
        generator = torch.Generator().manual_seed(3)
        phi, k = (torch.randn(2, 2, 5, d, generator=generator, dtype=F64) for d in (3, 4))
        k[0, 1, 4] = k[0, 1, 1]  # the same key again
        sequences = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 0, -1]])  # the second row is shorter
        hard = phi.norm(dim=-1) * (sequences >= 0)[:, None]
        expected = torch.zeros(2, 5, dtype=F64)
        for b, m, t, s in itertools.product(range(2), range(2), range(5), range(5)):
            if t == s or (b, m, {s, t}) == (0, 1, {1, 4}):
                continue
            cosine = phi[b, m, t] @ phi[b, m, s] / (phi[b, m, t].norm() * phi[b, m, s].norm())
            expected[b] += cosine.square() * hard[b, m, t] * hard[b, m, s] / hard[b, m].sum() / 2
        torch.testing.assert_close(apart(phi, k, sequences), expected)

    def test_keys_apart_ask_neither_what_is_shared_by_all_keys_nor_how_hard_they_are_written(self) -> None:
        generator = torch.Generator().manual_seed(4)
        phi, k = (torch.randn(2, 1, 5, d, generator=generator, dtype=F64) for d in (3, 4))
        phi.requires_grad_()
        found = apart(phi, k)
        torch.testing.assert_close(found, apart(phi, k + 100))
        (grad,) = torch.autograd.grad(found.sum(), phi)
        assert grad.any()
        torch.testing.assert_close((grad * phi).sum(-1), torch.zeros(2, 1, 5, dtype=F64))
        different = torch.eye(5, dtype=F64).expand(2, 1, 5, 5)
        assert not apart(different, k).any()
        assert not apart(0 * different, k).any()  # nothing written
        assert not apart(torch.ones(2, 1, 5, 1, dtype=F64), k).any()  # one feature tells nothing apart

    def test_keys_apart_look_at_the_hardest_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(5)
        phi, k = (torch.randn(2, 1, 5, d, generator=generator, dtype=F64) for d in (3, 4))
        phi[:, :, 3:] *= 1e-9
        everything = apart(phi, k)
        monkeypatch.setattr("equipoise.train.reads.WRITTEN", 3)
        torch.testing.assert_close(apart(phi, k), everything, rtol=0, atol=1e-6)
        monkeypatch.setattr("equipoise.train.reads.WRITTEN", 2)
        assert (apart(phi, k) < everything - 1e-3).all()

    def test_packed_sequences_are_kept_apart_by_themselves(self) -> None:
        generator = torch.Generator().manual_seed(6)
        phi, k = (torch.randn(2, 1, 5, d, generator=generator, dtype=F64) for d in (3, 4))
        packed = apart(phi, k, torch.tensor([[7, 7, 7, 8, 8]] * 2))
        parts = [apart(phi, k, torch.tensor([of] * 2)) for of in ([7, 7, 7, -1, -1], [-1, -1, -1, 8, 8])]
        hard = [phi[:, 0, own].norm(dim=-1).sum(-1, keepdim=True) for own in (slice(3), slice(3, 5))]
        expected = sum(part * of for part, of in zip(parts, hard, strict=True)) / sum(hard)
        torch.testing.assert_close(packed, expected)
        lone = apart(phi, k, torch.tensor([[0, 1, 2, 3, 4]] * 2))
        assert not lone.any()

    def test_hidden_states_are_compared_in_units_of_each_token(self) -> None:
        seen, generator = predictions(), torch.Generator().manual_seed(3)
        layers = [
            (torch.randn(2, 5, 4, generator=generator, dtype=F64), scale * torch.ones(2, 5, 4, dtype=F64))
            for scale in (1.0, 3.0)
        ]
        layers[0][1][0, 0] *= 1000  # some models have tokens that are larger by far
        expected = torch.zeros(2, 5, dtype=F64)
        for own, donor in layers:
            for b, t in itertools.product(range(2), range(5)):
                expected[b, t] += sum((own[b, t] - donor[b, t]) ** 2) / sum(donor[b, t] ** 2) / 2
        found = FINETUNE_OBJECTIVES["hidden-states"].per_token(replace(seen, hidden=layers))
        torch.testing.assert_close(found, expected)

    def test_a_perfect_hybrid_has_nothing_to_learn_from_the_donor(self) -> None:
        seen = predictions()
        donor = seen.references[DONOR].clone().requires_grad_()
        FINETUNE_OBJECTIVES["distillation"].per_token(
            Predictions(donor, seen.targets, seen.references)
        ).sum().backward()
        assert donor.grad is not None
        torch.testing.assert_close(donor.grad, torch.zeros_like(donor))


class TestLoss:
    @pytest.fixture
    def model(self, recipe: Any, hybrid: Any) -> Any:
        """A float64 hybrid with adapters that have moved."""
        model = hybrid(recipe(), dtype=F64)
        add_lora(model, rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
        torch.manual_seed(1)
        for layer in adapter_layers(model):
            for name, parameter in layer.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
        return model

    def test_it_is_the_weighted_sum_over_trained_tokens(self, model: Any) -> None:
        tokens = random_tokens(2, 12)
        labels = tokens.clone()
        labels[0, :5] = IGNORED_LABEL
        with torch.no_grad():
            donor = tiny_model(dtype=F64)(tokens).logits[:, :-1].log_softmax(-1)
            own = model(tokens, use_cache=False).logits[:, :-1]
            with branches(model, "window", reading="renormalised"):
                for layer in adapter_layers(model):
                    layer.enable_adapters(False)
                near = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
                for layer in adapter_layers(model):
                    layer.enable_adapters(True)
        trained = labels[:, 1:] != IGNORED_LABEL
        nll = functional.cross_entropy(own.mT, tokens[:, 1:], reduction="none")
        apart = relative_entropy(donor, own.log_softmax(-1))
        far = relative_entropy(donor, near) * apart
        assert far.max() > 1e-6
        expected = ((0.5 * nll + apart + 2 * far) * trained).sum()
        batch = {"input_ids": tokens, "labels": labels}
        torch.testing.assert_close(finetune_loss(model, batch, DISTILLED, count=3), expected / 3)
        torch.testing.assert_close(finetune_loss(model, batch, DISTILLED), expected / trained.sum())

    def test_hidden_states_are_those_after_each_layer(self, model: Any) -> None:
        """By hooks on the layers, and the final norm after the last of them; the donor has no adapters."""
        tokens, decoder = random_tokens(2, 12), model.get_decoder()

        def after_layers() -> list[Tensor]:
            found: list[Tensor] = []
            places = [*decoder.layers[:-1], decoder.norm]
            hooks = [m.register_forward_hook(lambda _m, _i, out: found.append(out)) for m in places]
            model(tokens, use_cache=False)
            for hook in hooks:
                hook.remove()
            return [states[:, :-1] for states in found]

        with torch.no_grad():
            own = after_layers()
            with branches(model, "softmax"), adapters_disabled(model):
                donor = after_layers()
        assert len(own) == len(mixers_of(model))
        errors = [
            ((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in zip(own, donor, strict=True)
        ]
        assert min(errors) > 1e-9
        batch = {"input_ids": tokens, "labels": tokens}
        loss = finetune_loss(model, batch, {"hidden-states": 1.0})
        torch.testing.assert_close(loss, torch.stack(errors).mean())
        both = finetune_loss(model, batch, {"hidden-states": 1.0, "distillation": 1.0, "far-reads": 1.0})
        rest = finetune_loss(model, batch, {"distillation": 1.0, "far-reads": 1.0})
        torch.testing.assert_close(both, loss + rest)

    def test_reads_are_those_of_linear_heads_beside_the_donors(self, recipe: Any, hybrid: Any) -> None:
        """Layer 0 by hand: it gets the same from the embeddings whatever runs above."""
        model = hybrid(recipe(hybrid={"linear_heads": [1, 3], "layers": [0]}), dtype=F64)
        add_lora(model, rank=2, alpha=4.0, targets=("v_proj",))
        for layer in adapter_layers(model):
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
        tokens, seen = random_tokens(2, 12), dict[str, tuple[Any, Tensor]]()

        def observer(mixer: Any, inputs: Any, output: Tensor) -> None:
            seen[mixer.mode.kind] = (inputs, output)

        with torch.no_grad(), observe(model, observer):
            model(tokens, use_cache=False)
            with branches(model, "softmax"):
                model(tokens, use_cache=False)
        mixer, inputs = mixers_of(model)[0], seen["hybrid"][0]
        alone = mixer.hybrid(inputs, branches=Branches(window=False, reading="renormalised"))[0]
        donor = seen["softmax"][1]
        reads = Reads(alone[:, [1, 3], :-1], donor[:, [1, 3], :-1])
        batch = {"input_ids": tokens, "labels": tokens}
        with branches(model, "softmax"), torch.no_grad():
            known = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        with branches(model, "window", reading="renormalised"), torch.no_grad(), adapters_disabled(model):
            near = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        asked = Predictions(known, tokens[:, 1:], {DONOR: known, WINDOWED_DONOR: near}, [reads])
        expected = FINETUNE_OBJECTIVES["far-reads"].per_token(asked).mean()
        torch.testing.assert_close(finetune_loss(model, batch, {"far-reads": 1.0}), expected)

    def test_keys_are_those_that_states_write(self, model: Any) -> None:
        tokens, found = random_tokens(2, 12), list[Tensor]()

        def observer(mixer: Any, inputs: Any, output: Tensor) -> None:
            phi_k, k = mixer.features(inputs)[1][:, :, :-1], mixer.linear_inputs(inputs).k[:, :, :-1]
            sequences = segments[:, :-1].masked_fill(mask[:, :-1] == 0, -1)
            keys = Keys(phi_k, k.repeat_interleave(phi_k.shape[1] // k.shape[1], 1), sequences)
            found.append(keys.crowding().mean())

        mask, segments = torch.ones(2, 12, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)
        mask[1, :3], segments[0, 5:] = 0, 1
        arguments = {"input_ids": tokens, "attention_mask": mask, "segment_ids": segments}
        with torch.no_grad(), observe(model, observer):
            model(**arguments, use_cache=False)
        expected = torch.stack(found).mean()
        batch = {**arguments, "labels": tokens}
        torch.testing.assert_close(finetune_loss(model, batch, {"keys-apart": 1.0}), expected)

    def test_reads_are_asked_beside_who_observes_already(self, model: Any) -> None:
        tokens, seen = random_tokens(1, 12), list[str]()
        batch = {"input_ids": tokens, "labels": tokens}
        model.requires_grad_(True)
        with observe(model, lambda mixer, inputs, output: seen.append(mixer.mode.kind)):
            finetune_loss(model, batch, {"far-reads": 1.0}).backward()
        layers = len(mixers_of(model))
        assert seen == ["softmax"] * layers + ["hybrid"] * 2 * layers
        assert all(mixer.observer is None for mixer in mixers_of(model))
        maps = [p for mixer in mixers_of(model) for n, p in mixer.named_parameters() if n.startswith("phi")]
        assert all(p.grad is not None and bool(p.grad.any()) for p in maps)
        # what q, k and v come from answers to predictions alone
        others = [n for n, p in model.named_parameters() if p.grad is not None and ".hybrid." not in n]
        assert not others

    def test_recomputed_activations_have_the_same_gradients(self, model: Any) -> None:
        tokens = random_tokens(2, 12)
        batch, found = {"input_ids": tokens, "labels": tokens}, list[dict[str, Tensor]]()
        model.train().requires_grad_(True)
        for recomputed in (False, True):
            model.zero_grad()
            with recomputing(model) if recomputed else nullcontext():
                loss = finetune_loss(model, batch, READING)
                loss.backward()
            found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert found[0].keys() == found[1].keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad)

    def test_references_leave_the_model_as_it_was(self, model: Any) -> None:
        tokens = random_tokens(1, 12)
        modes = [mixer.mode for mixer in mixers_of(model)]
        trains = [p.requires_grad for p in model.parameters()]
        loss = finetune_loss(model, {"input_ids": tokens, "labels": tokens}, DISTILLED)
        assert [mixer.mode for mixer in mixers_of(model)] == modes
        assert [p.requires_grad for p in model.parameters()] == trains
        loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)

    def test_next_token_alone_is_the_models_own_loss(self, model: Any) -> None:
        tokens = random_tokens(2, 12)
        batch = {"input_ids": tokens, "labels": tokens}
        torch.testing.assert_close(
            finetune_loss(model, batch, {"next-token": 1.0}), model(**batch).loss.to(F64), rtol=1e-6, atol=0
        )
        assert is_plain({"next-token": 1.0})
        assert not is_plain({"next-token": 0.5})

    def test_a_softmax_model_is_its_own_donor(self) -> None:
        model, tokens = tiny_model(dtype=F64), random_tokens(2, 12)
        add_lora(model, rank=2, alpha=4.0, targets=("q_proj",))
        loss = finetune_loss(model, {"input_ids": tokens, "labels": tokens}, {"distillation": 1.0})
        assert abs(loss.item()) < 1e-12  # fresh adapters do nothing


class TestTraining:
    def test_micro_batches_add_up(self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path) -> None:
        def tuned(micro: int) -> dict[str, Tensor]:
            settings = {**STAGE2, "objectives": READING, "train_maps": True, "micro_batch_size": micro}
            run = recipe(finetune=settings)
            model = hybrid(run, dtype=F64)
            finetune(model, run, rows, rows, tmp_path / str(micro))
            return weights(model)

        assert_close(tuned(4), tuned(2), rtol=0, atol=1e-9)

    def test_the_loss_falls_towards_the_donor(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        settings = {**STAGE2, "objectives": {"distillation": 1.0}, "max_steps": 25, "learning_rate": 3e-2}
        run = recipe(finetune={**settings, "train_maps": True})
        model = hybrid(run)
        result = finetune(model, run, rows, rows, tmp_path)
        losses = [entry["loss"] for entry in result.history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0]

    def test_it_is_what_the_trainer_minimises(
        self, recipe: Any, hybrid: Any, rows: Any, tmp_path: Path
    ) -> None:
        run = recipe(finetune={**STAGE2, "objectives": DISTILLED})
        model = hybrid(run)
        arguments = training_arguments(run, run.finetune, tmp_path, seed=0)
        trainer = FinetuneTrainer(model, arguments, rows, settings=run.finetune)
        batch = {name: torch.stack([rows[i][name] for i in range(4)]) for name in rows[0]}
        expected = finetune_loss(model, batch, DISTILLED, count=torch.tensor(11))
        found = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(11))
        torch.testing.assert_close(found, expected)


class TestSettings:
    def test_unknown_objective(self, recipe: Any) -> None:
        with pytest.raises(UnknownNameError, match=r"fine-tuning objective 'distilation'.*'distillation'"):
            check_names(recipe(finetune={"objectives": {"distilation": 1.0}}))

    @pytest.mark.parametrize(
        ("objectives", "words"), [({}, "at least one"), ({"next-token": 0.0}, "positive")]
    )
    def test_weights(self, objectives: dict[str, float], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            parse(RunConfig, {"name": "x", "finetune": {"objectives": objectives}})

    def test_far_output_needs_windows(self, recipe: Any) -> None:
        run = recipe(hybrid={"window": None}, transfer={"objectives": {"far-output": 1.0}})
        with pytest.raises(ConfigError, match=r"far-output compares .* Set hybrid\.window, or take output"):
            check_names(run)

    def test_far_reads_needs_a_linear_branch(self, recipe: Any) -> None:
        run = recipe(hybrid={"feature_map": None}, finetune={"objectives": {"far-reads": 1.0}}, transfer=None)
        with pytest.raises(ConfigError, match=r"far-reads looks .* Set hybrid\.feature_map"):
            check_names(run)

    def test_far_reads_needs_maps_that_train(self, recipe: Any) -> None:
        stage = {"objectives": {"distillation": 1.0, "far-reads": 1.0}}
        with pytest.raises(ConfigError, match=r"far-reads teaches feature maps .*train_maps is false"):
            check_names(recipe(finetune=stage))
        check_names(recipe(finetune={**stage, "train_maps": True}))

    def test_keys_apart_needs_a_window_and_keys_without_their_position(self, recipe: Any) -> None:
        stage = {"objectives": {"keys-apart": 1.0}, "train_maps": True}
        run = recipe(hybrid={"window": None}, finetune=stage)
        with pytest.raises(ConfigError, match=r"keys-apart looks at linear branches beside a window"):
            check_names(run)
        with pytest.raises(ConfigError, match=r"keys-apart has to know a key that comes again"):
            check_names(recipe(hybrid={"rotary": "kept"}, finetune=stage))
        check_names(recipe(hybrid={"rotary": "undone", "overlap": True}, finetune=stage))

    def test_far_reads_of_windows_alone(self, hybrid: Any, recipe: Any) -> None:
        model, tokens = hybrid(recipe(hybrid={"feature_map": None})), random_tokens(1, 12)
        with pytest.raises(ConversionError, match="far-reads and keys-apart look at what"):
            finetune_loss(model, {"input_ids": tokens, "labels": tokens}, {"far-reads": 1.0})

    def test_far_distillation_needs_windows(self, recipe: Any) -> None:
        run = recipe(hybrid={"window": None}, finetune={"objectives": {"far-distillation": 1.0}})
        with pytest.raises(ConfigError, match=r"Set hybrid\.window"):
            check_names(run)
