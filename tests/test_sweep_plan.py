"""What a sweep file asks for: rows, seeds and settings, and the mistakes told before anything runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.config import ConfigError
from equipoise.registry import UnknownNameError
from equipoise.sweep_plan import Cell, load_sweep, plan, sweep_names

SHIPPED = {
    "activation", "collapse", "diagnostic", "dropout", "feature-dimension", "gate-value", "objectives",
    "overlap", "window-size",
}  # fmt: skip


def write(folder: Path, name: str = "mine", **values: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


class TestPlan:
    def test_all_that_ship(self) -> None:
        assert set(sweep_names()) == SHIPPED

    @pytest.mark.parametrize("name", sorted(SHIPPED))
    @pytest.mark.parametrize("scale", [None, "demo"])
    def test_shipped_sweeps_resolve_at_either_scale(self, name: str, scale: str | None) -> None:
        config = load_sweep(name)
        cells = plan(config, scale=scale)
        assert len(cells) == len({cell.folder for cell in cells})
        assert {cell.seed for cell in cells} == {0, 1, 2}
        assert config.summary
        assert config.reference
        source = "yahma/alpaca-cleaned" if scale is None else "stdlib"
        assert {cell.run.data.source for cell in cells} == {source}
        if config.published is not None:
            assert set(config.published.values) <= {cell.row for cell in cells}

    def test_the_papers_experiments(self) -> None:
        objectives = {cell.row: cell.run for cell in plan(load_sweep("objectives"), seeds=[0])}
        assert {row: run.transfer and set(run.transfer.objectives) for row, run in objectives.items()} == {
            "weights": {"weights"}, "output": {"output"}, "hybrid-output": {"hybrid-output"},
            "untrained": None,
        }  # fmt: skip
        assert all(run.finetune is None for run in objectives.values())
        dropout = {
            cell.row: cell.run.finetune for cell in plan(load_sweep("dropout"), scale="demo", seeds=[0])
        }
        assert len(dropout) == 15
        stage = dropout["0.75-0.5, epochs=5"]
        assert stage is not None
        assert stage.window_dropout is not None
        assert stage.window_dropout.probabilities == (0.75, 0.5)
        assert (stage.epochs, stage.max_steps) == (5, None)
        maps = {
            cell.row: cell.run.hybrid and cell.run.hybrid.feature_map
            for cell in plan(load_sweep("activation"))
        }
        assert maps == {"softmax": "hedgehog", "exp": "exp", "relu": "relu", "1+elu": "elu", "none": "none"}

    def test_what_all_share_adds_no_stage_or_branch(self) -> None:
        runs = {cell.row: cell.run for cell in plan(load_sweep("diagnostic"), scale="demo", seeds=[0])}
        hedgehog, untrained, window = runs["hedgehog"], runs["lolcats untrained"], runs["swa-sinks"]
        assert hedgehog.hybrid is not None
        assert hedgehog.hybrid.window is None
        assert hedgehog.finetune is not None
        assert hedgehog.finetune.early_stopping is None
        assert untrained.transfer is None
        assert untrained.finetune is None
        assert window.transfer is None
        assert window.hybrid is not None
        assert (window.hybrid.feature_map, window.hybrid.window) == (None, 64)

    def test_layers_of_settings(self, tmp_path: Path) -> None:
        name = write(
            tmp_path, recipe="ssd", seeds=[4, 7], base={"hybrid.window": 8, "finetune.rank": 2},
            variants=[{"name": "a"}, {"name": "b", "recipe": "zero-shot", "set": {"finetune.rank": 3}}],
            axes={"hybrid.gate_value": [0.3, 0.7], "transfer.objectives": {"out": {"output": 5.0}}},
            scales={"small": {"hybrid.window": 16}},
        )  # fmt: skip
        config = load_sweep(name)
        cells = plan(
            config, scale="small", data="text.txt", assignments=["finetune.alpha=4", "hybrid.sinks=2"]
        )
        assert [(cell.row, cell.seed) for cell in cells][:5] == [
            ("a, gate_value=0.3, out", 4), ("a, gate_value=0.7, out", 4), ("b, gate_value=0.3, out", 4),
            ("b, gate_value=0.7, out", 4), ("a, gate_value=0.3, out", 7),
        ]  # fmt: skip
        first, added = cells[0].run, cells[2].run
        assert first.hybrid is not None
        assert first.transfer is not None
        assert first.finetune is not None
        assert added.finetune is not None
        assert (first.hybrid.window, first.hybrid.sinks, first.hybrid.gate_value) == (16, 2, 0.3)
        assert first.transfer.objectives == {"output": 5.0}  # replaced, not merged
        assert (first.finetune.rank, first.finetune.alpha, added.finetune.rank) == (2, 4, 3)
        assert first.data.source == "text.txt"
        assert first.name == "a, gate_value=0.3, out"
        assert plan(config, seeds=[1])[0].seed == 1

    def test_files_derive_from_files_and_shipped_sweeps(self, tmp_path: Path) -> None:
        write(tmp_path, "parent", extends="activation", seeds=[5])
        config = load_sweep(write(tmp_path, "child", extends="parent.yaml", base={"hybrid.window": 4}))
        assert (config.name, config.seeds, config.judge) == ("child", (5,), "linear_alone")
        assert "demo" in config.scales
        write(tmp_path, "one", extends="two.yaml")
        with pytest.raises(ConfigError, match="in a circle"):
            load_sweep(write(tmp_path, "two", extends="one.yaml"))

    def test_the_file_in_the_documentation(self, tmp_path: Path) -> None:
        page = (Path(__file__).parents[1] / "docs" / "sweeps.md").read_text(encoding="utf-8")
        text = page.partition("```yaml\n")[2].partition("```")[0]
        (tmp_path / "rank.yaml").write_text(text, encoding="utf-8")
        cells = plan(load_sweep(str(tmp_path / "rank.yaml")), scale="demo")
        rows = {cell.row: cell.run for cell in cells}
        assert list(rows) == ["hedgecats, rank=4", "hedgecats, rank=16", "ssd, rank=4", "ssd, rank=16"]
        assert all(run.hybrid is not None and run.hybrid.window == 32 for run in rows.values())
        for name in SHIPPED:
            assert f"| `{name}` |" in page

    @pytest.mark.parametrize("name", ["activation", "objectives"])
    def test_the_committed_results(self, name: str) -> None:
        """The page's tables are those of the committed results, which are of the sweeps that ship."""
        docs = Path(__file__).parents[1] / "docs"
        page = (docs / "sweeps.md").read_text(encoding="utf-8")
        result = json.loads((docs / "results" / f"{name}.json").read_text(encoding="utf-8"))
        cells = plan(load_sweep(name), scale="demo")
        ran = {(row["name"], seed) for row in result["rows"] for seed in row["seeds"]}
        assert ran == {(cell.row, cell.seed) for cell in cells}
        assert {cell.run.transfer.max_steps for cell in cells if cell.run.transfer is not None} == {100}
        published = load_sweep(name).published
        assert published is not None
        for row in result["rows"]:
            alone = row["values"]["linear_alone"]
            low, high = alone["ci95"]
            assert f"| {row['name']} | {alone['value']:.1%} [{100 * low:.1f}, {100 * high:.1f}] |" in page
            assert row["published"] == published.values.get(row["name"])
            assert row["published"] is None or f"| {row['published']} (" in page

    def test_the_page_on_collapse(self, tmp_path: Path) -> None:
        """Its table is that of the committed results, and the sweep written out on it is one."""
        docs = Path(__file__).parents[1] / "docs"
        page = (docs / "research" / "01-is-collapse-universal.md").read_text(encoding="utf-8")
        result = json.loads((docs / "results" / "collapse.json").read_text(encoding="utf-8"))
        ran = {(row["name"], seed) for row in result["rows"] for seed in row["seeds"]}
        assert ran == {(cell.row, cell.seed) for cell in plan(load_sweep("collapse"), scale="demo")}
        for row in result["rows"]:
            alone, share = (row["values"][name] for name in ("linear_alone", "linear_share"))
            line = next(line for line in page.splitlines() if line.startswith(f"| {row['name']} |"))
            for value in (alone, share):
                low, high = (f"{100 * bound:.1f}".replace("-", "−") for bound in value["ci95"])
                assert f"| {value['value']:.1%} [{low}, {high}] |".replace("| -", "| −") in line
            assert f"| {row['values']['nll']['value']:.3f} |" in line
            assert all(f"{use} {count}/3" in line for use, count in row["use"].items())
        (tmp_path / "mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
        second = json.loads((docs / "results" / "collapse-taylor-convex.json").read_text(encoding="utf-8"))
        cells = plan(load_sweep(str(tmp_path / "mine.yaml")), scale="demo")
        assert [(cell.row, cell.seed) for cell in cells] == [
            (second["rows"][0]["name"], seed) for seed in range(3)
        ]
        assert f"alone {second['rows'][0]['values']['linear_alone']['value']:.1%} [28.1, 40.6]" in page

    def test_the_ranking_of_feature_maps_is_the_published_one(self) -> None:
        place = Path(__file__).parents[1] / "docs" / "results" / "activation.json"
        rows = json.loads(place.read_text(encoding="utf-8"))["rows"]
        assert [row["name"] for row in rows] == ["softmax", "exp", "relu", "1+elu", "none"]
        scores = [row["published"] for row in rows]
        assert scores == sorted(scores, reverse=True)

    @pytest.mark.parametrize(
        ("values", "told"),
        [
            ({"recipe": "ssd", "axis": {}}, "Did you mean 'axes'"),
            ({"recipe": "ssd", "base": {"hybrid.windw": 8}}, "Did you mean 'window'"),
            ({"recipe": "ssd", "axes": {"hybird.window": [8]}}, "Did you mean 'hybrid'"),
            ({"recipe": "ssd", "scales": {"s": {"finetune.ranks": 1}}}, "Did you mean 'rank'"),
            ({"recipe": "ssd", "variants": [{"name": "a", "recipee": "ssd"}]}, "variant 1: recipee"),
            (
                {"recipe": "ssd", "variants": [{"name": "a", "set": {"data.sauce": 1}}]},
                "Did you mean 'source'",
            ),
            ({"recipe": "ssd", "axes": {"hybrid.window": []}}, "has none"),
            ({"recipe": "ssd", "seeds": [1, 1]}, "different whole numbers"),
            ({"recipe": "ssd", "judge": "beauty"}, "judge"),
            ({"variants": [{"name": "a"}]}, "names no recipe"),
            ({"seeds": [1]}, "expected a recipe"),
        ],
    )
    def test_mistakes_in_a_file(self, values: dict[str, Any], told: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as error:
            load_sweep(write(tmp_path, **values))
        assert told in str(error.value)

    def test_mistakes_in_what_it_asks_for(self, tmp_path: Path) -> None:
        def planned(**values: Any) -> list[Cell]:
            return plan(load_sweep(write(tmp_path, **values)))

        with pytest.raises(UnknownNameError, match="Did you mean 'ssd'"):
            planned(recipe="sdd")
        with pytest.raises(UnknownNameError, match="feature map"):
            planned(recipe="ssd", base={"hybrid.feature_map": "tanh"})
        with pytest.raises(ConfigError, match=r"window=0: hybrid\.window"):
            planned(recipe="ssd", axes={"hybrid.window": [0]})
        with pytest.raises(ConfigError, match="stays softmax"):
            planned(recipe="lora-only")
        with pytest.raises(ConfigError, match="same name"):
            planned(recipe="ssd", variants=[{"name": "a b"}, {"name": "A-b"}])
        with pytest.raises(ConfigError, match="rank=4' and 'a, rank=8' have the same settings"):
            planned(recipe="ssd", variants=[{"name": "a", "train": False}], axes={"finetune.rank": [4, 8]})
        with pytest.raises(ConfigError, match="is an axis"):
            plan(load_sweep("activation"), assignments=["hybrid.feature_map=relu"])
        with pytest.raises(ConfigError, match="is an axis"):
            plan(load_sweep("activation"), assignments=["hybrid=null"])
        with pytest.raises(UnknownNameError, match="Did you mean 'activation'"):
            load_sweep("activations")
        with pytest.raises(UnknownNameError, match="scale"):
            plan(load_sweep("activation"), scale="huge")
        with pytest.raises(ConfigError, match="not a sweep itself"):
            load_sweep("base")
        with pytest.raises(ConfigError, match="cannot read"):
            load_sweep(str(tmp_path / "none.yaml"))
