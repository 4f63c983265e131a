"""Small tasks for lm-eval as files: YAML and JSON lines, nothing from the network."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ("window", "size", "return", "quick", "brown", "fox", "jumps", "the", "def", "value", "key", "over")


def documents(count: int, options: int, seed: int) -> list[dict[str, Any]]:
    """Questions with options of different lengths, and the place of the right one."""
    draw = random.Random(seed)
    return [
        {
            "question": " ".join(draw.choices(WORDS, k=draw.randint(6, 14))),
            "options": [" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) for _ in range(options)],
            "answer": draw.randrange(options),
        }
        for _ in range(count)
    ]


def write_task(
    folder: Path,
    name: str,
    lines: list[dict[str, Any]],
    settings: str,
    *,
    shots: list[dict[str, Any]] | None = None,
) -> None:
    """One task: NAME.yaml, NAME.jsonl, and NAME-train.jsonl where there are examples to show."""
    folder.mkdir(exist_ok=True, parents=True)
    files = {"test": write_lines(folder / f"{name}.jsonl", lines)}
    if shots:
        files["train"] = write_lines(folder / f"{name}-train.jsonl", shots)
    listed = "".join(f"    {split}: {path}\n" for split, path in files.items())
    train = "training_split: train\nfewshot_split: train\n" if shots else ""
    text = (
        f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n{listed}test_split: test\n{train}"
        f"{settings}metadata:\n  version: 1.5\n"
    )
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


CHOICE = """output_type: multiple_choice
doc_to_text: "Q: {{question}} A:"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
NORMALISED = (
    CHOICE
    + """  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
)
GENERATED = """output_type: generate_until
doc_to_text: "Q: {{question}} A:"
doc_to_target: "{{options[answer]}}"
generation_kwargs:
  until: ["Q:"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
GROUP = """group: pair
task: [pair_small, pair_large]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 1
"""


def write_tasks(folder: Path) -> Path:
    """`two` and `four` options, a group `pair` of 4 and 9 documents, and `told`, which is generated."""
    write_task(folder, "two", documents(10, 2, seed=1), CHOICE, shots=documents(8, 2, seed=2))
    write_task(folder, "four", documents(10, 4, seed=3), NORMALISED)
    write_task(folder, "pair_small", documents(4, 3, seed=4), CHOICE)
    write_task(folder, "pair_large", documents(9, 3, seed=5), CHOICE)
    write_task(folder, "told", documents(4, 2, seed=6), GENERATED)
    (folder / "pair.yaml").write_text(GROUP, encoding="utf-8")
    return folder
