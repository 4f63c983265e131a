"""Every snippet of README and docs/: commands parse, Python compiles, and the tutorials and guides run.

Models and texts are tiny stand-ins under the names that the pages use, a stage of training takes one step
of one row, and a generation is short; the rest of a command runs as it stands.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from equipoise import HybridConfig, hybridize
from equipoise.cli import app
from equipoise.config import load_yaml
from equipoise.data.layouts import layout_of
from snippets import Snippet, commands, pages, snippets
from support import tiny_model, tiny_tokenizer

ALL = [snippet for page in pages() for snippet in snippets(page)]
VERBS: Any = typer.main.get_command(app)
GLOBAL = {"-h", "--help", *(name for option in VERBS.params for name in option.opts)}

RUN = (
    "docs/tutorials/demo.md",
    "docs/tutorials/seven-billion.md",
    "docs/guides/your-own-data.md",
    "docs/guides/windows-and-schedules.md",
    "docs/where-it-runs.md",
    "README.md",
)
"""Pages whose snippets run here, in order, one page after another in its own folder."""

ELSEWHERE = {
    "docs/guides/larger-than-memory.md": "tests/train/test_layer_workers.py",
    "docs/extending.md": "tests/test_docs.py",
    "docs/command-line.md": "tests/planning/test_plan.py",
    "docs/guides/many-gpus.md": "tests/train/test_parallel.py",
    "docs/sharing.md": "tests/sharing/test_export.py",
    "docs/serve.md": "tests/serve/test_serve_page.py",
    "docs/guides/what-survives.md": "tests/train/test_faults.py",
    "docs/states.md": "tests/cli/test_states_page.py",
    "docs/how-to-tell.md": "tests/cli/test_how_to_tell.py",
    "docs/attribution.md": "tests/cli/test_attribute.py",
    "docs/evaluate.md": "tests/evaluate/test_harness.py",
    "docs/generation.md": "tests/models/test_assisted_generation.py",
    "docs/import-lolcats.md": "tests/cli/test_import_lolcats.py",
    "docs/native-hybrids.md": "tests/audit/test_native_verb.py",
    "docs/performance.md": "tests/cli/test_bench.py",
    "docs/recall.md": "tests/cli/test_recall.py",
    "docs/scale.md": "tests/planning/test_memory.py",
    "docs/sweeps.md": "tests/cli/test_sweep.py",
    "docs/research/01-is-collapse-universal.md": "tests/test_sweep_plan.py",
    "docs/research/02-equal-bytes.md": "tests/test_frontier.py",
}
"""Pages whose snippets, or whose verbs at least, run in tests of their own."""

NOT_RUN = {
    "bench": "times this machine",
    "demo": "minutes; tests/test_demo.py",
    "evaluate": "data sets of the Hub; tests/evaluate/test_harness.py",
    "import-lolcats": "files nobody may ship; tests/cli/test_import_lolcats.py",
    "recall": "a tokenizer of whole words; tests/cli/test_recall.py",
}
"""Verbs that are parsed only."""

DONORS = {
    "donor": "llama",
    "out/demo/donor": "llama",
    "meta-llama/Llama-3.2-1B": "llama",
    "Qwen2.5-7B-Instruct": "qwen2",
}
"""Donors of the pages that run, and the family of their stand-ins."""

SHELL = {".", "cd", "curl", "echo", "export", "git", "hf", "make", "pip", "python", "torchrun"}
"""Programs of others, taken as they stand."""


def equipoise_commands(snippet: Snippet) -> list[list[str]]:
    return [words[1:] for words in commands(snippet) if words[0] == "equipoise"]


def test_every_page_with_code_is_run_somewhere() -> None:
    assert {snippet.page for snippet in ALL} == {*RUN, *ELSEWHERE}
    for place in ELSEWHERE.values():
        assert (Path(__file__).parents[2] / place).is_file()


@pytest.mark.parametrize("snippet", [s for s in ALL if commands(s)], ids=lambda s: s.place)
def test_commands_parse(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb exists and takes these options; nothing but known programs stands beside it."""
    monkeypatch.chdir(tmp_path)
    Path("my-tasks").mkdir()  # has to exist to be an --include-path
    assert {words[0] for words in commands(snippet)} <= SHELL | {"equipoise"}
    for words in equipoise_commands(snippet):
        command, name = VERBS, "equipoise"
        while words and words[0] in getattr(command, "commands", {}):
            command, name, words = command.commands[words[0]], words[0], words[1:]
        if command is VERBS:  # `equipoise --show-completion bash`: parsing would already act
            assert words[0] in GLOBAL, f"{snippet.place}: no such verb or option: {words}"
        else:
            command.make_context(name, list(words))


@pytest.mark.parametrize("snippet", [s for s in ALL if s.language == "python"], ids=lambda s: s.place)
def test_python_compiles(snippet: Snippet) -> None:
    compile(snippet.text, snippet.place, "exec")


@pytest.mark.parametrize("snippet", [s for s in ALL if s.language == "yaml"], ids=lambda s: s.place)
def test_yaml_is_a_mapping(snippet: Snippet) -> None:
    assert load_yaml(snippet.text, source=snippet.place)


def test_languages_are_known() -> None:
    known = {"bash", "console", "python", "yaml", "json", "text", "bibtex", ""}
    assert {snippet.language for snippet in ALL} <= known


# ---- running


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Donors, a converted model and texts, under the names of the pages."""
    root = tmp_path_factory.mktemp("stand-ins")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m.role }}: "
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    size = {"vocab_size": 320, "max_position_embeddings": 8192, "eos_token_id": 2}
    for name, family in DONORS.items():
        tiny_model(family, **size).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name in ("out/demo/hedgecats", "out/hedgecats"):
        hybridize(tiny_model("llama", **size), HybridConfig(window=8)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    _write_texts(root)
    return root


def _write_texts(root: Path) -> None:
    text = [f"def window{i}(size):\n    return size + {i}\n" * 8 for i in range(400)]
    (root / "yahma" / "alpaca-cleaned").mkdir(parents=True)
    rows: dict[str, list[dict[str, Any]]] = {
        "corpus.jsonl": [{"text": t} for t in text[:120]],
        "validation.jsonl": [{"text": t[1:]} for t in text[:6]],
        "yahma/alpaca-cleaned/train.jsonl": [
            {"instruction": f"Write window{i}.", "input": "", "output": t} for i, t in enumerate(text)
        ],
        "chats.jsonl": [
            {"messages": [{"role": "user", "content": f"Name {i}."}, {"role": "assistant", "content": t}]}
            for i, t in enumerate(text[:120])
        ],
    }
    for name, records in rows.items():
        (root / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (root / "chat.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")


@pytest.fixture
def folder(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "page"
    shutil.copytree(stand_ins, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    return place


def shortened(words: list[str]) -> list[str]:
    """The command with one row in one step a stage, on a small text, for few new tokens; all else stands."""
    short = [re.sub(r"^((?:transfer|finetune)\.max_steps)=\d+$", r"\1=1", word) for word in words]
    short = ["corpus.jsonl" if word == "stdlib" else word for word in short]
    if "--max-steps" in short:
        short[short.index("--max-steps") + 1] = "1"
    if words[0] == "convert" and "swa-sinks" not in words:
        given = [word for word in words if "max_steps" in word]
        settings = ("batch_size",) if given else ("batch_size", "max_steps")
        stages = ((stage, setting) for stage in ("transfer", "finetune") for setting in settings)
        short += [part for stage, setting in stages for part in ("--set", f"{stage}.{setting}=1")]
    if words[0] in ("allocate", "convert") and "--recipe" not in words:
        short += ["--set", "allocation.rows=1", "--set", "data.context_length=128"]
    if "--max-new-tokens" in short:
        short[short.index("--max-new-tokens") + 1] = "8"
    return short


def serve(words: list[str], place: str) -> None:
    """Start the server on a free port, talk to it, and stop it as Ctrl-C does."""
    words = [*words, *([] if "--port" in words else ["--port", ""])]
    words[words.index("--port") + 1] = "0"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with subprocess.Popen(
        [sys.executable, "-m", "equipoise", *words], stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            said = list[str]()
            for line in server.stderr:
                said.append(line)
                if "serving on" in line:
                    break
            found = re.search(r"serving on (\S+)", said[-1] if said else "")
            assert found, f"{place}: {''.join(said)}"
            with opener.open(f"{found[1]}/models") as answer:
                name = json.load(answer)["data"][0]["id"]
            asked = {"model": name, "messages": [{"role": "user", "content": "def window("}], "max_tokens": 4}
            body, headers = json.dumps(asked).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{found[1]}/chat/completions", body, headers)
            with opener.open(request) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] >= 1
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=60) == 0
        finally:
            server.kill()


def run_command(words: list[str], place: str) -> None:
    if words[0] in {*NOT_RUN, *GLOBAL}:
        return
    if words[0] == "serve":
        serve(words, place)
        return
    if words[0] == "convert":  # a stand-in goes where the page makes the real one
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    done = CliRunner().invoke(app, shortened(words))
    assert done.exit_code == 0, f"{place}: equipoise {' '.join(words)}\n{done.output}"


def steps_of(page: str) -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
    """What running a page means, block by block; what one Python block defines the next ones have."""
    for snippet in snippets(page):
        for words in equipoise_commands(snippet):
            yield snippet.place, lambda _, w=words, s=snippet: run_command(w, s.place)
        if snippet.language == "python":
            code = compile(snippet.text, snippet.place, "exec")
            yield snippet.place, lambda names, code=code: exec(code, names)
        if snippet.language == "yaml":
            name = snippet.text.splitlines()[0].removeprefix("# ")
            yield snippet.place, lambda _, n=name, s=snippet: Path(n).write_text(s.text) and None
        if snippet.language == "json":
            for line in snippet.text.splitlines():
                yield snippet.place, lambda _, line=line: layout_of(json.loads(line)) and None


def given() -> dict[str, Any]:
    """What the README's Python takes for granted."""
    return {"inputs": tiny_tokenizer()("def window(", return_tensors="pt"), "donor": tiny_model("llama")}


@pytest.mark.slow
@pytest.mark.usefixtures("libraries_as_before")
@pytest.mark.parametrize("page", RUN)
def test_page_runs(page: str, folder: Path) -> None:
    names = given() if page == "README.md" else {}
    for _place, step in steps_of(page):
        step(names)


def test_arithmetic_of_the_7b_tutorial() -> None:
    """The sizes it prints, from the same shapes in one layer instead of 28."""
    from equipoise import reach, state_bytes

    page = (Path(__file__).parents[2] / "docs" / "tutorials" / "seven-billion.md").read_text(encoding="utf-8")
    shapes = {"hidden_size": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128}
    a_token = 28 * 2 * 4 * 128 * 2
    for heads, megabytes in {"query": 107, "key_value": 18}.items():
        model = tiny_model("llama", num_hidden_layers=1, **shapes)
        hybridize(model, HybridConfig(window=64, map_heads=heads), check=False)
        size = 28 * state_bytes(model)
        assert round(size / 1e6) == megabytes
        assert f"{megabytes} MB" in page
        assert re.search(rf"much as {size // a_token:,}\b", page)
        assert f"{28 * (reach(model) or 0):,} tokens" in page
