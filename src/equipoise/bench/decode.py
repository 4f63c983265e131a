"""Decoding one token at a given context: a constant state against caches of the whole context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from equipoise.bench.gate import LENGTHS, TOLERANCES, compare, right_answer
from equipoise.bench.peers import GATE, OURS
from equipoise.bench.results import Row
from equipoise.bench.setting import BenchSetting, Call, Inputs, make_inputs
from equipoise.bench.timing import Contestant, race
from equipoise.ops import AttentionState, hybrid_attention
from equipoise.registry import Registry

READ = 4096
"""Tokens of context that are read at a time to make a state."""


@dataclass(frozen=True)
class Decoder:
    """A way to decode.

    Attributes:
        about: what it is, for the page.
        build: given a context, (the call that decodes one token after it, bytes the cache holds).
    """

    about: str
    build: Callable[[BenchSetting, Inputs, Inputs], tuple[Callable[[], Tensor], int]]


DECODERS: Registry[Decoder] = Registry("peer")


def _ours(setting: BenchSetting, context: Inputs, token: Inputs) -> tuple[Callable[[], Tensor], int]:
    state = read(setting, context)

    def call() -> Tensor:
        nonlocal state
        out, state = step(setting, token, state)
        return out

    return call, state.bytes()


def read(setting: BenchSetting, context: Inputs) -> AttentionState:
    """The state after a context."""
    state = None
    for start in range(0, context.q.shape[2], READ):
        x = context.part(slice(start, start + READ))
        _, state = hybrid_attention(
            x.q, x.k, x.v, x.phi_q, x.phi_k, window=setting.window, gate=GATE, initial_state=state,
            output_final_state=True,
        )  # fmt: skip
    assert state is not None
    return state


def step(setting: BenchSetting, token: Inputs, state: AttentionState) -> tuple[Tensor, AttentionState]:
    """One token [B, H, 1, E], and the state after it, in the earlier one's memory."""
    out, after = hybrid_attention(
        token.q, token.k, token.v, token.phi_q, token.phi_k, window=setting.window, gate=GATE,
        initial_state=state, output_final_state=True, reuse_state=True,
    )  # fmt: skip
    assert after is not None
    return out, after


def _sdpa(setting: BenchSetting, context: Inputs, token: Inputs) -> tuple[Callable[[], Tensor], int]:
    """The last place of a full cache is written, then all of it is read."""
    k, v = (torch.cat([old, new], 2) for old, new in ((context.k, token.k), (context.v, token.v)))
    grouped = setting.heads != setting.kv_heads

    def call() -> Tensor:
        k[:, :, -1:], v[:, :, -1:] = token.k, token.v
        return scaled_dot_product_attention(token.q, k, v, enable_gqa=grouped)

    return call, k.nbytes + v.nbytes


def _concat(setting: BenchSetting, context: Inputs, token: Inputs) -> tuple[Callable[[], Tensor], int]:
    grouped = setting.heads != setting.kv_heads

    def call() -> Tensor:
        k, v = torch.cat([context.k, token.k], 2), torch.cat([context.v, token.v], 2)
        return scaled_dot_product_attention(token.q, k, v, enable_gqa=grouped)

    return call, context.k.nbytes + context.v.nbytes


def _register() -> None:
    DECODERS.register(OURS)(Decoder("equipoise.ops.hybrid_attention, its state updated in place", _ours))
    DECODERS.register("sdpa")(Decoder("torch SDPA over a cache of the full length, allocated before", _sdpa))
    DECODERS.register("concat")(Decoder("torch SDPA over a cache that grows by concatenation", _concat))


_register()


def check(setting: BenchSetting, names: Sequence[str]) -> list[str]:
    """Check decoding from a context against the reference over the whole sequence.

    Raises:
        GateError: an output is wrong.
    """
    small = setting.for_gate()
    with torch.no_grad():
        for length in LENGTHS:
            x = make_inputs(small, length + 3, seed=length)
            for name in names:
                right = right_answer(small, x, "hybrid" if name == OURS else "softmax")
                found = _decoded(small, x, name, length)
                what = f"decoding by {name} after {length} tokens"
                compare(what, found, right[:, :, length:], TOLERANCES[setting.dtype])
    return [f"three tokens decoded by {', '.join(names)} after {', '.join(map(str, LENGTHS))}"]


def _decoded(setting: BenchSetting, x: Inputs, name: str, length: int) -> Tensor:
    """Outputs of the tokens after the first so many."""
    tokens = [x.part(slice(at, at + 1)) for at in range(length, x.q.shape[2])]
    if name == OURS:
        state, outs = read(setting, x.part(slice(0, length))), list[Tensor]()
        for token in tokens:
            out, state = step(setting, token, state)
            outs.append(out)
        return torch.cat(outs, 2)
    build = DECODERS[name].build
    calls = [build(setting, x.part(slice(0, length + at)), token)[0] for at, token in enumerate(tokens)]
    return torch.cat([call() for call in calls], 2)


def measure(
    setting: BenchSetting, lengths: Sequence[int], names: Sequence[str], *, rounds: int, budget: float,
    told: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Time one step of each decoder after each length of context; arguments as in `attention.measure`."""
    rows: list[Row] = []
    for length in sorted(lengths):
        told(f"decode {setting.dtype}, context {length:,}")
        with torch.inference_mode():
            x = make_inputs(setting, length)
            context, token = x.part(slice(0, length - 1)), x.part(slice(length - 1, length))
            token = _laid_out(token)
            built = {name: DECODERS[name].build(setting, context, token) for name in names}
            contestants = [
                Contestant(name=name, prepare=_given(call), held=held) for name, (call, held) in built.items()
            ]
            times = race(contestants, rounds=rounds, budget=budget, device=setting.device)
        rows += [
            Row(measure="decode", length=length, name=one.name, times=times[one.name], held=one.held)
            for one in contestants
        ]
    return rows


def _laid_out(x: Inputs) -> Inputs:
    """The same with every tensor contiguous; maps stay."""
    phi_q, phi_k = (t.contiguous() if isinstance(t, Tensor) else t for t in (x.phi_q, x.phi_k))
    return Inputs(x.q.contiguous(), x.k.contiguous(), x.v.contiguous(), phi_q, phi_k)


def _given(call: Call) -> Callable[[], Call]:
    return lambda: call
