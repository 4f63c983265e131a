"""Shipped recipes against the method they name; recipes from files, and how they derive from one another."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.config import ConfigError, HybridConfig, RunConfig
from equipoise.registry import UnknownNameError
from equipoise.train.recipes import load_recipe, recipe_names

SHIPPED = (
    "equipoise", "hedgecats", "hedgehog", "lolcats", "lora-only", "ssd", "swa-sinks", "t2r", "zero-shot",
)  # fmt: skip


def source(name: str) -> dict[str, Any]:
    text = resources.files("equipoise.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def hybrid(run: RunConfig) -> HybridConfig:
    assert run.hybrid is not None
    return run.hybrid


def test_all_are_here() -> None:
    assert recipe_names() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
class TestEveryRecipe:
    def test_says_what_it_is(self, name: str) -> None:
        run = load_recipe(name)
        assert run.name == name
        assert run.summary.endswith(".")
        assert "arXiv" in run.reference
        assert run.checkpoint == "delta"

    def test_is_on_the_published_data(self, name: str) -> None:
        data = load_recipe(name).data
        assert (data.source, data.context_length) == ("yahma/alpaca-cleaned", 1024)

    def test_fixes_which_keys_linear_attention_covers(self, name: str) -> None:
        """Overlap decides whether a hybrid collapses: not left to a default that may change."""
        own = source(name)["hybrid"]
        assert own is None or isinstance(own["overlap"], bool)

    def test_derives_instead_of_copying(self, name: str) -> None:
        assert source(name)["extends"] == "base"
        assert "data" not in source(name)

    def test_trains_at_the_published_rates(self, name: str) -> None:
        run = load_recipe(name)
        if run.transfer is not None:
            assert (run.transfer.learning_rate, run.transfer.batch_size) == (1e-2, 8)
        if run.finetune is not None:
            tuned = run.finetune
            assert (tuned.learning_rate, tuned.batch_size, tuned.max_grad_norm) == (1e-4, 8, 1.0)
            assert (tuned.rank, tuned.alpha, tuned.targets) == (8, 16, None)


class TestAgainstTheMethod:
    def test_lolcats(self) -> None:
        run = load_recipe("lolcats")
        layer = hybrid(run)
        assert (layer.mixing, layer.overlap, layer.gate, layer.gate_value) == (
            "shared",
            False,
            "per_head",
            0.1,
        )
        assert (layer.window, layer.feature_map, layer.feature_multiple) == (64, "hedgehog", 1)
        assert run.transfer is not None
        assert run.transfer.objectives == {"hybrid-output": 1000.0}
        assert run.finetune is not None
        assert (run.transfer.epochs, run.finetune.epochs) == (2, 2)
        assert run.finetune.window_dropout is None
        assert not run.finetune.train_maps

    def test_zero_shot(self) -> None:
        run = load_recipe("zero-shot")
        layer = hybrid(run)
        assert (layer.mixing, layer.gate, layer.gate_value) == ("convex", "fixed", 0.5)
        assert (layer.window, layer.feature_map, layer.overlap) == (64, "hedgehog", True)
        assert run.transfer is not None
        assert run.transfer.objectives == {"weights": 1.0}
        assert run.finetune is None

    def test_hedgecats(self) -> None:
        run = load_recipe("hedgecats")
        layer = hybrid(run)
        assert (layer.mixing, layer.gate, layer.gate_value, layer.window) == ("convex", "fixed", 0.5, 64)
        assert run.transfer is not None
        assert (run.transfer.objectives, run.transfer.epochs) == ({"weights": 1.0}, 1)
        assert run.finetune is not None
        assert 1 <= run.finetune.epochs <= 2
        assert run.finetune.early_stopping is not None

    def test_ssd(self) -> None:
        run = load_recipe("ssd")
        assert run.transfer is not None
        assert run.transfer.objectives == {"weights": 1.0}
        assert run.finetune is not None
        dropout = run.finetune.window_dropout
        assert dropout is not None
        assert (dropout.probabilities, dropout.per) == ((0.9, 0.75, 0.5), "sample")
        assert dropout.reading == "renormalised"
        layer = hybrid(run)
        assert (layer.mixing, layer.gate, layer.gate_value, layer.window) == ("convex", "fixed", 0.5, 64)

    def test_hedgehog(self) -> None:
        run = load_recipe("hedgehog")
        layer = hybrid(run)
        assert (layer.window, layer.feature_map, layer.feature_multiple) == (None, "hedgehog", 2)
        assert run.transfer is not None
        assert run.transfer.objectives == {"weights": 1.0}
        assert run.finetune is not None

    def test_t2r(self) -> None:
        run = load_recipe("t2r")
        layer = hybrid(run)
        assert (layer.window, layer.feature_map) == (None, "relu")
        assert run.transfer is None
        assert run.finetune is not None
        assert run.finetune.train_maps  # without a transfer they would stay as initialised

    def test_lora_only(self) -> None:
        run = load_recipe("lora-only")
        assert run.hybrid is None
        assert run.transfer is None
        assert run.finetune is not None

    def test_equipoise(self) -> None:
        run = load_recipe("equipoise")
        layer = hybrid(run)
        assert (layer.window, layer.sinks, layer.mixing, layer.overlap) == (64, 4, "convex", True)
        assert (layer.gate, layer.write_gate) == ("quadratic", "quadratic")
        assert (layer.state_update, layer.feature_map, layer.feature_multiple) == ("delta", "trilinear", 4)
        assert run.allocation is not None
        assert run.allocation.state_bytes is None  # those of the windows
        assert run.transfer is not None
        assert run.transfer.objectives == {"output": 1.0, "far-output": 1.0}  # nothing that gates learn from
        assert run.finetune is not None
        assert run.finetune.objectives == {
            "distillation": 1.0, "far-distillation": 1.0, "far-reads": 1.0, "keys-apart": 1.0,
            "next-token": 3.0,
        }  # fmt: skip
        assert (layer.map_heads, layer.value_divisor, layer.rotary) == ("key_value", 2, "undone")
        assert (run.transfer.fit_scores, run.transfer.epochs, run.finetune.epochs) == (True, 0.02, 1)
        assert run.allocation.fewer_sinks
        assert (run.allocation.weigh_lookups, run.allocation.least_importance) == (True, 0.25)
        assert run.allocation.narrower
        assert run.finetune.train_maps
        assert (run.finetune.map_learning_rate, run.finetune.gate_learning_rate) == (1e-2, 1e-3)
        assert run.finetune.window_dropout is None

    def test_swa_sinks(self) -> None:
        run = load_recipe("swa-sinks")
        layer = hybrid(run)
        assert (layer.window, layer.sinks, layer.feature_map) == (64, 4, None)
        assert run.transfer is None
        assert run.finetune is None


class TestOverrides:
    def test_merge_over_the_recipe(self) -> None:
        run = load_recipe("ssd", {"finetune": {"rank": 4}, "data": {"source": "stdlib"}})
        assert run.finetune is not None
        assert (run.finetune.rank, run.finetune.epochs) == (4, 2)
        assert (run.data.source, run.data.context_length) == ("stdlib", 1024)

    def test_null_takes_a_section_out(self) -> None:
        assert load_recipe("ssd", {"finetune": None}).finetune is None
        run = load_recipe("ssd", {"finetune": {"window_dropout": None}})
        assert run.finetune is not None
        assert run.finetune.window_dropout is None

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ({"hybrid": {"feature_map": "hedghog"}}, "feature map 'hedghog'. Did you mean 'hedgehog'?"),
            ({"hybrid": {"mixing": "convx"}}, "mixing rule 'convx'. Did you mean 'convex'?"),
            ({"transfer": {"objectives": {"weight": 1}}}, "objective 'weight'. Did you mean 'weights'?"),
        ],
    )
    def test_registered_names_are_looked_up_at_once(self, override: dict[str, Any], message: str) -> None:
        with pytest.raises(UnknownNameError, match=message.replace("?", r"\?").replace(".", r"\.")):
            load_recipe("ssd", override)

    def test_unknown_setting(self) -> None:
        with pytest.raises(
            ConfigError, match=r"^finetune\.rnk: unknown setting 'rnk'. Did you mean 'rank'\?"
        ):
            load_recipe("ssd", {"finetune": {"rnk": 4}})


class TestFiles:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_new_recipe_by_path(self, tmp_path: Path) -> None:
        """The design's acceptance test: a new recipe is one file."""
        path = tmp_path / "mine.yaml"
        path.write_text("extends: ssd\nsummary: Mine.\nfinetune: {window_dropout: {probabilities: [1e-1]}}\n")
        for given in (str(path), "mine.yaml"):
            run = load_recipe(given)
            assert (run.name, run.summary, run.reference) == ("mine", "Mine.", "SSD, arXiv 2510.05901")
            assert run.finetune is not None
            assert run.finetune.window_dropout is not None
            assert run.finetune.window_dropout.probabilities == (0.1,)
            assert run.finetune.epochs == 2

    def test_chain_of_files_relative_to_each_other(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "top.yaml").write_text("extends: ssd\nabstract: true\nhybrid: {window: 8}\n")
        (tmp_path / "deep" / "a.yaml").write_text("extends: ../top.yaml\nfinetune: {rank: 3}\n")
        (tmp_path / "deep" / "b.yml").write_text("extends: a.yaml\nname: bee\nhybrid: {sinks: 2}\n")
        run = load_recipe("deep/b.yml")
        assert run.name == "bee"
        assert (hybrid(run).window, hybrid(run).sinks) == (8, 2)
        assert run.finetune is not None
        assert run.finetune.rank == 3

    def test_on_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("hybrid: {window: 8}\n")
        assert load_recipe("a.yaml").transfer is None

    @pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
    def test_circles(self, chain: list[str], tmp_path: Path) -> None:
        for name, parent in zip(chain, [*chain[1:], chain[0]], strict=True):
            (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}.yaml\n")
        with pytest.raises(ConfigError, match=r"in a circle: .*a\.yaml -> .*a\.yaml\."):
            load_recipe("a.yaml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- extends: base", "a.yaml: expected a mapping of settings, got list."),
            ("", "a.yaml: expected a mapping of settings, got NoneType."),
            ("extends: [base]", r"a.yaml: expected 'extends' to name a recipe, got \['base'\]"),
            ("extends: bas", "unknown recipe 'bas'"),
            ("extends: none.yaml", "none.yaml: cannot read the recipe: No such file or directory."),
            ("hybrid: {window: 1, window: 2}", "a.yaml: not YAML: 'window' is set twice"),
            ("windw: 3", "windw: unknown setting 'windw'"),
        ],
    )
    def test_refusals(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_recipe("a.yaml")

    def test_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="expected a YAML text file, got bytes that are not UTF-8"):
            load_recipe("a.yaml")

    def test_unknown_recipe(self) -> None:
        with pytest.raises(UnknownNameError) as caught:
            load_recipe("lolcat")
        assert str(caught.value).startswith(
            "unknown recipe 'lolcat'. Did you mean 'lolcats'? Known: equipoise, hedgecats, "
        )
        assert "base" not in str(caught.value)

    def test_abstract_recipe(self, tmp_path: Path) -> None:
        with pytest.raises(
            ConfigError, match=r"base is not a recipe itself .* Choose one of equipoise, hedgecats, "
        ):
            load_recipe("base")
