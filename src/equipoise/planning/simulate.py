"""Training steps without data, weights or arithmetic: what memory they hold and how much they compute.

The code that trains runs on tensors of torch's FakeTensorMode, which have shapes and nothing else, so a slice
of a 405B model takes no more memory than one of a tiny model. Every storage is counted from birth to death,
and every matrix product's operations. Small and large storages are told apart, as glibc does: see
`equipoise.planning.memory`.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from equipoise.config import RunConfig
from equipoise.layers.interface import mixers_of
from equipoise.layers.mixer import AttentionMode, HybridMixer, LayerInputs
from equipoise.models.adapters import add_lora
from equipoise.models.branches import branches, capture, observe
from equipoise.models.surgery import hybridize
from equipoise.ops import Branches
from equipoise.planning.slices import Kind, make_slice, representatives, slice_settings
from equipoise.train.losses import astray, finetune_loss, is_plain
from equipoise.train.objectives import LayerTarget, WeightedSum, weighted_sum
from equipoise.train.probe import BranchProbe
from equipoise.train.stages import lora_targets, recomputing

Phase = Literal["donor", "evaluation", "transfer", "finetune"]
"""donor: the forward pass of stage 1's donor alone; evaluation: looking at held-out rows with the hybrid."""
SMALL = 32 << 20
"""Bytes: glibc's largest threshold; what is larger is always given back to the system when it is freed."""
BATCH = ("input_ids", "labels", "segment_ids", "position_ids")


class NotSimulatedError(RuntimeError):
    """The model's code looks at values, or uses an operator whose shapes are not known without running it."""


@dataclass(frozen=True)
class Footprint:
    """Of one micro batch, beside weights, gradients and the optimiser's state.

    Attributes:
        peak_bytes: of all tensors held at once, at their most.
        small_bytes, large_bytes: the same of storages up to `SMALL`, and above it; each at its own most.
        flops: floating-point operations of matrix products and fused attention.
    """

    peak_bytes: float
    small_bytes: float
    large_bytes: float
    flops: float

    def scaled(self, factor: float) -> Footprint:
        """As many times that."""
        return Footprint(*(factor * value for value in astuple(self)))

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def beyond(self, other: Footprint) -> Footprint:
        """What it takes more than the other."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Footprint(*(max(0.0, a - b) for a, b in pairs))


def footprint(
    config: Any,
    run: RunConfig,
    phase: Phase,
    kinds: Sequence[Kind],
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
) -> Footprint:
    """One micro batch of the whole model, extrapolated from slices of one and two layers.

    Args:
        config: of the donor.
        run: the recipe.
        phase: what is done.
        kinds: what each layer runs after conversion.
        rows, length: of the micro batch.
        dtype: of the donor's weights.

    Raises:
        NotSimulatedError: not possible for this model.
    """
    chosen = representatives(kinds, run.hybrid)
    first = next(iter(chosen))

    def of(indices: list[int]) -> Footprint:
        return slice_footprint(config, run, phase, indices, kinds, rows=rows, length=length, dtype=dtype)

    total = base = of([chosen[first]])
    for kind, index in chosen.items():
        more = kinds.count(kind) - (kind == first)
        if more:
            total = total + of([chosen[first], index]).beyond(base).scaled(float(more))
    return total


def slice_footprint(
    config: Any,
    run: RunConfig,
    phase: Phase,
    indices: Sequence[int],
    kinds: Sequence[Kind],
    *,
    rows: int,
    length: int,
    dtype: torch.dtype,
) -> Footprint:
    """One micro batch of some of the layers; arguments and errors as in `footprint`."""
    model: Any = make_slice(config, indices, "meta", dtype=dtype)
    with torch.device("meta"):
        if run.hybrid is not None:
            hybridize(model, slice_settings(run.hybrid, indices, kinds), check=False)
        _prepare(model, run, phase)
    bf16 = run.precision == "bfloat16" or dtype == torch.bfloat16
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            fill(model)
            batch = {name: torch.zeros(rows, length, dtype=torch.long) for name in BATCH}
            known = [*model.parameters(), *model.buffers(), *batch.values()]
            known += [p.grad for p in model.parameters() if p.grad is not None]
            with Counted(known) as held, autocast:
                _run(model, run, phase, batch, held)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise NotSimulatedError(f"{type(error).__name__}: {error}") from None
    return Footprint(*map(float, (held.peak, held.small_peak, held.large_peak, held.flops)))


def _prepare(model: Any, run: RunConfig, phase: Phase) -> None:
    """What trains, as `equipoise.train.stages` says it."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    if phase == "transfer":
        for mixer in mixers_of(model):
            mixer.requires_grad_(True)
    elif phase == "finetune":
        settings = run.finetune
        assert settings is not None
        add_lora(model, rank=settings.rank, alpha=settings.alpha, targets=lora_targets(model, settings))
        for mixer in mixers_of(model):
            mixer.requires_grad_(settings.train_maps)
        model.train()


def fill(model: nn.Module) -> None:
    """Put fake tensors on the CPU in the place of a model's meta tensors; ties stay ties.

    Call it under FakeTensorMode. Gradients are there from the start, as in a second micro batch.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new: Tensor = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    if old.requires_grad:
                        new.grad = torch.empty_like(new)
                    made[id(old)] = (old, new)  # the old one is kept: its id must not be given anew
                store[name] = made[id(old)][1]  # pyright: ignore[reportArgumentType]


def _run(model: Any, run: RunConfig, phase: Phase, batch: dict[str, Tensor], counted: Counted) -> None:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if phase == "donor":
        softmax = branches(model, "softmax") if mixers_of(model) else nullcontext()
        with torch.no_grad(), softmax:
            model.get_decoder()(**inputs, use_cache=False)
    elif phase == "evaluation":
        with torch.no_grad():
            model(**batch, use_cache=False)
    elif phase == "transfer":
        assert run.transfer is not None
        objective = weighted_sum(run.transfer.objectives)
        far = astray(model, inputs) if objective.is_far else None
        with capture(model, _transfer_observer(objective, far)), torch.no_grad():
            model.get_decoder()(**inputs, use_cache=False)
    else:
        with ExitStack() as stack:
            stack.enter_context(_modes(model, run, len(batch["labels"]), counted))
            if run.gradient_checkpointing:
                stack.enter_context(recomputing(model))
            assert run.finetune is not None
            if is_plain(run.finetune.objectives):
                model(**batch, use_cache=False).loss.backward()
            else:
                finetune_loss(model, batch, run.finetune.objectives).backward()


def _transfer_observer(objective: WeightedSum, far: Tensor | None) -> Any:
    def observer(mixer: HybridMixer, seen: LayerInputs, output: Tensor) -> None:
        if mixer.phi_q is None:
            return
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            objective(LayerTarget(mixer, seen.detach(), output.detach(), far)).backward()

    return observer


@contextmanager
def _modes(model: Any, run: RunConfig, rows: int, counted: Counted) -> Generator[None]:
    """The layers' modes of stage 2: some windows dropped where the recipe drops any, the largest window."""
    settings = run.finetune
    assert settings is not None
    dropout, sizes = settings.window_dropout, settings.window_sizes
    for mixer in mixers_of(model):
        flags = Branches()
        if dropout is not None:
            shape = (rows, mixer.heads) if dropout.per == "head" else (rows,)
            flags = Branches(window=torch.ones(shape, dtype=torch.bool), reading=dropout.reading)
        mixer.mode = AttentionMode("hybrid", flags, window=None if sizes is None else max(sizes))
    # memory is that of a step that is logged, operations those of one that is not
    with observe(model, _Probe(counted)) if mixers_of(model) else nullcontext():
        yield


class _Probe(BranchProbe):
    """A probe whose operations do not count."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __call__(self, mixer: HybridMixer, inputs: LayerInputs, output: Tensor) -> None:
        with self.counted.without_operations():
            super().__call__(mixer, inputs, output)

    def _gradients(self, *args: Any) -> None:
        with self.counted.without_operations():
            super()._gradients(*args)


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor, **_: Any) -> tuple[Tensor, int]:
    """An empty result of `torch._grouped_mm`, and its operations: each row meets one group's matrix."""
    if left.ndim == 2 and right.ndim == 2:  # groups along what is summed: gradients of the matrices
        return left.new_empty(len(offs), left.shape[0], right.shape[1]), 2 * left.numel() * right.shape[1]
    if left.ndim == 3 and right.ndim == 2:
        return left.new_empty(left.shape[1], right.shape[1]), 2 * right.numel() * left.shape[1]
    rows = left.shape[:-1]
    return left.new_empty(*rows, right.shape[-1]), 2 * left.numel() * right.shape[-1]


def _operations(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Of one operator; attention counts every pair of tokens, as torch does, hidden or not."""
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    count = flop_registry.get(name)
    return 0 if count is None else count(*args, **kwargs, out_val=result)


class Counted(TorchDispatchMode):
    """Counts the bytes of storages that come to be inside the block, the most held at once, and operations.

    Args:
        known: tensors that were there before; they do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.small = self.small_peak = self.large_peak = 0
        self.flops, self._counts = 0, True
        self._kept = [tensor.untyped_storage() for tensor in known]
        self._alive: dict[int, int] = {storage._cdata: 0 for storage in self._kept}

    @contextmanager
    def without_operations(self) -> Generator[None]:
        """Operations inside the block do not count; bytes do."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # code that asks whether all tokens are real, whether features are large enough: they are
            value = args[0]
            return True if value.dtype == torch.bool else (1.0 if value.is_floating_point() else 1)
        if func is torch.ops.aten._grouped_mm.default:  # experts; torch knows its shapes in bfloat16 alone
            result, operations = _grouped_product(*args, **(kwargs or {}))
            self.flops += operations if self._counts else 0
        else:
            result = func(*args, **(kwargs or {}))
        if self._counts:
            self.flops += _operations(func._overloadpacket, args, kwargs or {}, result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._take(leaf.untyped_storage())
        return result

    def _take(self, storage: Any) -> None:
        place, size = int(storage._cdata), int(storage.nbytes())
        if place in self._alive:
            return
        self._alive[place] = size
        self._add(size, 1)
        weakref.finalize(storage, self._release, place)

    def _release(self, place: int) -> None:
        self._add(self._alive.pop(place, 0), -1)

    def _add(self, size: int, sign: int) -> None:
        self.now += sign * size
        if size <= SMALL:
            self.small += sign * size
        self.peak = max(self.peak, self.now)
        self.small_peak = max(self.small_peak, self.small)
        self.large_peak = max(self.large_peak, self.now - self.small)
