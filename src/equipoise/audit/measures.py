"""What attention looks like inside, per layer and head, without switching anything off.

Measured on the fly in two forward passes of each batch, block by block of queries: nothing T x T is held.
Shapes follow the legend in `equipoise.ops.types`; X keys up to the last query of a block, C queries of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.data.packing import EvaluationWindow, evaluation_batches
from equipoise.layers.mixer import HybridMixer, LayerInputs, Observer
from equipoise.models.branches import branches, capture, converted_mixers, observe
from equipoise.models.families import ConversionError
from equipoise.ops import MIXING_RULES, Branches
from equipoise.ops.mix import Branch
from equipoise.ops.tokens import causal_mask, index_tokens, window_mask
from equipoise.statistics import Estimate, Floats, ScoreTable, bootstrap
from equipoise.statistics import score as score_of

BLOCK = 64
"""Queries at a time."""
UNKNOWN = Estimate(float("nan"), (float("nan"), float("nan")))


@dataclass(frozen=True)
class MeasureKind:
    """What a measure is.

    Attributes:
        title: in words.
        unit: of its values.
        meaning: a sentence on how to read it.
    """

    title: str
    unit: str
    meaning: str


MEASURES: dict[str, MeasureKind] = {
    "donor_mass_outside": MeasureKind(
        "Donor's attention outside the window", "share",
        "The share of the donor's softmax weight on keys that the hybrid's window (and sinks) cannot see, "
        "over queries that have such keys: what there is for a linear branch to do. A learned sink's weight "
        "is on no key.",
    ),
    "hybrid_mass_outside": MeasureKind(
        "Hybrid's attention outside the window", "share",
        "The same share of the hybrid's own weights, window and linear together after mixing; undefined "
        "where features can be negative.",
    ),
    "donor_entropy": MeasureKind(
        "Entropy of the donor's softmax", "nats",
        "0 when a query looks at one key, log of the number of keys when it looks at all alike.",
    ),
    "linear_entropy": MeasureKind(
        "Entropy of the linear branch's weights", "nats",
        "The same of the linear branch alone, over all keys up to the query: near the log of their number it "
        "averages and retrieves nothing.",
    ),
    "effective_rank": MeasureKind(
        "Effective rank of the state", "dimensions",
        "exp of the entropy of the singular values of S after the last token (Roy and Vetterli 2007).",
    ),
    "stable_rank": MeasureKind(
        "Stable rank of the state", "dimensions",
        "Sum of the squared singular values of S over the largest one squared.",
    ),
    "window_norm": MeasureKind(
        "Norm of the window's output", "L2 norm",
        "Mean over tokens of the norm of the window's term in the hybrid's output, before the output "
        "projection.",
    ),
    "linear_norm": MeasureKind(
        "Norm of the linear branch's output", "L2 norm", "The same of the linear branch's term."
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure in every layer and head.

    Attributes:
        name: a key of `MEASURES`.
        layers: indices of the layers, the rows of `values`.
        values: [layer][head], with intervals over documents; undefined (NaN) where it does not exist.
    """

    name: str
    layers: Sequence[int]
    values: Sequence[Sequence[Estimate]]

    @property
    def kind(self) -> MeasureKind:
        """What is measured."""
        return MEASURES[self.name]


@dataclass
class _Totals:
    """Summed figures [documents, H] and what to divide them by [documents], per measure and layer."""

    documents: int
    sums: dict[tuple[str, int], Floats] = field(default_factory=dict)
    weights: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def add(self, name: str, layer: int, rows: Sequence[int], values: Tensor, weights: Tensor) -> None:
        """Count figures of a batch [B, H], already summed over tokens, with their weights [B, 1]."""
        for store, part in ((self.sums, values), (self.weights, weights.squeeze(1))):
            total = store.setdefault((name, layer), np.zeros((self.documents, *part.shape[1:])))
            np.add.at(total, rows, part.double().cpu().numpy())


@torch.no_grad()
def measure(
    model: nn.Module,
    windows: Sequence[EvaluationWindow],
    *,
    batch_size: int = 8,
    resamples: int = 500,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[Measure], str | None]:
    """Every measure of a converted model.

    Args:
        model: converted.
        windows: held-out text, cut by document.
        batch_size: windows at a time.
        resamples, seed: of the bootstrap over documents.
        tick: called after each batch.

    Returns:
        The measures that exist for this model, and why those of the donor are missing, if they are.

    Raises:
        ConversionError: the model is not converted.
    """
    index = {document: i for i, document in enumerate(sorted({w.document for w in windows}))}
    totals = _Totals(len(index))
    missing: str | None = None
    device = next(model.parameters()).device
    mixers = converted_mixers(model)
    for batch in evaluation_batches(windows, batch_size=batch_size, pad_token_id=0):
        rows = [index[int(document)] for document in batch.document_ids]
        inputs, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        if missing is None:
            try:
                with capture(model, _donor_observer(totals, rows)):
                    model(input_ids=inputs, attention_mask=mask, use_cache=False)
            except ConversionError as error:  # adapters merged into the weights: the donor is gone
                missing = str(error)
        with branches(model, "both"), observe(model, _hybrid_observer(totals, rows)):
            model(input_ids=inputs, attention_mask=mask, use_cache=False)
        tick()
    layers = [mixer.layer_idx for mixer in mixers]
    names = [name for name in MEASURES if any((name, layer) in totals.sums for layer in layers)]
    return [_estimated(name, mixers, totals, resamples, seed) for name in names], missing


def _estimated(
    name: str, mixers: Sequence[HybridMixer], totals: _Totals, resamples: int, seed: int
) -> Measure:
    values = [
        _ratios(totals.sums[key], totals.weights[key], resamples, seed)
        if (key := (name, mixer.layer_idx)) in totals.sums
        else [UNKNOWN] * mixer.heads
        for mixer in mixers
    ]
    return Measure(name=name, layers=[mixer.layer_idx for mixer in mixers], values=values)


def _ratios(sums: Floats, weights: Floats, resamples: int, seed: int) -> list[Estimate]:
    """Sum over sum for every head; only a value where one document alone has any weight."""
    kept = weights > 0
    columns = {str(head): sums[kept, head] for head in range(sums.shape[1])}
    known = {name: column for name, column in columns.items() if np.isfinite(column).all() and kept.any()}
    if known and kept.sum() < 2:
        total = weights[kept].sum()
        found = {name: replace(UNKNOWN, value=float(column.sum() / total)) for name, column in known.items()}
    elif known:
        table = ScoreTable(metric="measure", unit="", sums=known, weights=weights[kept])
        draws = bootstrap(table, resamples=resamples, seed=seed)
        found = {name: score_of(draws, name) for name in known}
    else:
        found = {}
    return [found.get(name, UNKNOWN) for name in columns]


# ---- the two passes


def _donor_observer(totals: _Totals, rows: Sequence[int]) -> Observer:
    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        real = _real(inputs)
        mass, entropy = _zeros(inputs), _zeros(inputs)
        eligible = torch.zeros_like(real)
        for block, queries in _blocks(mixer, inputs, mixer.windows):
            causal = block.causal
            if inputs.sliding_window is not None:
                causal = causal & block.within(inputs.sliding_window)
            scores = _scores(inputs, queries, causal)
            weights = scores.softmax(-1).masked_fill(~causal, 0)
            mass[:, :, queries] = (weights * ~block.near).sum(-1)
            if inputs.sink_logits is not None:  # the sink's weight is on no key
                seen = scores.logsumexp(-1) - inputs.sink_logits.double()[:, None]
                mass[:, :, queries] *= seen.sigmoid()
            entropy[:, :, queries] = _entropy(weights)
            eligible[:, :, queries] = _has_outside(causal, block)
        if mixer.config.window is not None:
            counted = real * eligible
            totals.add("donor_mass_outside", mixer.layer_idx, rows, (mass * counted).sum(-1), counted.sum(-1))
        totals.add("donor_entropy", mixer.layer_idx, rows, (entropy * real).sum(-1), real.sum(-1))

    return observer


def _hybrid_observer(totals: _Totals, rows: Sequence[int]) -> Observer:
    def observer(mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        real = _real(inputs)
        for name, on in (("window", Branches(True, False)), ("linear", Branches(False, True))):
            if (mixer.config.window if name == "window" else mixer.config.feature_map) is not None:
                norms = mixer.hybrid(inputs, branches=on)[0].double().norm(dim=-1)
                totals.add(f"{name}_norm", mixer.layer_idx, rows, (norms * real).sum(-1), real.sum(-1))
        # the delta rule has no weights on keys
        if mixer.phi_q is None or mixer.phi_k is None or mixer.config.state_update == "delta":
            return
        gate = mixer.gate(inputs.before_rotary().q)
        gate = torch.as_tensor(gate, dtype=torch.double, device=inputs.q.device)
        gate = mixer.of_linear_heads(gate.expand(*inputs.q.shape[:3]))
        phi_q, phi_k = mixer.features(replace(inputs, q=inputs.q.double(), k=inputs.k.double()))
        phi_k, inputs = _clean(phi_k, inputs), mixer.linear_inputs(inputs)
        _add_ranks(totals, mixer, inputs, rows, phi_k)
        mass, entropy = _zeros(inputs), _zeros(inputs)
        eligible = torch.zeros_like(real)
        windows = [mixer.windows[head] for head in mixer.linear_indices if mixer.windows]
        for block, queries in _blocks(mixer, inputs, windows):
            products = _products(phi_q[:, :, queries], phi_k[:, :, : block.stop])
            alone = products * block.causal
            entropy[:, :, queries] = _entropy(alone / alone.sum(-1, keepdim=True).clamp_min(1e-300))
            mass[:, :, queries] = _mass_outside(
                mixer, block, _scores(inputs, queries, block.near), products, gate[:, :, queries, None],
                inputs.sink_logits,
            )  # fmt: skip
            eligible[:, :, queries] = _has_outside(block.causal, block)
        by_head = mixer.on_all_heads((entropy * real).sum(-1))
        totals.add("linear_entropy", mixer.layer_idx, rows, by_head, real.sum(-1))
        if mixer.config.window is not None:
            counted = real * eligible
            # NaN times 0 is NaN: what does not count is left out first
            kept = mass.masked_fill(counted == 0, 0)
            by_head = mixer.on_all_heads(kept.sum(-1))
            totals.add("hybrid_mass_outside", mixer.layer_idx, rows, by_head, counted.sum(-1))

    return observer


def _mass_outside(
    mixer: HybridMixer, block: _Block, scores: Tensor, products: Tensor, gate: Tensor,
    sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """Weight of the hybrid's output on keys outside the window [B, H, C], by the layer's own mixing rule.

    Every rule is linear in the values, so with "is this key outside the window" as the value of each key its
    output is the weight sought. NaN where a weight is negative.
    """
    config = mixer.config
    far = block.causal if config.overlap or config.window is None else block.causal & ~block.near
    weights, outside = products * far, (~block.near).to(products.dtype)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    sink = None if sink_logits is None else sink_logits.to(top.dtype)[:, None, None]
    top = top if sink is None else torch.maximum(top, sink)
    total = torch.exp(scores - top).masked_fill(~block.near, 0).sum(-1, keepdim=True)
    total = total if sink is None else total + (sink - top).exp()
    linear = Branch(
        (weights * outside).sum(-1, keepdim=True), weights.sum(-1, keepdim=True), far.any(-1, keepdim=True)
    )
    window = Branch(torch.zeros_like(linear.numerator), total, block.near.any(-1, keepdim=True), top)
    terms = MIXING_RULES[config.mixing](window, linear, gate)
    mass = (terms[0] + terms[1]).squeeze(-1)
    return mass.masked_fill((weights < 0).any(-1), torch.nan)


def _add_ranks(
    totals: _Totals, mixer: HybridMixer, inputs: LayerInputs, rows: Sequence[int], phi_k: Tensor
) -> None:
    """Ranks of S = sum of phi(k) v^T over all tokens of a row, for every query head that reads it."""
    values = _clean(inputs.v.double(), inputs)
    values = values.repeat_interleave(phi_k.shape[1] // values.shape[1], 1)
    singular = torch.linalg.svdvals(phi_k.mT @ values)
    shares = singular / singular.sum(-1, keepdim=True).clamp_min(1e-300)
    ranks = {
        "effective_rank": _entropy(shares).exp(),
        "stable_rank": (singular**2).sum(-1) / (singular[..., 0] ** 2).clamp_min(1e-300),
    }
    ones = torch.ones(len(rows), 1, device=singular.device)
    for name, rank in ranks.items():
        by_head = mixer.on_all_heads(rank.repeat_interleave(mixer.linear_heads // rank.shape[1], 1))
        totals.add(name, mixer.layer_idx, rows, by_head, ones)


# ---- blocks of queries


@dataclass(frozen=True)
class _Block:
    """Masks [B or 1, 1 or H, C, X] of a block of queries over the keys before its end.

    Attributes:
        causal: keys a query could see at all.
        near: keys in its window or among its sinks; none without a window branch.
        start, stop: of the block, in tokens.
    """

    causal: Tensor
    near: Tensor
    start: int
    stop: int

    def within(self, window: int) -> Tensor:
        """Keys among the last so many tokens [C, X]."""
        i = torch.arange(self.start, self.stop, device=self.causal.device)[:, None]
        return i - torch.arange(self.stop, device=self.causal.device)[None] < window


def _blocks(
    mixer: HybridMixer, inputs: LayerInputs, windows: Sequence[int]
) -> Iterator[tuple[_Block, slice]]:
    """The queries block by block, each with its slice of them; windows of the heads of ``inputs``."""
    config, (batch, _, length, _) = mixer.config, inputs.q.shape
    device = inputs.q.device
    tokens = index_tokens(
        batch=batch, length=length, device=device, key_mask=inputs.key_mask, segment_ids=inputs.segment_ids,
        state=None, sinks=config.sinks, layout=config.layout,
    )  # fmt: skip
    for start in range(0, length, BLOCK):
        queries = slice(start, min(start + BLOCK, length))
        columns = slice(0, queries.stop)
        causal = causal_mask(tokens, queries, columns, device)
        near = torch.zeros_like(causal)
        if windows:
            masks = {
                window: window_mask(
                    tokens, queries, columns, causal, window=window, layout=config.layout, sinks=config.sinks
                )
                for window in set(windows)
            }
            near = (
                torch.cat([masks[window] for window in windows], 1) if len(masks) > 1 else masks[windows[0]]
            )
        yield _Block(causal, near, start, queries.stop), queries


def _scores(inputs: LayerInputs, queries: slice, mask: Tensor) -> Tensor:
    """Scores of a block [B, H, C, X] in float64, the lowest number where the mask hides a key."""
    keys = inputs.k[:, :, : mask.shape[-1]].double()
    scores = _products(inputs.q[:, :, queries].double(), keys) * inputs.scale
    if inputs.softcap is not None:
        scores = torch.tanh(scores / inputs.softcap) * inputs.softcap
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, H, C, n] x [B, N or H, X, n] -> [B, H, C, X]."""
    return rows @ columns.repeat_interleave(rows.shape[1] // columns.shape[1], 1).mT


def _has_outside(causal: Tensor, block: _Block) -> Tensor:
    """Whether every head's window leaves out something [B, 1, C]: the same queries count for all heads."""
    return (causal & ~block.near).any(-1).all(1, keepdim=True).double()


def _entropy(weights: Tensor) -> Tensor:
    """Entropy over the last axis, in nats; NaN where a weight is negative."""
    return torch.special.entr(weights).sum(-1).masked_fill((weights < 0).any(-1), torch.nan)


def _clean(tensor: Tensor, inputs: LayerInputs) -> Tensor:
    """What stands in padding, as 0."""
    return tensor if inputs.key_mask is None else tensor.masked_fill(~inputs.key_mask[:, None, :, None], 0)


def _real(inputs: LayerInputs) -> Tensor:
    """1 for the queries of real tokens [B, 1, T]."""
    if inputs.key_mask is None:
        return inputs.q.new_ones(inputs.q.shape[0], 1, inputs.q.shape[2]).double()
    return inputs.key_mask[:, None, -inputs.q.shape[2] :].double()


def _zeros(inputs: LayerInputs) -> Tensor:
    """A figure for every query [B, H, T] in float64."""
    return torch.zeros(inputs.q.shape[:3], dtype=torch.float64, device=inputs.q.device)
