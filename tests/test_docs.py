"""docs/extending.md: every listing is a whole file, and runs as it stands."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise.layers.feature_maps import FEATURE_MAPS
from equipoise.ops import MIXING_RULES
from equipoise.train.losses import FINETUNE_OBJECTIVES
from equipoise.train.objectives import OBJECTIVES
from equipoise.train.recipes import load_recipe

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
LISTINGS = {
    body.splitlines()[0].removeprefix("# "): body
    for body in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
}
SOURCES = (
    "squared_relu.py", "relative_output.py", "reverse_distillation.py", "plain_sum.py", "half_dropout.yaml",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All listings as files to import from; the registries and modules are as before afterwards."""
    for registry in (FEATURE_MAPS, OBJECTIVES, FINETUNE_OBJECTIVES, MIXING_RULES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for name, body in LISTINGS.items():
        (tmp_path / name).write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in LISTINGS:
        sys.modules.pop(Path(name).stem, None)


def test_every_extension_with_a_test_each() -> None:
    tests = [f"test_{Path(name).stem}.py" for name in SOURCES]
    assert sorted(LISTINGS) == sorted([*SOURCES, *tests])
    assert len(re.findall(r"^```\w+$", TEXT, re.MULTILINE)) == len(LISTINGS)


@pytest.mark.parametrize("source", SOURCES)
def test_listing_passes_its_own_test(source: str, folder: Path) -> None:
    name = f"test_{Path(source).stem}"
    namespace = runpy.run_path(str(folder / f"{name}.py"))
    namespace[name]()


@pytest.mark.parametrize(
    ("source", "registry", "name"),
    [
        ("squared_relu.py", FEATURE_MAPS, "squared-relu"),
        ("relative_output.py", OBJECTIVES, "relative-output"),
        ("reverse_distillation.py", FINETUNE_OBJECTIVES, "reverse-distillation"),
        ("plain_sum.py", MIXING_RULES, "sum"),
    ],
)
def test_listing_registers_its_name_when_run(source: str, registry: object, name: str, folder: Path) -> None:
    assert name not in registry  # the listings of other tests are cleaned away
    runpy.run_path(str(folder / source))
    assert name in registry


def test_recipes_on_the_page_resolve(folder: Path) -> None:
    for source in SOURCES[:4]:
        runpy.run_path(str(folder / source))
    assert load_recipe(str(folder / "half_dropout.yaml")).name == "half_dropout"
    recipe = folder / "all.yaml"
    named = re.findall(r"Recipes name it [^`]*`([^`]+)`", TEXT)
    assert len(named) == 4
    for setting in named:
        recipe.write_text(f"extends: ssd\n{setting}\n", encoding="utf-8")
        load_recipe(str(recipe))
