"""What the recipe `equipoise` is compared with: itself without one ingredient, or with another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Changes = Mapping[str, Mapping[str, Any]]
"""Settings that differ, by section of a recipe; of allocation, ``heads`` times its share of bytes."""


def both(*parts: Changes) -> Changes:
    """Several changes at once, the later ones before the earlier ones."""
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        for section, values in part.items():
            found[section] = {**found.get(section, {}), **values}
    return found


def hybrid(**values: Any) -> Changes:
    """A change of the hybrid alone."""
    return {"hybrid": values}


def objectives(stage: str, *names: str, **more: Any) -> Changes:
    """Objectives of a stage, each at weight 1."""
    return {stage: {"objectives": dict.fromkeys(names, 1.0), **more}}


COMPETING = hybrid(mixing="competing", gate_value=1 - 1.5e-8)
NO_SUMMARIES: Changes = {"allocation": {"elsewhere": None}}
TWICE: Changes = {"allocation": {"heads": 2}}
ONE_WIDTH: Changes = both({"allocation": {"narrower": False}}, hybrid(feature_multiple=2))
NARROW = both(ONE_WIDTH, hybrid(feature_multiple=1))
WIDER = both(ONE_WIDTH, hybrid(feature_multiple=4))
WIDE = both(WIDER, TWICE)
PREDICTIONS = both(
    objectives("transfer", "output", "hybrid-output"),
    objectives("finetune", "distillation", "far-distillation"),
)
"""What the recipe learned from before it asked large states what they read."""
DPFP = both(PREDICTIONS, hybrid(feature_map="dpfp"))
"""What it was until 2026-11-29."""
UNIT = both(PREDICTIONS, hybrid(feature_map="unit", feature_multiple=1, write_gate="per_token"))
"""And before that: linear features, in two heads at the bytes of one."""
NEXT_TOKEN_3 = {"distillation": 1.0, "far-distillation": 1.0, "far-reads": 1.0, "next-token": 3.0}
NO_KEYS_APART: Changes = {"finetune": {"objectives": NEXT_TOKEN_3}}
ADDITIVE = both(
    hybrid(state_update="additive", feature_map="hedgehog-joint", write_gate="per_token"), NO_KEYS_APART
)
"""Sums, of which a read gets every key's value by products of positive features, never 0: none is apart."""
AS_WINDOWS = {"distillation": 1.0, "next-token": 3.0}
OWN = {**NEXT_TOKEN_3, "keys-apart": 1.0}
"""What the recipe's stage 2 learns from."""
WITH_NEXT_TOKEN = objectives("finetune", "distillation", "far-distillation", "far-reads", "next-token")
FAR_OUTPUT = objectives("transfer", "output", "far-output", "hybrid-output")
FAST_GATES: Changes = both(FAR_OUTPUT, {"finetune": {"gate_learning_rate": None}})
"""Gates that learn from stage 1 on, and as fast as maps: what the recipe had until 2026-11-30, 10:40."""

AS_OF_29: Changes = both(
    FAST_GATES,
    WITH_NEXT_TOKEN,
    hybrid(gate="per_token", feature_multiple=2, rotary="kept"),
    {"allocation": {
        "linear_share": 0.125, "weigh_lookups": False, "least_importance": 0.1, "narrower": False,
    }},
)  # fmt: skip
"""What the recipe was until 2026-11-30: as many states of one width as an eighth of the bytes pays for."""
BEFORE: Changes = both(
    AS_OF_29,
    objectives("finetune", "distillation", "far-distillation", "far-reads"),
    hybrid(value_divisor=1),
    {"transfer": {"fit_scores": False}},
)
"""What it was until 2026-11-29, 17:00; then it had four sinks in every layer, too."""

ABLATIONS: Mapping[str, Changes] = {
    "equipoise": {},
    # maps and bytes
    "dpfp": hybrid(feature_map="dpfp"),
    "dpfp-narrow": both(hybrid(feature_map="dpfp"), NARROW),
    "narrow": NARROW,
    "wide": WIDE,
    "whole-values": both(hybrid(value_divisor=1), TWICE),
    "quarter-values-wide": hybrid(value_divisor=4, feature_multiple=4),
    "two-heads": TWICE,
    "few": both(ONE_WIDTH, {"allocation": {"linear_share": 0.08}}),
    "single": both(ONE_WIDTH, {"allocation": {"linear_share": 0.045}}),
    "wide-single": both(WIDER, {"allocation": {"linear_share": 0.08}}),
    # the recipe's own now: to be joined with as-of-29, and so is next-token-3
    "lookups": {"allocation": {"weigh_lookups": True, "least_importance": 0.25}},
    "mean-importance": {"allocation": {"weigh_lookups": False, "least_importance": 0.1}},
    "one-width": ONE_WIDTH,
    "twice-share": {"allocation": {"linear_share": 0.28}},
    "twice-wide": both(hybrid(feature_multiple=8), {"allocation": {"linear_share": 0.28}}),
    "quarter-values": hybrid(value_divisor=4),
    "quarter-values-half-share": both(hybrid(value_divisor=4), {"allocation": {"linear_share": 0.07}}),
    "half-wide-half-share": both(hybrid(feature_multiple=2), {"allocation": {"linear_share": 0.07}}),
    "wider": WIDER,
    "state-per-query": hybrid(map_heads="query"),
    # writes, gates, states
    "linear-writes": hybrid(write_gate="per_token"),
    "full-writes": hybrid(write_gate="none"),
    "additive": both(ADDITIVE, hybrid(value_divisor=1), TWICE),
    "additive-hedgehog": both(ADDITIVE, hybrid(feature_map="hedgehog", value_divisor=1), TWICE),
    "competing": hybrid(mixing="competing"),
    "unfitted-scores": {"transfer": {"fit_scores": False}},
    "fixed-gate": hybrid(gate="fixed"),
    "per-token-gate": hybrid(gate="per_token"),
    "rotated": both(hybrid(rotary="kept"), NO_KEYS_APART),  # a rotated key is not known when it comes again
    # where bytes go
    "even-windows": {},
    "four-sinks": {"allocation": {"fewer_sinks": False}},
    "no-summaries": NO_SUMMARIES,
    # what is learned from
    "hidden-states": {"finetune": {"objectives": {**OWN, "hidden-states": 1.0}}},
    "next-token-1": {"finetune": {"objectives": {**OWN, "next-token": 1.0}}},
    "next-token-9": {"finetune": {"objectives": {**OWN, "next-token": 9.0}}},
    "next-token-3": NO_KEYS_APART,  # as it was called before there was keys-apart
    "no-next-token": objectives("finetune", "distillation", "far-distillation", "far-reads", "keys-apart"),
    "predictions": both(
        objectives("transfer", "output"),
        {"finetune": {"objectives": {"distillation": 1.0, "far-distillation": 1.0, "next-token": 3.0}}},
    ),
    "no-far": both(
        objectives("transfer", "output"),
        {"finetune": {"objectives": {"distillation": 1.0, "keys-apart": 1.0, "next-token": 3.0}}},
    ),
    # what windows alone learn from, and that with one more objective of the recipe's
    "windows-objectives": {"finetune": {"objectives": AS_WINDOWS}},
    "windows-objectives-far-reads": {"finetune": {"objectives": {**AS_WINDOWS, "far-reads": 1.0}}},
    "windows-objectives-keys-apart": {"finetune": {"objectives": {**AS_WINDOWS, "keys-apart": 1.0}}},
    "no-far-distillation": {"finetune": {"objectives": {**AS_WINDOWS, "far-reads": 1.0, "keys-apart": 1.0}}},
    "fast-gates": FAST_GATES,
    "gates-at-once": FAR_OUTPUT,
    "long-first": {},
    "twentieth-first": {},
    "maps-frozen": {
        "finetune": {  # reads and keys teach nothing else
            "objectives": {"distillation": 1.0, "far-distillation": 1.0, "next-token": 3.0},
            "train_maps": False,
        }
    },
    "no-keys-apart": NO_KEYS_APART,
    "half-apart": {"finetune": {"objectives": {**OWN, "keys-apart": 0.5}}},
    "twice-apart": {"finetune": {"objectives": {**OWN, "keys-apart": 2.0}}},
    "half-rate": {"finetune": {"learning_rate": 2.5e-4}},  # of LoRA; maps and gates have their own
    "twice-rate": {"finetune": {"learning_rate": 1e-3}},
    "four-times-rate": {"finetune": {"learning_rate": 2e-3}},
    "eight-times-rate": {"finetune": {"learning_rate": 4e-3}},
    "sixteen-times-rate": {"finetune": {"learning_rate": 8e-3}},
    "thirty-two-times-rate": {"finetune": {"learning_rate": 1.6e-2}},
    "slow-maps": {"finetune": {"map_learning_rate": 1e-3}},
    "dropout": {"finetune": {"window_dropout": {"probabilities": [0.5]}}},
    # what it was compared with before; as it was then with `-before` behind the name
    "as-of-29": AS_OF_29,
    "with-next-token": WITH_NEXT_TOKEN,
    "narrow-with-next-token": both(NARROW, WITH_NEXT_TOKEN),
    "narrow-competing": both(NARROW, COMPETING),
    "dpfp-predictions": DPFP,
    "dpfp-predictions-narrow": both(DPFP, NARROW),
    "dpfp-predictions-wide": both(DPFP, WIDE),
    "dpfp-predictions-linear-writes": both(DPFP, hybrid(write_gate="per_token")),
    "dpfp-predictions-far-output": both(DPFP, FAR_OUTPUT),
    "dpfp-predictions-far-output-half": both(DPFP, FAR_OUTPUT, {"transfer": {"learning_rate": 3e-2}}),
    "unit-maps": UNIT,
    "unit-one-head": both(UNIT, {"allocation": {"heads": 0.5}}),
    "unit-two-wide-heads": both(UNIT, hybrid(feature_multiple=2), TWICE),
    "unit-competing": both(UNIT, COMPETING),
    "unit-far-3": both(UNIT, {"finetune": {"objectives": {"distillation": 1.0, "far-distillation": 3.0}}}),
    "unit-no-summaries": both(UNIT, NO_SUMMARIES),
}


def changes_of(name: str) -> Changes | None:
    """Of an ablation, or of several joined by +; None where a name is no ablation's."""
    names = name.split("+")
    return both(*(ABLATIONS[of] for of in names)) if all(of in ABLATIONS for of in names) else None


FIRST: Mapping[str, int] = {
    "as-of-29": 8, "long-first": 8, "twentieth-first": 20, "dpfp-predictions-far-output-half": 2,
}  # fmt: skip
"""Steps over those of stage 1, where that is not 60 for ours and 4 for published recipes."""
