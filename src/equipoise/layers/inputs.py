"""What one layer's attention receives.

Shapes follow the legend in `equipoise.ops.types`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.layers.rotary import Rotation
from equipoise.ops.types import accumulation_dtype


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's attention received: the donor's view of it, handed to observers.

    Attributes:
        q, k, v: after rotary embedding; k and v of S tokens, the last T of them new (S > T only where a layer
            with softmax attention reads its cache).
        scale, softcap: of the donor's scores.
        key_mask: real tokens; None when all are.
        segment_ids: packed sequences; None when there is one.
        sliding_window: the donor's own window in this layer, None for full attention.
        sink_logits: the donor's learned score per head of attending to nothing; None where it has none.
        rotation: the rotary embedding of the T tokens, where a layer wants it undone
            (`HybridConfig.rotary`).
    """

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B N S D"]
    v: Float[Tensor, "B N S E"]
    scale: float
    softcap: float | None = None
    key_mask: Bool[Tensor, "B S"] | None = None
    segment_ids: Int[Tensor, "B T"] | None = None
    sliding_window: int | None = None
    sink_logits: Float[Tensor, " H"] | None = None
    rotation: Rotation | None = None

    def detach(self) -> LayerInputs:
        """The same, cut from the graph."""
        sinks = None if self.sink_logits is None else self.sink_logits.detach()
        q, k, v = (x.detach() for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, sink_logits=sinks)

    def before_rotary(self) -> LayerInputs:
        """With q and k as they were before rotary embedding, in the precision of sums.

        The same inputs where `rotation` is None.
        """
        if self.rotation is None:
            return self
        dtype = accumulation_dtype(self.q.dtype)
        q, k = (self.rotation.undone(x.to(dtype)) for x in (self.q, self.k))
        return replace(self, q=q, k=k, rotation=None)
