"""transformers' Auto classes know equipoise's models, whichever is imported first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import equipoise
from equipoise.models.auto import classes_of, donor_classes_of
from equipoise.models.families import SUPPORTED, ConversionError
from support import tiny_model


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "imports",
    [
        "import equipoise\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport equipoise",
        "from equipoise.models.adapters import add_lora\nfrom transformers import AutoModelForCausalLM",
        # a model's code, which loads transformers' tables halfway through its own import
        "import equipoise\nfrom transformers import LlamaForCausalLM, AutoModelForCausalLM",
        pytest.param(
            "from equipoise.layers.cache import HybridCache\nfrom transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import peft\nimport equipoise\nfrom transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "equipoise-first",
        "transformers-first",
        "adapters-first",
        "llama-between",
        "cache-first",
        "peft-first",
    ],
)
def test_import_orders(imports: str) -> None:
    code = f"""{imports}
from transformers import AutoConfig
config = AutoConfig.for_model("equipoise_llama")
print(type(config).__name__, AutoModelForCausalLM._model_mapping[type(config)].__name__)
"""
    done = python(code)
    assert done.stdout.split() == ["EquipoiseLlamaConfig", "EquipoiseLlamaForCausalLM"], done.stderr


def test_making_classes_says_nothing() -> None:
    """transformers warns of classes that generate and do not say so."""
    done = python("from equipoise.models.auto import classes_of; classes_of('llama')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_equipoise_the_error_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "equipoise_llama"}))
    done = python(f"from transformers import AutoConfig; AutoConfig.from_pretrained({str(tmp_path)!r})")
    assert done.returncode != 0
    assert "equipoise_llama" in done.stderr.splitlines()[-1] or "`equipoise_llama`" in done.stderr


@pytest.mark.parametrize("delta", [False, True])
def test_a_saved_directory_names_the_package_and_loads_with_it(tmp_path: Path, delta: bool) -> None:
    """transformers alone says what is missing; the same process loads the directory after the import."""
    tiny_model().save_pretrained(tmp_path / "donor")
    model = equipoise.hybridize(tiny_model(), equipoise.HybridConfig(window=5))
    equipoise.record_donor(model, str(tmp_path / "donor"))
    model.save_pretrained(tmp_path / "saved", delta=delta)
    described = tmp_path / "saved" / "config.json"
    with_code = json.loads(described.read_text())
    with_code["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    for folder in ("saved", "donor"):
        (tmp_path / folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    done = python(f"""from transformers import AutoConfig, AutoModelForCausalLM
place = {str(tmp_path / "saved")!r}
try:
    AutoModelForCausalLM.from_pretrained(place)
except ValueError as error:
    print("`equipoise_llama`" in str(error))
import equipoise
print(type(AutoModelForCausalLM.from_pretrained(place)).__name__)
# code that lies beside a model, and its configuration asks for, is not run
open({str(described)!r}, "w").write({json.dumps(with_code)!r})
print(type(AutoModelForCausalLM.from_pretrained(place)).__name__)
""")
    assert done.stdout.split() == ["True", *["EquipoiseLlamaForCausalLM"] * 2], done.stderr
    assert not (tmp_path / "ran").exists()


def test_nothing_of_a_model_is_imported_before_it_is_asked_for() -> None:
    done = python("""import sys, equipoise
from transformers import CONFIG_MAPPING, AutoConfig, LlamaForCausalLM
made = [name for name in sys.modules if name.startswith(("equipoise.models", "transformers.models.gemma2"))]
print(made, "equipoise_llama" in CONFIG_MAPPING.keys())
try:
    AutoConfig.for_model("equipoise_lama")
except ValueError as error:
    print(str(error)[:41])
""")
    assert done.stdout.splitlines() == ["[] False", "Unrecognized model identifier: equipoise_"], done.stderr


def test_every_family_has_classes() -> None:
    for family in SUPPORTED:
        config_class, model_class = classes_of(family)
        assert config_class.model_type == f"equipoise_{family}"
        assert model_class.config_class is config_class
        donor_config, donor_model = donor_classes_of(config_class.model_type)
        assert issubclass(config_class, donor_config)
        assert issubclass(model_class, donor_model)
        # `transformers serve` looks the class up by its name
        assert getattr(sys.modules["transformers"], model_class.__name__) is model_class


def test_not_a_converted_type() -> None:
    with pytest.raises(ConversionError, match="got model type 'llama'"):
        donor_classes_of("llama")


def test_public_names() -> None:
    for name in equipoise.__all__:
        assert getattr(equipoise, name) is not None
    assert set(equipoise.__all__) <= set(dir(equipoise))
    with pytest.raises(AttributeError, match="no attribute 'hybridise'"):
        equipoise.hybridise  # noqa: B018  # pyright: ignore
