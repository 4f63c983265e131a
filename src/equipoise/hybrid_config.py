"""Settings of the converted layers: what each computes, and how bytes are shared between them.

`equipoise.config` has them too, with all others.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from equipoise.settings import Settings


class HybridConfig(Settings):
    """What a converted layer computes."""

    window: int | None = Field(default=64, ge=1)
    """w, the number of last tokens the softmax branch sees; null for no window branch."""
    layout: Literal["sliding", "terraced"] = "sliding"
    """sliding: keys i-w+1..i; terraced: the own block of w tokens and the one before."""
    mixing: str = "convex"
    """Mixing rule: convex (g SWA + (1-g) LA), competing (linear attention is one more key of the window's
    softmax, its score learned), calibrated (one denominator, linear weights times a learned factor) or shared
    (LoLCATs' single denominator)."""
    gate: Literal["fixed", "per_head", "per_token", "quadratic"] = "fixed"
    """The window's weight: a constant, learned per query head, or computed per head and token from q; by
    per_token from q . w, by quadratic from q . w + q^2 . u, which need not change as q is rotated."""
    gate_value: float = Field(default=0.5, gt=0, lt=1)
    """The window's weight g (shared: gamma; competing, calibrated: sigmoid of linear attention's score), or
    where it starts when learned."""
    overlap: bool = True
    """Whether linear attention also covers the keys in the window."""
    feature_map: str | None = "hedgehog"
    """Feature map of the linear branch; null for no linear branch."""
    feature_multiple: Literal[1, 2, 4, 8] = 2
    """Feature dimension in multiples of head_dim."""
    feature_dim: int | None = Field(default=None, ge=1)
    """Feature dimension itself, for states smaller than head_dim; feature_multiple says it where null."""
    map_heads: Literal["query", "key_value"] = "query"
    """One key map and state per query head, or per key/value head (a state H/Hkv times smaller)."""
    sinks: int = Field(default=0, ge=0)
    """The first so many tokens join every window."""
    layers: Literal["global", "all"] | tuple[int, ...] = "global"
    """Layers to convert: global (those not local already), all, or a list of indices."""
    write_gate: Literal["none", "per_token", "quadratic"] = "none"
    """per_token: a key's features are scaled by exp(k . w), by the delta rule by sigmoid(k . w + b), w and b
    learned per head, so that the state can pass over what is not worth keeping. quadratic: k . w + k^2 . u in
    place of k . w, which sees how long a key is."""
    linear_heads: tuple[int, ...] | None = None
    """Query heads that have the linear branch, and a state; the others attend to their window only. All where
    null. With map_heads key_value, all that share a key/value head, or none of them."""
    head_windows: tuple[int, ...] | None = None
    """A window for each key/value head, none longer than ``window``; ``window`` in all of them where null."""
    state_update: Literal["additive", "delta"] = "additive"
    """How the state takes in a key: additive (linear attention), or by the delta rule, which first removes
    what the state says of that key. delta needs a window beside it, and a feature map of length 1:
    trilinear, dpfp or unit."""
    rotary: Literal["kept", "undone"] = "kept"
    """What feature maps and gates see: q and k as attention gets them, rotated by position, or with that
    undone, where a token is the same wherever it stands. undone needs overlap true; the same as kept where a
    layer has no rotary embedding."""
    value_divisor: Literal[1, 2, 4] = 1
    """A state of the delta rule keeps head_dim divided by this of each value, by a learned projection: the
    same bytes hold more features, and so more keys. delta alone."""
    per_layer: dict[int, dict[str, Any]] = Field(default_factory=dict[int, dict[str, Any]])
    """Settings of single layers that differ from those above: {0: {window: 16, feature_map: null}}."""

    @model_validator(mode="after")
    def _check(self) -> HybridConfig:
        if self.window is None and self.feature_map is None:
            raise ValueError("window and feature_map are both null: a layer needs at least one branch")
        if self.window is None and self.sinks:
            raise ValueError("sinks join the window's softmax; with window null, sinks must be 0")
        for index, own in self.per_layer.items():
            whole = own.keys() & {"layers", "per_layer"}
            if whole:
                raise ValueError(f"per_layer.{index}: {', '.join(sorted(whole))} is of the whole model")
            self.for_layer(index)
        return self

    @model_validator(mode="after")
    def _heads(self) -> HybridConfig:
        if self.linear_heads is None:
            return self
        heads = self.linear_heads
        if not heads or any(head < 0 for head in heads) or list(heads) != sorted(set(heads)):
            raise ValueError(f"linear_heads must be indices of heads in order, got {list(heads)}")
        if self.window is None or self.feature_map is None:
            raise ValueError("linear_heads needs both branches: the other heads have a window only")
        mixings = ("convex", "competing", "calibrated")
        if self.mixing not in mixings or not self.overlap:
            raise ValueError("linear_heads needs mixing convex, competing or calibrated, overlap true")
        return self

    @model_validator(mode="after")
    def _head_windows(self) -> HybridConfig:
        if self.head_windows is None:
            return self
        if min(self.head_windows, default=0) < 1 or max(self.head_windows) != self.window:
            raise ValueError(
                f"head_windows must be a window of at least 1 token for each key/value head, the longest as "
                f"long as window ({self.window}), got {list(self.head_windows)}"
            )
        if self.layout != "sliding":
            raise ValueError("head_windows needs layout sliding: terraces are laid out for all heads at once")
        if self.feature_map is not None and self.linear_heads is None:
            raise ValueError("head_windows needs linear_heads: the heads that have the linear branch")
        return self

    @model_validator(mode="after")
    def _update(self) -> HybridConfig:
        if self.value_divisor > 1 and self.state_update != "delta" and self.feature_map is not None:
            raise ValueError(
                f"value_divisor {self.value_divisor} needs state_update delta, got {self.state_update}"
            )
        if self.rotary == "undone" and not self.overlap and self.feature_map is not None:
            raise ValueError(
                "rotary undone needs overlap true: else states take keys in when they leave the window, and "
                "their angles are not known any more"
            )
        if self.state_update == "additive" or self.feature_map is None:
            return self
        mixings = ("convex", "competing")
        if self.window is None or self.mixing not in mixings or not self.overlap:
            raise ValueError("state_update delta needs a window, mixing convex or competing, overlap true")
        return self

    def features(self, head_dim: int) -> int:
        """F, the features of a head of D numbers."""
        return self.feature_multiple * head_dim if self.feature_dim is None else self.feature_dim

    def value_size(self, head_dim: int) -> int:
        """C, what a state keeps of a value of E = D numbers."""
        return max(1, head_dim // self.value_divisor)

    def for_layer(self, index: int) -> HybridConfig:
        """The settings that one layer has."""
        if not self.per_layer:
            return self
        own = self.per_layer.get(index, {})
        return HybridConfig(**{**self.model_dump(exclude={"per_layer"}), **own})


class AllocationConfig(Settings):
    """Sharing a budget of decode state: how long each head's window is, which heads have a linear branch.

    Measured on rows of the training data before anything trains; see `equipoise.allocate`.
    """

    state_bytes: int | None = Field(default=None, ge=1)
    """Bytes of one sequence's state (K and V at 2 bytes an element, S and z at 4); those of windows alone, as
    hybrid.window says, where null."""
    linear_share: float = Field(default=0.25, gt=0, lt=1)
    """Largest share of them for linear branches."""
    linear_credit: float = Field(default=0.0, ge=0, le=1)
    """What windows may leave to the linear branches: the share of full softmax that heads with one are taken
    to have while windows are measured. 0 gives windows that would be right without any."""
    least_importance: float = Field(default=0.1, ge=0, le=1)
    """A head gets a linear branch where full attention in it restores at least this share of what it restores
    in the head that needs it most."""
    weigh_lookups: bool = False
    """Whether what a head restores counts more where windows lose more: heads that look something up are told
    apart from those where a mean of the past would do."""
    narrower: bool = False
    """Whether large states may be narrower than hybrid.feature_multiple, so that every head that needs one
    can be paid for; where not even the narrowest can be, as many as can have that."""
    elsewhere: dict[str, Any] | None = None
    """Settings of the linear branch in all heads of layers where no head needs a large one: a small state
    that stands for what the window leaves out. Null leaves those layers their window only."""
    moves: int = Field(default=0, ge=0)
    """Measurements that may be spent on improving windows by moving tokens from head to head, each a forward
    pass over all rows."""
    fewer_sinks: bool = False
    """Whether a layer may have fewer sinks than hybrid.sinks, where windows longer by as many tokens are
    worth more; measured."""
    rows: int = Field(default=16, ge=1)
    """Rows to measure on."""
    smallest_window: int = Field(default=4, ge=2)
    """Tokens that every head's window has at least."""
