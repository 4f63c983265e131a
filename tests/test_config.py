"""Settings: what is refused, in which words; YAML and command-line values."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from equipoise.config import (
    ConfigError,
    EarlyStopping,
    FinetuneConfig,
    HybridConfig,
    RunConfig,
    Settings,
    TransferConfig,
    load_yaml,
    merge,
    parse,
    parse_assignments,
)


def refused(kind: type[Settings], values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(kind, values)
    return str(caught.value)


def run(**sections: Any) -> dict[str, Any]:
    return {"name": "x", **sections}


class TestFields:
    def test_defaults_are_the_published_ones(self) -> None:
        tuned, transfer = FinetuneConfig(), TransferConfig()
        assert (tuned.rank, tuned.alpha, tuned.learning_rate, tuned.max_grad_norm) == (8, 16, 1e-4, 1.0)
        assert (transfer.learning_rate, transfer.batch_size, transfer.objectives) == (
            1e-2,
            8,
            {"weights": 1.0},
        )
        assert HybridConfig().window == 64
        assert HybridConfig().feature_multiple == 2

    def test_frozen(self) -> None:
        settings = HybridConfig()
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            settings.window = 3  # type: ignore[misc]

    @pytest.mark.parametrize("kind", [HybridConfig, TransferConfig, FinetuneConfig, RunConfig, EarlyStopping])
    def test_every_field_says_what_it_means(self, kind: type[Settings]) -> None:
        assert all(field.description for field in kind.model_fields.values())

    @pytest.mark.parametrize("kind", [HybridConfig, TransferConfig, FinetuneConfig])
    def test_survives_a_round_trip_through_json(self, kind: type[Settings]) -> None:
        settings = kind()
        assert parse(kind, settings.model_dump(mode="json")) == settings

    @pytest.mark.parametrize(
        ("kind", "values", "message"),
        [
            (HybridConfig, {"window": 0}, "window: Input should be greater than or equal to 1; got 0."),
            (HybridConfig, {"gate_value": 1.0}, "gate_value: Input should be less than 1; got 1.0."),
            (HybridConfig, {"gate_value": float("nan")},
             "gate_value: Input should be a finite number; got nan."),
            (HybridConfig, {"gate": "fix"},
             "gate: Input should be 'fixed', 'per_head', 'per_token' or 'quadratic'; got 'fix'."),
            (HybridConfig, {"feature_multiple": 3}, "feature_multiple: Input should be 1, 2, 4 or 8; got 3."),
            (HybridConfig, {"layers": "some"},
             "layers: Input should be 'global' or 'all', or Input should be a valid tuple; got 'some'."),
            (HybridConfig, {"window": None, "feature_map": None},
             "HybridConfig: window and feature_map are both null: a layer needs at least one branch."),
            (HybridConfig, {"window": None, "sinks": 4},
             "HybridConfig: sinks join the window's softmax; with window null, sinks must be 0."),
            (TransferConfig, {"batch_size": 8, "micro_batch_size": 3},
             "TransferConfig: micro_batch_size 3 must divide batch_size 8."),
            (TransferConfig, {"objectives": {}},
             "TransferConfig: objectives must name at least one objective."),
            (TransferConfig, {"objectives": {"output": 0}},
             "TransferConfig: the weights of objectives must be positive, got {'output': 0.0}."),
            (TransferConfig, {"warmup": 1}, "warmup: Input should be less than 1; got 1."),
            (FinetuneConfig, {"window_sizes": [0, 64]},
             "FinetuneConfig: window_sizes must be at least 1 token each, got [0, 64]."),
            (FinetuneConfig, {"window_dropout": {"probabilities": [1.5]}},
             "window_dropout: probabilities must be one or more numbers between 0 and 1."),
            (FinetuneConfig, {"window_dropout": {"probabilities": []}},
             "window_dropout: probabilities must be one or more numbers between 0 and 1."),
            (RunConfig, {}, "name: Field required."),
            (RunConfig, run(finetune=3),
             "finetune: Input should be a valid dictionary or instance of FinetuneConfig; got 3."),
            (RunConfig, run(data={"context_length": 4}),
             "data.context_length: Input should be greater than or equal to 8; got 4."),
            (RunConfig, run(hybrid=None, transfer={}),
             "RunConfig: transfer trains feature maps; it needs a hybrid with a linear branch."),
            (RunConfig, run(hybrid={"feature_map": None}, transfer={}),
             "RunConfig: transfer trains feature maps; it needs a hybrid with a linear branch."),
            (RunConfig, run(hybrid={"window": None}, finetune={"window_dropout": {}}),
             "RunConfig: window_dropout needs a hybrid with both branches."),
            (RunConfig, run(hybrid={"feature_map": None}, finetune={"window_dropout": {}}),
             "RunConfig: window_dropout needs a hybrid with both branches."),
            (RunConfig, run(hybrid=None, finetune={"window_sizes": [4]}),
             "RunConfig: window_sizes needs a hybrid with a window."),
            (RunConfig, run(
                hybrid={"window": 64, "head_windows": [64, 8], "linear_heads": [0]},
                finetune={"window_sizes": [32, 64]}),
             "RunConfig: window_sizes gives all heads one window, and these layers or heads have their own."),
            (RunConfig, run(finetune={"window_sizes": [64, 32]}),
             "RunConfig: window_sizes must end with the hybrid's window, 64."),
            (RunConfig, run(finetune={"window_sizes": []}),
             "RunConfig: window_sizes must end with the hybrid's window, 64."),
        ],
    )  # fmt: skip
    def test_refusals(self, kind: type[Settings], values: dict[str, Any], message: str) -> None:
        assert refused(kind, values) == message

    @pytest.mark.parametrize(
        "values",
        [
            run(finetune={"window_sizes": [16, 64]}),
            run(hybrid={"window": None}, transfer={}, finetune={}),
            run(hybrid=None, finetune={}),
            run(hybrid={"feature_map": None, "sinks": 4}),
            run(hybrid={"layers": [0, 2]}),
            run(finetune={"window_dropout": {"probabilities": [0, 1]}}),
        ],
    )
    def test_accepted(self, values: dict[str, Any]) -> None:
        parse(RunConfig, values)


class TestErrors:
    def test_unknown_setting_deep_down_is_told_once(self) -> None:
        assert refused(RunConfig, run(finetune={"early_stopping": {"evry": 3}})) == (
            "finetune.early_stopping.evry: unknown setting 'evry'. Did you mean 'every'? "
            "Known: every, min_improvement, mode, patience, watch."
        )

    def test_unknown_setting_at_the_top(self) -> None:
        assert refused(HybridConfig, {"wndow": 3}).startswith(
            "wndow: unknown setting 'wndow'. Did you mean 'window'? Known: feature_dim, "
        )

    def test_one_line_a_mistake(self) -> None:
        lines = refused(RunConfig, run(hybrid={"window": 0, "sinks": -1}, oops=1)).splitlines()
        assert [line.split(":")[0] for line in lines] == ["hybrid.window", "hybrid.sinks", "oops"]

    @pytest.mark.parametrize(
        ("values", "where"),
        [
            (run(transfer={"objectives": {"output": "x"}}), "transfer.objectives.output: "),
            (run(finetune={"window_dropout": {"probabilities": [0.5, "x"]}}),
             "finetune.window_dropout.probabilities.1: "),
            (run(finetune={"window_sizes": [1, "x"]}), "finetune.window_sizes.1: "),
        ],
    )  # fmt: skip
    def test_entries_of_lists_and_mappings_are_named(self, values: dict[str, Any], where: str) -> None:
        assert refused(RunConfig, values).startswith(where)
        assert refused(RunConfig, values).endswith("; got 'x'.")

    def test_settings_can_be_made_again_after_a_refusal(self) -> None:
        """What is outermost is told from what is inside, whatever failed before."""
        for _ in range(2):
            assert "finetune.rank" in refused(RunConfig, run(finetune={"rank": 0}))
        assert "rank: " in refused(FinetuneConfig, {"rank": 0})

    def test_it_is_a_value_error_made_by_the_class_itself(self) -> None:
        with pytest.raises(ValueError, match="window: Input should be greater"):
            HybridConfig(window=-1)

    def test_not_a_mapping(self) -> None:
        assert refused(RunConfig, [1]) == "expected a mapping of settings for RunConfig, got list."


class TestYaml:
    @pytest.mark.parametrize(
        ("text", "value"),
        [("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e3", -2500.0), ("1.e-2", 0.01), ("1e+2", 100.0), (".5", 0.5),
         ("0.5", 0.5), ("3", 3), ("null", None), ("", None), ("true", True), ("e5", "e5"), ("1e", "1e"),
         ("'1e-4'", "1e-4"), ("[0.9, 5e-1]", [0.9, 0.5])],
    )  # fmt: skip
    def test_numbers_are_numbers(self, text: str, value: Any) -> None:
        read = load_yaml(f"x: {text}", source="here")["x"]
        assert read == value
        assert type(read) is type(value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- 1", "here: expected a mapping of settings, got list."),
            ("", "here: expected a mapping of settings, got NoneType."),
            ("a: [1", "here: not YAML: "),
            ("a: 1\nb: 2\na: 3", "here: not YAML: 'a' is set twice"),
            ("a: {b: 1, b: 2}", "here: not YAML: 'b' is set twice"),
            ("a: !!python/object/apply:os.getcwd []", "here: not YAML: could not determine a constructor"),
        ],
    )
    def test_refusals(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            load_yaml(text, source="here")
        assert str(caught.value).startswith(message)


class TestAssignments:
    def test_nested(self) -> None:
        assert parse_assignments(["finetune.rank=16", "finetune.window_dropout.per=head", "name=x=y"]) == {
            "finetune": {"rank": 16, "window_dropout": {"per": "head"}},
            "name": "x=y",
        }

    @pytest.mark.parametrize(
        ("text", "value"),
        [("1e-3", 1e-3), ("null", None), ("", None), ("[1, 2]", [1, 2]), ("{weights: 1}", {"weights": 1})],
    )
    def test_values_are_yaml(self, text: str, value: Any) -> None:
        assert parse_assignments([f"a={text}"]) == {"a": value}

    def test_later_ones_count(self) -> None:
        assert parse_assignments(["a.b=1", "a.c=2", "a.b=3"]) == {"a": {"b": 3, "c": 2}}
        assert parse_assignments(["a.b=1", "a=null"]) == {"a": None}
        assert parse_assignments(["a=1", "a.b=2"]) == {"a": {"b": 2}}

    @pytest.mark.parametrize("text", ["rank", "=3", " =3", "a..b=1", ".a=1", "a.=1"])
    def test_not_an_assignment(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"expected key=value, for instance finetune.rank=16, got"):
            parse_assignments([text])

    def test_not_yaml(self) -> None:
        with pytest.raises(ConfigError, match=r"'a=\[1': the value is not YAML"):
            parse_assignments(["a=[1"])


class TestMerge:
    def test_nested_mappings_merge_and_all_else_is_replaced(self) -> None:
        base = {"a": {"b": 1, "c": [1]}, "d": 2, "e": {"f": 1}}
        override = {"a": {"c": [2]}, "d": {"x": 1}, "e": None, "g": 0}
        assert merge(base, override) == {"a": {"b": 1, "c": [2]}, "d": {"x": 1}, "e": None, "g": 0}
        assert base == {"a": {"b": 1, "c": [1]}, "d": 2, "e": {"f": 1}}

    def test_objectives_are_replaced_unless_one_is_named_by_its_key(self) -> None:
        base = {"finetune": {"objectives": {"a": 1.0, "b": 1.0}, "rank": 8}}
        whole = parse_assignments(["finetune.objectives={c: 2.0}"])
        assert merge(base, whole) == {"finetune": {"objectives": {"c": 2.0}, "rank": 8}}
        assert merge(base, {"finetune": {"objectives": {"c": 2.0}}}) == merge(base, whole)
        one = parse_assignments(["finetune.objectives.a=3.0", "finetune.objectives.c=2.0"])
        assert merge(base, one)["finetune"]["objectives"] == {"a": 3.0, "b": 1.0, "c": 2.0}
        both = parse_assignments(["finetune.objectives={c: 2.0}", "finetune.objectives.d=1.0"])
        assert merge(base, both)["finetune"]["objectives"] == {"c": 2.0, "d": 1.0}

    def test_null_is_overridden_too(self) -> None:
        assert merge({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}
