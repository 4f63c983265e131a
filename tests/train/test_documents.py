"""Documents of a packed row: each one's outputs, losses, gradients and states are those it has alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.data.packing import collate, packed_row
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, LayerInputs
from equipoise.models.branches import branches, capture
from equipoise.ops import Branches
from equipoise.ops.transfer_loss import transfer_cross_entropy
from equipoise.train.objectives import LayerTarget, Objective, weighted_sum
from equipoise.train.stages import finetune
from support import F64, normal, random_tokens, tiny_model

LENGTHS = (11, 1, 3, 14)
"""Of the documents in the row: longer and shorter than the window of 4; the last one's end is elsewhere."""
ROW = sum(LENGTHS)
SPANS = [slice(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]

ROUNDING = {"gemma2": 1e-4}
"""Its norms and soft caps pass through float32, whatever the weights are."""

FORMS: dict[str, dict[str, Any]] = {
    "overlap": {},
    "disjoint": {"overlap": False},
    "terraced": {"layout": "terraced", "overlap": False},
    "shared": {"mixing": "shared", "overlap": False},
    "shared-terraced": {"mixing": "shared", "layout": "terraced", "overlap": False},
    "sinks": {"sinks": 2},
    "sinks-disjoint": {"sinks": 2, "overlap": False},
    "per-token": {"gate": "per_token"},
    "key-value-maps": {"map_heads": "key_value"},
    "exp": {"feature_map": "exp"},
    "linear-only": {"window": None},
    "window-only": {"feature_map": None},
}


def batch() -> dict[str, Tensor]:
    tokens = random_tokens(ROW).tolist()
    row = packed_row(tokens, [True] * ROW, [span.start for span in SPANS], separate=True)
    assert row is not None
    return collate([row])


def alone(inputs: dict[str, Tensor], span: slice) -> dict[str, Tensor]:
    """A document without the row around it, and without any sign that there ever was one."""
    return {"input_ids": inputs["input_ids"][:, span]}


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each position but the last [T - 1]."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")


def assert_documents_are_alone(model: Any, *, rounding: float = 1e-10) -> None:
    """Logits, losses of every position, and the gradients of all parameters."""
    inputs = batch()
    parameters = [p.requires_grad_() for p in model.parameters()]
    arguments = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    logits = model(**arguments, use_cache=False).logits
    parts = [logits[:, span] for span in SPANS]
    expected = [model(**alone(inputs, span), use_cache=False).logits for span in SPANS]
    for got, wanted in zip(parts, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=rounding, atol=rounding)
    ids = [inputs["input_ids"][:, span] for span in SPANS]
    packed = torch.cat([losses(part, i) for part, i in zip(parts, ids, strict=True)])
    separate = torch.cat([losses(part, i) for part, i in zip(expected, ids, strict=True)])
    torch.testing.assert_close(packed, separate, rtol=rounding, atol=rounding)
    whole = model(**inputs, use_cache=False).loss  # as training takes it: labels say what counts
    torch.testing.assert_close(whole.double(), separate.mean(), rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(total.sum(), parameters, allow_unused=True) for total in (packed, separate)
    ]
    for got, wanted in zip(*gradients, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=100 * rounding, atol=10 * rounding)


@pytest.fixture
def model(hybrid: Any, recipe: Any) -> Callable[..., Any]:
    return lambda form, **overrides: hybrid(recipe(hybrid=FORMS[form]), dtype=F64, **overrides)


class TestForward:
    @pytest.mark.parametrize("form", FORMS)
    def test_hybrid(self, form: str, model: Any) -> None:
        assert_documents_are_alone(model(form))

    @pytest.mark.parametrize("state", ["softmax", "window", "linear", "sinks"])
    def test_branch_states_of_evaluation(self, state: str, model: Any) -> None:
        made = model("overlap")
        with branches(made, state, reading="renormalised"):
            assert_documents_are_alone(made)

    @pytest.mark.parametrize("family", ["gemma2", "gpt2", "smollm3"])
    @pytest.mark.parametrize("state", ["both", "softmax"])
    def test_local_layers_and_learned_positions(self, family: str, state: str, recipe: Any) -> None:
        from equipoise.models.surgery import hybridize

        made = hybridize(tiny_model(family, dtype=F64), recipe().hybrid)
        with branches(made, state):
            assert_documents_are_alone(made, rounding=ROUNDING.get(family, 1e-10))

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
    def test_donor_that_was_never_converted(self, family: str) -> None:
        """transformers itself tells documents apart by positions; lora-only trains such a model."""
        assert_documents_are_alone(tiny_model(family, dtype=F64), rounding=ROUNDING.get(family, 1e-10))

    @pytest.mark.parametrize("reading", ["literal", "renormalised"])
    @pytest.mark.parametrize("kept", [[True], [False], [[True, False, False, True]]])
    @pytest.mark.parametrize("form", ["overlap", "disjoint", "shared"])
    def test_window_dropout(self, form: str, kept: Any, reading: Any, model: Any) -> None:
        made = model(form)
        flags = torch.tensor(kept)
        for mixer in mixers_of(made):
            mixer.mode = AttentionMode("hybrid", Branches(window=flags, reading=reading))
        assert_documents_are_alone(made)

    def test_documents_that_run_on_see_one_another(self, model: Any) -> None:
        made, inputs = model("overlap"), batch()
        joined = packed_row(
            inputs["input_ids"][0].tolist(), [True] * ROW, [s.start for s in SPANS], separate=False
        )
        assert joined is not None
        with torch.no_grad():
            whole = made(**collate([joined]), use_cache=False).logits[:, SPANS[-1]]
            last = made(**alone(inputs, SPANS[-1]), use_cache=False).logits
        assert not torch.allclose(whole, last, atol=1e-3)


class TestStates:
    @pytest.mark.parametrize("form", FORMS)
    def test_reading_a_row_in_parts_leaves_each_document_its_state(self, form: str, model: Any) -> None:
        """Cut anywhere, within documents and between them, with the state handed on."""
        mixer = mixers_of(model(form))[0]
        q, k, v = (normal(1, h, ROW, 8, seed=i) for i, h in enumerate((4, 2, 2)))
        segments = batch()["segment_ids"]

        def read(span: slice, ids: Tensor | None, state: Any = None) -> tuple[Tensor, Any]:
            inputs = LayerInputs(q[:, :, span], k[:, :, span], v[:, :, span], 0.3, segment_ids=ids)
            with torch.no_grad():
                return mixer.hybrid(inputs, state=state, keep_state=True, reuse_state=False)

        expected = [read(span, None) for span in SPANS]
        outputs = torch.cat([out for out, _ in expected], 2)
        for cut in range(1, ROW):
            one, state = read(slice(0, cut), segments[:, :cut])
            two, state = read(slice(cut, ROW), segments[:, cut:], state)
            torch.testing.assert_close(torch.cat([one, two], 2), outputs, rtol=1e-10, atol=1e-10)
            _same_state(state, expected[-1][1])
        for span, (_, wanted) in zip(SPANS, expected, strict=True):
            _, state = read(slice(0, span.stop), segments[:, : span.stop])
            if span.stop - span.start > 8:  # shorter ones have folded nothing of their own where S lags
                _same_state(state, wanted)


def _same_state(state: Any, wanted: Any) -> None:
    for name in ("linear_state", "linear_normalizer", "folded"):
        got, expected = getattr(state, name), getattr(wanted, name)
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class TestObjectives:
    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_transfer_loss_of_every_position(self, family: str, recipe: Any) -> None:
        made, inputs = self._made(recipe, {}, family), batch()
        found: list[Tensor] = []

        def observer(mixer: Any, seen: Any, output: Tensor) -> None:
            phi_q, phi_k = LayerTarget(mixer, seen, output).features
            found.append(
                transfer_cross_entropy(
                    seen.q, seen.k, phi_q, phi_k, scale=seen.scale, softcap=seen.softcap,
                    window=seen.sliding_window, segment_ids=seen.segment_ids,
                )
            )  # fmt: skip

        whole, parts = self._seen(made, inputs, observer, found)
        for layer, rows in enumerate(whole):
            torch.testing.assert_close(rows, torch.cat([p[layer] for p in parts], -1), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("objective", ["weights", "output", "hybrid-output"])
    @pytest.mark.parametrize("form", ["overlap", "disjoint", "shared", "terraced", "sinks", "key-value-maps"])
    def test_objectives_and_their_gradients(self, form: str, objective: str, recipe: Any) -> None:
        """Means over tokens: the row's is the documents', each by its length."""
        made, inputs = self._made(recipe, FORMS[form]), batch()
        loss: Objective = weighted_sum({objective: 1.0})
        found: list[tuple[Tensor, ...]] = []

        def observer(mixer: Any, seen: Any, output: Tensor) -> None:
            with torch.enable_grad():
                value = loss(LayerTarget(mixer, seen.detach(), output.detach())) * seen.q.shape[2]
                grads = torch.autograd.grad(value, list(mixer.parameters()), allow_unused=True)
            found.append((value.detach(), *(g for g in grads if g is not None)))

        whole, parts = self._seen(made, inputs, observer, found)
        for layer, values in enumerate(whole):
            for index, value in enumerate(values):
                summed = torch.stack([part[layer][index] for part in parts]).sum(0)
                torch.testing.assert_close(value, summed, rtol=1e-8, atol=1e-9)

    def _made(self, recipe: Any, settings: dict[str, Any], family: str = "llama") -> Any:
        from equipoise.models.surgery import hybridize

        return hybridize(tiny_model(family, dtype=F64), recipe(hybrid=settings).hybrid)

    def _seen(self, made: Any, inputs: Any, observer: Any, found: list[Any]) -> tuple[list[Any], list[Any]]:
        arguments = {name: tensor for name, tensor in inputs.items() if name != "labels"}
        with torch.no_grad(), capture(made, observer):
            made(**arguments, use_cache=False)
            for span in SPANS:
                made(**alone(inputs, span), use_cache=False)
        count = len(mixers_of(made))
        return found[:count], [found[i : i + count] for i in range(count, len(found), count)]


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The same row over and over, its documents before the last replaced or not."""

    def __init__(self, seed: int) -> None:
        tokens = random_tokens(ROW).tolist()
        tokens[: SPANS[-1].start] = random_tokens(SPANS[-1].start, seed=seed).tolist()
        trained = np.arange(ROW) >= SPANS[-1].start
        row = packed_row(tokens, trained, [span.start for span in SPANS], separate=True)
        assert row is not None
        self.row = row

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row


@pytest.mark.parametrize("has_hybrid", [True, False])
def test_stage_2_learns_the_same_whatever_else_is_in_the_row(
    has_hybrid: bool, recipe: Any, hybrid: Any, tmp_path: Any
) -> None:
    """Only the last document has labels: what comes before it must not reach its gradients."""
    trained: list[dict[str, Tensor]] = []
    stage = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "window_dropout": {}}
    run = (
        recipe(finetune=stage)
        if has_hybrid
        else recipe(finetune={**stage, "window_dropout": None}, hybrid=None)
    )
    for seed in (1, 2):
        made = hybrid(run, dtype=F64) if has_hybrid else tiny_model(dtype=F64)
        finetune(made, run, Rows(seed), None, tmp_path / str(seed))
        trained.append({n: p.detach().clone() for n, p in made.named_parameters() if "lora" in n})
    assert trained[0]
    assert any(bool(p.any()) for n, p in trained[0].items() if "lora_B" in n)
    for name, one in trained[0].items():
        torch.testing.assert_close(one, trained[1][name], rtol=1e-6, atol=1e-7)
