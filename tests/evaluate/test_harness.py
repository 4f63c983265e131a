"""lm-eval on tiny hybrids: its answers against a direct computation, in every branch state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import equipoise
from benchmark_support import CHOICE, GENERATED, documents, write_task, write_tasks
from equipoise.config import ConfigError, HybridConfig
from equipoise.evaluate import harness
from equipoise.evaluate.failures import HarnessError
from equipoise.evaluate.harness import Benchmarks, EquipoiseLM, Seeds, load_benchmarks, score_state
from equipoise.evaluate.states import NAMES, branch_state
from equipoise.registry import UnknownNameError
from support import tiny_model, tiny_tokenizer

STATES = (
    "both",
    "window",
    "linear",
    "window_renormalised",
    "linear_renormalised",
    "none",
    "sinks",
    "softmax",
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def hybrid() -> Any:
    model = equipoise.hybridize(tiny_model(vocab_size=300, eos_token_id=2), HybridConfig(window=4))
    torch.manual_seed(1)
    for parameter in model.parameters():  # maps far from the identity, so that the branches disagree
        parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def lm() -> EquipoiseLM:
    return EquipoiseLM(hybrid(), tokenizer=tiny_tokenizer(), batch_size=3)


def tasks(folder: Path, *names: str, **settings: Any) -> Benchmarks:
    return load_benchmarks(names, include_path=folder, **settings)


def score(lm: EquipoiseLM, name: str, benchmarks: Benchmarks) -> Any:
    return score_state(lm, branch_state(name), benchmarks, watch=lambda answered, asked: None)


@torch.no_grad()
def likelihood(lm: EquipoiseLM, name: str, context: str, continuation: str) -> tuple[float, bool]:
    """Sum of log-probabilities of a continuation, and whether it is the likeliest; one row, no padding."""
    encode = lm.tokenizer.encode
    before, whole = len(encode(context)), torch.tensor([encode(context + continuation)])
    state = branch_state(name)
    with equipoise.branches(lm.model, state.state, reading=state.reading):
        logits = lm.model(whole).logits[0].double().log_softmax(-1)
    targets = whole[0, before:]
    rows = logits[before - 1 : -1]
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@torch.no_grad()
def expected_accuracy(
    lm: EquipoiseLM, name: str, lines: list[dict[str, Any]], *, prefix: str = ""
) -> tuple[list[float], list[float]]:
    """acc and acc_norm of each question; all options of all questions in one padded batch."""
    encode, state = lm.tokenizer.encode, branch_state(name)
    contexts = [f"{prefix}Q: {line['question']} A:" for line in lines for _ in line["options"]]
    options = [option for line in lines for option in line["options"]]
    rows = [torch.tensor(encode(f"{c} {o}")) for c, o in zip(contexts, options, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    with equipoise.branches(lm.model, state.state, reading=state.reading):
        logits = lm.model(padded, attention_mask=mask.long()).logits.double().log_softmax(-1)
    tokens = logits[:, :-1].gather(-1, padded[:, 1:, None])[..., 0]
    starts = [len(encode(context)) - 1 for context in contexts]
    sums = [float(tokens[i, start : lengths[i] - 1].sum()) for i, start in enumerate(starts)]
    plain: list[float] = []
    normalised: list[float] = []
    for line in lines:
        scores, sums = np.array(sums[: len(line["options"])]), sums[len(line["options"]) :]
        plain.append(float(np.argmax(scores) == line["answer"]))
        normalised.append(float(np.argmax(scores / [len(o) for o in line["options"]]) == line["answer"]))
    return plain, normalised


# ---- answers


def request(*args: object) -> Any:
    return SimpleNamespace(args=args, task_name=None)


def test_likelihoods_in_every_state_are_the_models_and_all_differ(lm: EquipoiseLM) -> None:
    asked = [(f"Q: {line['question']} A:", f" {line['options'][0]}") for line in documents(5, 2, seed=9)]
    found: dict[str, list[float]] = {}
    for name in STATES:
        lm.state = branch_state(name)
        answers = lm.loglikelihood([request(*pair) for pair in asked], disable_tqdm=True)
        direct = [likelihood(lm, name, *pair) for pair in asked]
        np.testing.assert_allclose([a[0] for a in answers], [d[0] for d in direct], rtol=1e-5)
        assert [a[1] for a in answers] == [d[1] for d in direct]
        found[name] = [a[0] for a in answers]
    for name in STATES:
        for other in STATES:
            assert name == other or not np.allclose(found[name], found[other], rtol=1e-3), (name, other)


@pytest.mark.parametrize(
    "states",
    [
        pytest.param(("both", "linear_renormalised", "softmax"), id="some"),
        pytest.param((*STATES, "softmax_lora"), id="all", marks=pytest.mark.slow),
    ],
)
def test_generation_in_a_left_padded_batch_is_that_of_single_prompts(
    lm: EquipoiseLM, states: tuple[str, ...]
) -> None:
    prompts = [f"Q: {line['question']} A:" for line in documents(3, 2, seed=10)]
    assert len({len(lm.tokenizer.encode(prompt)) for prompt in prompts}) == 3
    given = {"until": ["Q:"], "max_gen_toks": 5}
    texts: set[str] = set()
    for name in states:
        lm.state = state = branch_state(name)
        answers = lm.generate_until([request(prompt, dict(given)) for prompt in prompts], disable_tqdm=True)
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = torch.tensor([lm.tokenizer.encode(prompt)])
            with torch.no_grad(), equipoise.branches(lm.model, state.state, reading=state.reading):
                for _ in range(5):  # without a cache
                    tokens = torch.cat([tokens, lm.model(tokens).logits[:, -1:].argmax(-1)], 1)
            whole = lm.tokenizer.decode(tokens[0, -5:], skip_special_tokens=True)
            assert answer == whole.split("Q:")[0], name
        texts.add("\n".join(answers))
    assert len(texts) >= len(states) - 2  # softmax_lora is softmax here, where there are no adapters


def test_model_that_is_not_converted_runs_as_it_is(lm: EquipoiseLM) -> None:
    plain = EquipoiseLM(tiny_model(vocab_size=300), tokenizer=tiny_tokenizer())
    assert plain.state.name == "softmax"
    assert plain.loglikelihood([request("the quick", " fox")], disable_tqdm=True)[0][0] < 0
    with pytest.raises(ConfigError, match=r"window: this llama is not converted.*say softmax"):
        EquipoiseLM(tiny_model(vocab_size=300), "window", tokenizer=tiny_tokenizer())


def test_answers_that_are_no_numbers_are_an_error() -> None:
    model = hybrid()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "hybrid" in n).fill_(torch.nan)
    lm = EquipoiseLM(model, "softmax", tokenizer=tiny_tokenizer())
    assert (
        lm.loglikelihood([request("the quick", " fox")], disable_tqdm=True)[0][0] < 0
    )  # the donor has no maps
    lm.state = branch_state("linear")
    with pytest.raises(HarnessError, match="branch state linear: 1 of 1 log-likelihoods are not numbers"):
        lm.loglikelihood([request("the quick", " fox")], disable_tqdm=True)


def test_unknown_model_arguments_are_an_error() -> None:
    with pytest.raises(UnknownNameError, match=r"'brnch'.*Did you mean 'branch'"):
        EquipoiseLM(tiny_model(vocab_size=300), tokenizer=tiny_tokenizer(), brnch="window")
    with pytest.raises(UnknownNameError, match="unknown branch state 'windw'"):
        EquipoiseLM(tiny_model(vocab_size=300), "windw", tokenizer=tiny_tokenizer())
    assert get_model("equipoise") is EquipoiseLM


# ---- scores


@pytest.mark.parametrize("name", ["both", "window", "linear_renormalised", "none", "softmax"])
def test_multiple_choice_scores_are_those_of_the_direct_computation(
    lm: EquipoiseLM, folder: Path, name: str
) -> None:
    scores = score(lm, name, tasks(folder, "two", "four", "pair")).tasks
    assert list(scores) == ["two", "four", "pair_small", "pair_large"]
    for task, count, options, seed in (("two", 10, 2, 1), ("four", 10, 4, 3), ("pair_large", 9, 3, 5)):
        lines, metrics = documents(count, options, seed=seed), scores[task].metrics
        plain, normalised = expected_accuracy(lm, name, lines)
        np.testing.assert_array_equal(metrics["acc,none"].sums, plain)
        np.testing.assert_array_equal(metrics["acc,none"].weights, np.ones(count))
        np.testing.assert_array_equal(metrics["acc,none"].chance, np.full(count, 1 / options))
        assert scores[task].reported["acc,none"] == pytest.approx(np.mean(plain))
        assert ("acc_norm,none" in metrics) == (task == "four")
        if task == "four":
            np.testing.assert_array_equal(metrics["acc_norm,none"].sums, normalised)


def test_few_shot_examples_and_limit(lm: EquipoiseLM, folder: Path, tmp_path: Path) -> None:
    settings = CHOICE + "fewshot_config:\n  sampler: first_n\n"
    shots = documents(8, 2, seed=2)
    write_task(tmp_path, "shown", documents(10, 2, seed=1), settings, shots=shots)
    prefix = "".join(f"Q: {s['question']} A: {s['options'][s['answer']]}\n\n" for s in shots[:2])
    benchmarks = tasks(tmp_path, "shown", num_fewshot=2, limit=6)
    assert benchmarks.facts["shown"].num_fewshot == 2
    assert (benchmarks.facts["shown"].documents, benchmarks.facts["shown"].of) == (6, 10)
    found = score(lm, "both", benchmarks).tasks["shown"].metrics["acc,none"].sums
    expected, _ = expected_accuracy(lm, "both", documents(10, 2, seed=1)[:6], prefix=prefix)
    np.testing.assert_array_equal(found, expected)
    without = score(lm, "both", tasks(tmp_path, "shown", limit=6)).tasks["shown"]
    assert without.documents != score(lm, "both", benchmarks).tasks["shown"].documents


def test_examples_drawn_are_the_same_for_every_state_and_depend_on_the_seed(
    lm: EquipoiseLM, folder: Path
) -> None:
    benchmarks = tasks(folder, "two", num_fewshot=3)
    seen = [score(lm, name, benchmarks).tasks["two"].documents for name in ("both", "none", "both")]
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0])) == 10
    other = score(lm, "both", tasks(folder, "two", num_fewshot=3, seeds=Seeds.of(5)))
    assert other.tasks["two"].documents != seen[0]


def test_few_shot_by_task_or_group(folder: Path) -> None:
    benchmarks = tasks(
        folder, "two", "pair", "four", num_fewshot=1, fewshot_of={"pair": "0", "pair_small": "2"}
    )
    shots = {name: facts.num_fewshot for name, facts in benchmarks.facts.items()}
    assert shots == {"two": 1, "pair_small": 2, "pair_large": 0, "four": 1}
    with pytest.raises(UnknownNameError, match=r"unknown task in --num-fewshot 'piar'. Did you mean 'pair'"):
        tasks(folder, "pair", fewshot_of={"piar": "1"})
    with pytest.raises(ConfigError, match="expected whole numbers from 0 on, got 'many' for two"):
        tasks(folder, "two", fewshot_of={"two": "many"})


@pytest.mark.parametrize("name", ["both", "linear_renormalised", "softmax"])
def test_generated_answers_are_scored_and_guessing_gets_nothing(
    lm: EquipoiseLM, tmp_path: Path, name: str
) -> None:
    lines = documents(6, 2, seed=6)
    lm.state = branch_state(name)
    prompts = [request(f"Q: {line['question']} A:", {"until": ["Q:"], "max_gen_toks": 6}) for line in lines]
    said = lm.generate_until(prompts, disable_tqdm=True)
    for index in (0, 3):  # two of the six are to be answered with what the model says in this state
        lines[index]["options"][lines[index]["answer"]] = said[index]
    write_task(tmp_path, "told", lines, GENERATED)
    metric = score(lm, name, tasks(tmp_path, "told")).tasks["told"].metrics["exact_match,none"]
    expected = [float(a == line["options"][line["answer"]]) for a, line in zip(said, lines, strict=True)]
    np.testing.assert_array_equal(metric.sums, expected)
    assert sum(expected) == 2
    assert not metric.chance.any()


def test_prompts_go_through_the_chat_template_where_asked(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    lm = EquipoiseLM(hybrid(), tokenizer=tokenizer, batch_size=8)
    plain, templated = tasks(folder, "two"), tasks(folder, "two", chat_template=True)
    asked: list[str] = []
    encode = lm.tokenizer.encode
    lm.tokenizer.encode = lambda text, **settings: asked.append(text) or encode(text, **settings)  # type: ignore
    first = score(lm, "both", plain)
    assert not any("<user>" in text for text in asked)
    asked.clear()
    second = score(lm, "both", templated)
    assert all(text.startswith("<user>Q: ") for text in asked)
    assert all("<assistant>" in text for text in asked)
    assert first.tasks["two"].documents != second.tasks["two"].documents


MADE = """
import datasets

def documents(max_seq_lengths=(8,), pretrained=None, **others):
    lengths = [length for length in max_seq_lengths for _ in range(3)]
    lines = [{"input": "window " * n, "outputs": ["size"], "max_length": n} for n in lengths]
    return {"test": datasets.Dataset.from_list(lines)}

def score(document, results):
    return {"8": -1.0, str(document["max_length"]): float(len(results[0]) % 2)}

def mean(values):
    kept = [value for value in values if value != -1]
    return sum(kept) / len(kept) if kept else -1
"""


def test_tasks_that_make_their_data_at_several_lengths(lm: EquipoiseLM, tmp_path: Path) -> None:  # as RULER's
    (tmp_path / "made.py").write_text(MADE)
    metric = "  - {metric: '8', aggregation: !function made.mean, higher_is_better: true}\n"
    (tmp_path / "long.yaml").write_text(
        "task: long\ndataset_path: ''\ncustom_dataset: !function made.documents\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{input}}'\n"
        "doc_to_target: '{{outputs}}'\n"
        "process_results: !function made.score\ngeneration_kwargs: {until: [], max_gen_toks: 3}\n"
        f"metric_list:\n{metric}{metric.replace('8', '16')}metadata:\n  version: 1.0\n"
    )
    scores = score(lm, "both", tasks(tmp_path, "long", details={"max_seq_lengths": [8, 16]})).tasks["long"]
    assert list(scores.metrics) == ["8,none", "16,none"]
    assert list(scores.metrics["8,none"].weights) == [1, 1, 1, 0, 0, 0]
    assert list(scores.metrics["16,none"].weights) == [0, 0, 0, 1, 1, 1]
    assert list(score(lm, "both", tasks(tmp_path, "long")).tasks["long"].metrics) == ["8,none"]


def test_progress_is_told_of_every_request(lm: EquipoiseLM, folder: Path) -> None:
    told: list[tuple[int, int]] = []
    benchmarks = tasks(folder, "two", "told", limit=4)
    score_state(
        lm, branch_state("both"), benchmarks, watch=lambda answered, asked: told.append((answered, asked))
    )
    assert [answered for answered, _ in told] == list(range(1, 13))
    assert told[-1] == (12, 12)


# ---- tasks that cannot be used


def test_task_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_its_own(**settings: Any) -> TaskManager:  # reading lm-eval's 14,000 takes seconds
        return TaskManager(**{**settings, "include_defaults": False})

    monkeypatch.setattr(harness, "TaskManager", without_its_own)
    with pytest.raises(UnknownNameError) as caught:
        tasks(folder, "pair_smal")
    message = str(caught.value)
    assert "unknown task 'pair_smal'. Did you mean 'pair_small'?" in message
    assert f"Readable tasks in {folder}: four, pair, pair_large, pair_small, told, two." in message
    assert len(message) < 500  # not all of lm-eval's


def test_task_asked_for_twice(folder: Path) -> None:
    with pytest.raises(ConfigError, match="task pair_small is asked for twice, in pair and in pair_small"):
        tasks(folder, "pair", "pair_small")
    assert len(tasks(folder, "two", "two").entries) == 1


def test_task_with_data_on_the_hub_when_that_cannot_be_reached(tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(
        f"task: far\ndataset_path: someone/nothing\ntest_split: test\n{CHOICE}"
    )
    with pytest.raises(HarnessError, match=r"task far: its data cannot be fetched from the Hub .*HF_HOME"):
        tasks(tmp_path, "far")


def test_task_whose_data_is_not_there(tmp_path: Path) -> None:
    write_task(tmp_path, "lost", documents(4, 2, seed=1), CHOICE)
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(HarnessError, match="task lost: cannot be loaded: FileNotFoundError"):
        tasks(tmp_path, "lost")


def test_task_with_one_document(tmp_path: Path) -> None:
    write_task(tmp_path, "single", documents(1, 2, seed=1), CHOICE)
    with pytest.raises(HarnessError, match="task single: expected at least 2 documents"):
        tasks(tmp_path, "single")


def test_task_that_runs_code(tmp_path: Path, folder: Path) -> None:
    write_task(tmp_path, "risky", documents(4, 2, seed=1), CHOICE + "unsafe_code: true\n")
    with pytest.raises(HarnessError, match=r"task risky: it runs code.*confirm_run_unsafe_code"):
        tasks(tmp_path, "risky")


def test_task_without_a_score_by_document(lm: EquipoiseLM, tmp_path: Path) -> None:
    only_f1 = CHOICE.replace("acc\n    aggregation: mean", "f1\n    aggregation: f1")
    write_task(tmp_path, "corpus", documents(8, 2, seed=1), only_f1)
    with pytest.raises(HarnessError, match=r"task corpus: none of its scores \(f1,none\) is an average"):
        score(lm, "both", tasks(tmp_path, "corpus"))


def test_definition_and_data_are_told_apart(folder: Path, tmp_path: Path) -> None:
    def facts(lines: int, settings: str) -> Any:
        write_task(tmp_path, "one", documents(lines, 2, seed=1), settings)
        return tasks(tmp_path, "one", details={"pretrained": "somewhere"}).facts["one"]

    first, again, more = facts(5, CHOICE), facts(5, CHOICE), facts(6, CHOICE)
    changed = facts(5, CHOICE.replace("Q: ", "Question: "))
    assert first == again
    assert (more.definition, more.data == first.data) == (first.definition, False)
    assert (changed.definition == first.definition, changed.data) == (False, first.data)
    elsewhere = tasks(tmp_path, "one", details={"pretrained": "elsewhere"}).facts["one"]
    assert elsewhere == changed


def test_every_name_of_a_state_runs(lm: EquipoiseLM) -> None:
    for name in NAMES:
        lm.state = branch_state(name)
        answer = lm.loglikelihood([request("the quick", " fox")], disable_tqdm=True)
        assert json.dumps(answer[0][0])
