"""Files that anyone could hand over, made by a machine: recipes, headers and JSON of models, prompt states.

Through the command line: never a traceback, never "not foreseen", exit code 1 or 2, and nothing left behind.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from typer.testing import Result

from equipoise.config import RunConfig

from .conftest import Cli

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
# without shrinking: an example of a few lines is small enough, and a command line takes a while
PHASES = (Phase.explicit, Phase.generate)
quick = settings(
    max_examples=8, deadline=None, suppress_health_check=FIXTURES, derandomize=True, phases=PHASES
)
thorough = settings(quick, max_examples=60)


def check(done: Result, place: Path, before: set[str], *codes: int) -> None:
    """A sentence and an exit code; the directory is as it was."""
    assert done.exit_code in codes, (done.exit_code, done.output, done.exception)
    if done.exit_code:
        assert "error: " in done.stderr
        assert "Traceback" not in done.stderr
        assert "not foreseen" not in done.stderr, done.stderr
    assert files(place) == before


def files(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


# ---- recipes

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.dates(),
    st.sampled_from(["ssd", "hedgehog", "1e-4", "../x", "hf", "~", "0x", "\x00", "[", "*a", "&a x"]),
)  # fmt: skip
names = st.one_of(
    st.sampled_from([*RunConfig.model_fields, "extends", "abstract", "window", "rank", "source", "every"]),
    st.text(max_size=8),
)
values = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4))
)
BOMB = "a: &a [x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefghij", "bcdefghijk", strict=True)
)


def fuzz_recipe_files(cli: Cli, tmp_path: Path, text: bytes) -> None:
    place = tmp_path / "fuzz.yaml"
    place.write_bytes(text)
    before = files(tmp_path)
    check(cli("recipes", place), tmp_path, before, 0, 1, 2)


yaml_texts = st.one_of(
    st.dictionaries(names, values, max_size=5).map(lambda v: yaml.safe_dump(v).encode()),
    st.text(alphabet="abcé{}[]:,-&*!|>#'\"% \n\t\x00\x85�", max_size=60).map(str.encode),
    st.binary(max_size=40),
)
RECIPE_EXAMPLES = [
    BOMB.encode(), b"a: &a [*a]", b"[" * 3000, b"x: " + b"9" * 5000, b"d: 2001-99-99", b"? [1]\n: 2", b"",
    b"!!python/object/apply:os.system ['echo']", b"name: &n x\nsummary: *n\n", b"a: " + b"b" * (1 << 20),
    b"extends: fuzz.yaml", b"extends: ../../etc/passwd", b"extends: [1]", b"<<: 1",
    b"a: !!float x", b"a: !!int ''",
    b"a: !!binary '*'", b"a: !!timestamp x", b"a: 1:2:3", b"window: .nan", b"1: 2", b"{}: 3",
]  # fmt: skip


def with_examples(test: Any, name: str, found: list[Any]) -> Any:
    for one in found:
        test = example(**{name: one})(test)
    return test


test_recipe_files = quick(with_examples(given(text=yaml_texts)(fuzz_recipe_files), "text", RECIPE_EXAMPLES))
test_more_recipe_files = pytest.mark.slow(thorough(given(text=yaml_texts)(fuzz_recipe_files)))


@quick
@given(key=st.one_of(names, st.text(max_size=10)), value=st.text(max_size=20))
@example(key="hybrid.window", value=BOMB)
@example(key="data.source", value="[" * 3000)
def test_assignments(cli: Cli, tmp_path: Path, key: str, value: str) -> None:
    arguments = ("convert", tmp_path / "no-donor", "--recipe", "ssd", "--output", tmp_path / "out")
    check(cli(*arguments, "--set", f"{key}={value}", "--dry-run"), tmp_path, set(), 1, 2)


# ---- checkpoints


@pytest.fixture
def copy(donor: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(donor, tmp_path / "copy"))


def header(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with something in its header changed."""
    size = struct.unpack("<Q", content[:8])[0]
    described = json.loads(content[8 : 8 + size])
    name = draw.choice([n for n in described if n != "__metadata__"])
    entry = described[name]
    how = draw.randrange(9)
    if how == 0:
        entry["data_offsets"][draw.randrange(2)] = draw.choice([-1, 0, 1, 10**9, 2**63, "x", None])
    elif how == 1:
        entry["shape"] = draw.choice([[], [0], [2**40, 2**40], [-1], ["a"], [1.5], None])
    elif how == 2:
        entry["dtype"] = draw.choice(["F32", "I64", "BOOL", "F8_E4M3", "Z", "", 3])
    elif how == 3:
        del described[name]
    elif how == 4:
        described[draw.choice(["", "../x", name + ".x", "__metadata__"])] = entry
    elif how == 5:
        return struct.pack("<Q", draw.choice([0, 1, size - 1, size + 1, 2**63, 2**64 - 1])) + content[8:]
    elif how == 6:
        cut = draw.randrange(len(content))
        return content[:cut]
    elif how == 7:
        at = draw.randrange(8 + size)
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    else:
        described["__metadata__"] = draw.choice([{"a": 1}, [], "x", {"format": "pickle"}, {"format": None}])
    text = json.dumps(described).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def fuzz_headers(cli: Cli, donor: Path, tmp_path: Path, seed: int) -> None:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(donor, copy)
    draw = random.Random(seed)
    weights = copy / "model.safetensors"
    weights.write_bytes(header(draw, weights.read_bytes()))
    before = files(tmp_path)
    done = cli("convert", copy, "--recipe", "swa-sinks", "--output", tmp_path / "out")
    if done.exit_code == 0:  # a change without a meaning
        shutil.rmtree(tmp_path / "out")
    check(done, tmp_path, before, 0, 1, 2)


test_headers = quick(given(seed=st.integers(0, 10**6))(fuzz_headers))
test_more_headers = pytest.mark.slow(
    settings(thorough, max_examples=30)(given(seed=st.integers(0, 10**6))(fuzz_headers))
)


def mutated(draw: random.Random, value: Any) -> Any:
    """JSON with one value somewhere replaced, or taken out."""
    odd = [None, [], {}, "", "x", -1, 0, 1.5, 10**20, True, "../../etc/passwd", [[]], float("nan")]
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(draw, value[at]), *value[at + 1 :]]
    return draw.choice(odd)


@pytest.fixture
def converted(convert: Cli, tmp_path: Path) -> Path:
    assert convert("lora-only", output=tmp_path / "plain").exit_code == 0
    done = convert("ssd", "--set", "watch=null", output=tmp_path / "model")
    assert done.exit_code == 0, done.stderr
    return tmp_path / "model"


JSON = ("config.json", "generation_config.json", "lora/adapter_config.json", "tokenizer_config.json")


def fuzz_json(cli: Cli, converted: Path, name: str, seed: int) -> None:
    draw, path = random.Random(seed), converted / name
    whole = path.read_text(encoding="utf-8")
    try:
        text = json.dumps(mutated(draw, json.loads(whole)))
        path.write_text(text if draw.random() < 0.8 else text[: draw.randrange(len(text))], encoding="utf-8")
        before = files(converted)
        done = cli("generate", converted, "def", "--max-new-tokens", 1)
        check(done, converted, before, 0, 1, 2)
    finally:
        path.write_text(whole, encoding="utf-8")


test_json_of_models = quick(given(name=st.sampled_from(JSON), seed=st.integers(0, 10**6))(fuzz_json))
test_more_json_of_models = pytest.mark.slow(
    settings(thorough, max_examples=30)(
        given(name=st.sampled_from(JSON), seed=st.integers(0, 10**6))(fuzz_json)
    )
)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../outside.safetensors", "refused"),
        ("/etc/outside.safetensors", "refused"),
        ("..\\outside.safetensors", "refused"),
        ("..", "refused"),
        ("gone.safetensors", "found none"),
        (None, "'None'"),
    ],
)
def test_an_index_that_leads_elsewhere(
    cli: Cli, copy: Path, tmp_path: Path, shard: str | None, words: str
) -> None:
    shutil.copy(copy / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    before = files(tmp_path)
    done = cli("convert", copy, "--recipe", "swa-sinks", "--output", tmp_path / "out")
    check(done, tmp_path, before, 1)
    assert words.strip("'") in done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", 10**20), ("eos_token_id", [3, -(10**20)]), ("eos_token_id", "x"),
        ("pad_token_id", 2**31), ("bos_token_id", True), ("suppress_tokens", [1.5]),
    ],
)  # fmt: skip
def test_token_ids_that_no_tensor_holds(cli: Cli, copy: Path, tmp_path: Path, name: str, value: Any) -> None:
    place = copy / "generation_config.json"
    place.write_text(json.dumps({name: value}), encoding="utf-8")
    before = files(tmp_path)
    done = cli("generate", copy, "def", "--max-new-tokens", 1)
    check(done, tmp_path, before, 1)
    assert f"as {name}" in done.stderr
    place.write_text(json.dumps({"pad_token_id": -1, "eos_token_id": [2, 500]}), encoding="utf-8")
    check(cli("generate", copy, "def", "--max-new-tokens", 1), tmp_path, before, 0)


def test_a_converted_models_token_ids(cli: Cli, converted: Path) -> None:
    place = converted / "generation_config.json"
    place.write_text(json.dumps({"eos_token_id": 10**20}), encoding="utf-8")
    done = cli("generate", converted, "def", "--max-new-tokens", 1)
    check(done, converted, files(converted), 1)
    assert f"as eos_token_id in generation_config.json or config.json, got {10**20}" in done.stderr


# ---- prompt states


@pytest.fixture
def state(cli: Cli, converted: Path, tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    done = cli("state", "save", converted, "--text", "def window(size): return size", "--output", path)
    assert done.exit_code == 0, done.stderr
    return path


def fuzz_states(cli: Cli, converted: Path, state: Path, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    content = bytearray(state.read_bytes())
    size = struct.unpack("<Q", content[:8])[0]
    described = json.loads(content[8 : 8 + size])
    how = draw.randrange(4)
    if how == 0:
        own = json.loads(described["__metadata__"]["equipoise"])
        described["__metadata__"]["equipoise"] = json.dumps(mutated(draw, own))
        text = json.dumps(described).encode()
        changed = struct.pack("<Q", len(text)) + text + bytes(content[8 + size :])
    elif how == 1:
        changed = bytes(content[: draw.randrange(len(content))])
    elif how == 2:
        changed = header(draw, bytes(content))
    else:
        content[draw.randrange(8 + size, len(content))] ^= 1 << draw.randrange(8)
        changed = bytes(content)
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(changed)
    before = files(tmp_path)
    done = cli("state", "continue", converted, path, "x", "--max-new-tokens", 1)
    check(done, tmp_path, before, 0, 1, 2)
    assert done.exit_code or how in (0, 2)  # a change of the tensors is always noticed
    check(cli("state", "show", path), tmp_path, before, 0, 1, 2)


test_prompt_states = quick(given(seed=st.integers(0, 10**6))(fuzz_states))
test_more_prompt_states = pytest.mark.slow(
    settings(thorough, max_examples=30)(given(seed=st.integers(0, 10**6))(fuzz_states))
)
