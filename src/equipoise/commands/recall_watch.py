"""Recall questions asked while a conversion trains. Training knows nothing of evaluation; verbs join them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.config import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.evaluate.recall_examples import Example
    from equipoise.train.watching import Watcher

DOCUMENTS = 50
"""Documents that texts are cut from."""
SEED = 1_000_003
"""Of the questions. Recall is reported on other texts and other draws, which must not choose the weights."""


class RecallWatcher:
    """Share of recall questions answered by both branches, and by the linear branch alone at weight 1.

    ``recall_beyond`` counts only items beyond the reach of stacked windows; undefined without any.

    Args:
        examples: questions and the texts to find the answers in.
        batch_size: texts at a time.
    """

    names = ("recall", "recall_linear", "recall_beyond")

    def __init__(self, examples: Sequence[Example], *, batch_size: int) -> None:
        self.examples, self.batch_size = examples, batch_size

    def __call__(self, model: PreTrainedModel, step: int) -> dict[str, float]:
        """See the class."""
        from equipoise.evaluate.recall_running import items_of, run_state, sight

        both, linear = (
            run_state(model, self.examples, state, batch_size=self.batch_size).right
            for state in ("both", "linear_renormalised")
        )
        seen = sight(model, "both")
        beyond = [seen.beyond(item) for _, item in items_of(self.examples)]
        return {
            "recall": float(both.mean()),
            "recall_linear": float(linear.mean()),
            "recall_beyond": float(both[beyond].mean()) if any(beyond) else float("nan"),
        }


def recall_watchers(run: RunConfig, donor: str) -> list[Watcher]:
    """The recall watcher of a recipe whose ``watch.recall`` asks for one, else none.

    Texts are of the training split, without which nothing could be held out from the evaluation.

    Raises:
        UnknownNameError, RecallError: a task that does not exist, or does not fit its length.
        CheckpointError, DataError: a donor or text that cannot be read.
    """
    asked = run.watch.recall if run.watch is not None else None
    if asked is None:
        return []
    from equipoise.data.shards import ShardedDocuments
    from equipoise.data.sources import load_documents
    from equipoise.evaluate.recall_examples import build_examples
    from equipoise.evaluate.recall_tasks import RecallSettings
    from equipoise.evaluate.recall_text import Haystack
    from equipoise.models.load import load_config, load_tokenizer

    tokenizer, source = load_tokenizer(donor), run.data
    column, subset = source.text_column, source.subset
    if source.streaming:
        documents = ShardedDocuments(source.source, subset=subset, text_column=column).first(DOCUMENTS)
    else:
        documents = load_documents(
            source.source, split="train", subset=subset, text_column=column, limit=DOCUMENTS
        )
    if "text" not in documents.column_names:  # conversations: questions are hidden in plain text
        documents = load_documents("stdlib", split="train", limit=DOCUMENTS)
    vocabulary = int(load_config(donor).get_text_config(decoder=True).vocab_size)
    examples = build_examples(
        asked.task, length=asked.length, count=asked.examples, seed=SEED, tokenizer=tokenizer,
        haystack=Haystack.of(documents["text"], tokenizer, vocabulary),
        settings=RecallSettings(
            needles=asked.needles, answer_words=asked.answer_words, wording=asked.wording
        ),
    )  # fmt: skip
    stage = run.finetune or run.transfer
    size = 8 if stage is None else stage.micro_batch_size or stage.batch_size
    return [RecallWatcher(examples, batch_size=size)]
