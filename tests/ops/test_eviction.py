"""Evicting caches: against a cache kept token by token, at their limits, with padding, packing and groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from equipoise.ops import window_attention
from equipoise.ops.eviction import EVICTION_RULES, Eviction, Evidence, evicting_attention
from equipoise.registry import UnknownNameError
from support import F64, normal, padding_mask, segments_of

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 45, 8
HEAVY = Eviction(budget=10, recent=3)
OBSERVED = Eviction(budget=12, recent=5, rule="observed", every=4)


def qkv(length: int = LENGTH, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores large enough that some keys stand out."""
    q, k, v = (normal(BATCH, n, length, DIM, seed=s, dtype=dtype) for s, n in ((0, HEADS), (1, 2), (2, 2)))
    return 1.5 * q, 1.5 * k, v


def reference(
    q: Tensor, k: Tensor, v: Tensor, eviction: Eviction, *, softcap: float | None = None,
    mask: Tensor | None = None, segments: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One cache of tokens with their scores at a time, in plain Python."""
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for kv in range(k.shape[1]):
            heads = range(kv * q.shape[1] // k.shape[1], (kv + 1) * q.shape[1] // k.shape[1])
            cache: list[int] = []
            history: list[dict[int, float]] = []
            for t in range(q.shape[2]):
                if mask is not None and not mask[row, t]:
                    continue
                if segments is not None:
                    here = int(segments[row, t])
                    if cache and int(segments[row, cache[-1]]) != here:
                        cache, history = [], []
                cache.append(t)
                received = dict.fromkeys(cache, 0.0)
                for head in heads:
                    scores = [float(q[row, head, t] @ k[row, kv, j]) / DIM**0.5 for j in cache]
                    if softcap is not None:
                        scores = [softcap * math.tanh(score / softcap) for score in scores]
                    total = sum(math.exp(score) for score in scores)
                    total += 0 if sinks is None else math.exp(float(sinks[head]))
                    for j, score in zip(cache, scores, strict=True):
                        weight = math.exp(score) / total
                        received[j] += weight
                        out[row, head, t] += weight * v[row, kv, j]
                history.append(received)
                if len(cache) == eviction.budget:
                    cache = kept(cache, history, eviction)
    return out


def kept(cache: list[int], history: list[dict[int, float]], eviction: Eviction) -> list[int]:
    if eviction.rule == "heavy-hitters":
        value = {j: sum(step.get(j, 0.0) for step in history) for j in cache}
    else:
        last = {j: sum(step.get(j, 0.0) for step in history[-eviction.every :]) for j in cache}
        value = {j: last[j] + max(last.get(i, 0.0) for i in range(j - 2, j + 3)) for j in cache}
    oldest = cache[: len(cache) - (eviction.recent - 1)]
    gone = sorted(oldest, key=lambda j: value[j])[: eviction.every]
    return [j for j in cache if j not in gone]


@pytest.mark.parametrize("eviction", [HEAVY, OBSERVED], ids=["heavy-hitters", "observed"])
class TestAgainstTheReference:
    def test_plain(self, eviction: Eviction) -> None:
        q, k, v = qkv()
        out = evicting_attention(q, k, v, eviction)
        torch.testing.assert_close(out, reference(q, k, v, eviction), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, eviction: Eviction, side: str) -> None:
        q, k, v = qkv()
        mask = padding_mask(side, LENGTH)
        k = k.masked_fill(~mask[:, None, :, None], 50.0)  # what stands there does not matter
        out = evicting_attention(q, k, v, eviction, key_mask=mask)
        torch.testing.assert_close(out, reference(q, k, v, eviction, mask=mask), rtol=0, atol=1e-12)

    def test_segments(self, eviction: Eviction) -> None:
        q, k, v = qkv()
        segments = segments_of(LENGTH)
        assert len(segments[0].unique()) > 1
        out = evicting_attention(q, k, v, eviction, segment_ids=segments)
        torch.testing.assert_close(out, reference(q, k, v, eviction, segments=segments), rtol=0, atol=1e-12)

    def test_softcap_and_sink_logits(self, eviction: Eviction) -> None:
        (q, k, v), sinks = qkv(), normal(HEADS, seed=5)
        out = evicting_attention(q, k, v, eviction, softcap=2.0, sink_logits=sinks)
        expected = reference(q, k, v, eviction, softcap=2.0, sinks=sinks)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)

    def test_blocks_of_queries(self, eviction: Eviction, monkeypatch: pytest.MonkeyPatch) -> None:
        q, k, v = qkv()
        whole = evicting_attention(q, k, v, eviction)
        monkeypatch.setattr("equipoise.ops.eviction.ROWS", 7)
        torch.testing.assert_close(evicting_attention(q, k, v, eviction), whole, rtol=0, atol=1e-12)

    def test_no_query_sees_later_tokens(self, eviction: Eviction) -> None:
        q, k, v = qkv()
        out = evicting_attention(q, k, v, eviction)
        cut = (t[:, :, :30] for t in (q, k, v))
        torch.testing.assert_close(evicting_attention(*cut, eviction), out[:, :, :30], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", EVICTION_RULES)
def test_with_room_for_all_it_is_softmax(rule: str) -> None:
    q, k, v = qkv()
    out = evicting_attention(q, k, v, Eviction(budget=LENGTH + 1, recent=4, rule=rule, every=4), scale=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", EVICTION_RULES)
def test_where_all_is_recent_it_is_a_window(rule: str) -> None:
    q, k, v = qkv()
    out = evicting_attention(q, k, v, Eviction(budget=9, recent=9, rule=rule))
    torch.testing.assert_close(out, window_attention(q, k, v, window=9)[0], rtol=0, atol=1e-12)


def test_heavy_hitters_survive() -> None:
    """A key that every query looks at stays, however old; in a window of the same budget it is lost."""
    q, k, v = torch.zeros(3, 1, 1, 60, DIM, dtype=F64).unbind()
    q[..., 0], k[0, 0, 5, 0], v[0, 0, 5, 0] = 1.0, 20.0, 1.0
    assert evicting_attention(q, k, v, HEAVY)[0, 0, 5:, 0].min() > 0.9
    assert evicting_attention(q, k, v, Eviction(10, 10))[0, 0, 15:, 0].max() == 0


def test_rules_judge_by_what_their_names_say() -> None:
    total, latest = torch.tensor([[[5.0, 0, 0, 0, 0, 1]]]), torch.tensor([[[0.0, 0, 0, 3, 0, 1]]])
    evidence = Evidence(total, latest)
    assert torch.equal(EVICTION_RULES["heavy-hitters"](evidence), total)
    assert EVICTION_RULES["observed"](evidence).tolist() == [[[0, 3, 3, 6, 3, 4]]]


SEEN: list[tuple[Tensor, Tensor]] = []


@EVICTION_RULES.register("test-probe")
def probe(evidence: Evidence) -> Tensor:
    SEEN.append((evidence.total.clone(), evidence.latest.clone()))
    return evidence.total


def test_rules_see_nothing_of_what_is_not_held() -> None:
    q, k, v = qkv()
    segments = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    segments[:, 30:] = 1
    SEEN.clear()
    evicting_attention(q, k, v, Eviction(10, 3, "test-probe", every=2), segment_ids=segments)
    assert len(SEEN) == 11 + 3  # of 30 tokens, and of 15
    for total, latest in SEEN:
        assert (total > 0).sum(-1).unique().tolist() == [10]
        assert (latest > 0).sum(-1).unique().tolist() == [10]
    for known in SEEN[-1]:
        assert known[..., :30].max() == 0


def test_low_precision_in_and_out() -> None:
    q, k, v = qkv(dtype=torch.bfloat16)
    out = evicting_attention(q, k, v, HEAVY)
    assert out.dtype == torch.bfloat16
    expected = evicting_attention(q.float(), k.float(), v.float(), HEAVY)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_bytes() -> None:
    assert HEAVY.state_bytes(kv_heads=2, head_dim=8) == 10 * 2 * (2 * 8 + 2 * 8 + 4)
    assert HEAVY.state_bytes(kv_heads=2, head_dim=8, value_dim=4) == 10 * 2 * (2 * 8 + 2 * 4 + 4)


def test_what_cannot_be_is_refused() -> None:
    for budget, recent, every in ((4, 5, 1), (4, 0, 1), (4, 1, 0), (4, 3, 3)):
        with pytest.raises(ValueError, match=f"got {recent}, {every} and a budget of {budget}"):
            Eviction(budget, recent, every=every)
    with pytest.raises(UnknownNameError, match="Did you mean 'observed'"):
        Eviction(4, 1, rule="observd")
