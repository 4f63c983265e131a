"""The demo's donor: a Llama of 0.9M parameters, trained on the spot on Python's sources and cached."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from equipoise import __version__
from equipoise.data.packing import collate, pack_documents
from equipoise.data.sources import load_documents
from equipoise.data.token_cache import default_cache_dir
from equipoise.files import move_directory
from equipoise.train.progress import ProgressReport

CONTEXT = 256


@dataclass(frozen=True)
class DonorSettings:
    """The donor: a Llama of 0.9M parameters, good enough after a few minutes to show collapse and repair."""

    vocabulary: int = 1024
    tokenizer_files: int = 200
    hidden_size: int = 128
    intermediate_size: int = 344
    layers: int = 4
    heads: int = 4
    steps: int = 450
    batch_size: int = 16
    learning_rate: float = 8e-3
    embedding_learning_rate: float = 4e-3
    seed: int = 0


def cached_donor(settings: DonorSettings, console: Console) -> Path:
    """Directory of the donor for these settings and this standard library, trained if it is not there yet."""
    documents = load_documents("stdlib", split="train")
    digest = hashlib.sha256(json.dumps([asdict(settings), CONTEXT, torch.__version__, __version__]).encode())
    for text in documents["text"]:
        digest.update(text.encode())
    place = default_cache_dir() / "donors" / digest.hexdigest()[:16]
    if (place / "config.json").is_file():
        console.print(f"donor: {place} (cached)", soft_wrap=True)
        return place
    tokenizer = train_tokenizer(documents["text"][: settings.tokenizer_files], settings.vocabulary)
    model = train_donor(settings, tokenizer, console)
    staging = place.with_name(place.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    move_directory(staging, place)
    return place


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with an end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def train_donor(
    settings: DonorSettings,
    tokenizer: PreTrainedTokenizerFast,
    console: Console,
    *,
    documents: Dataset | None = None,
    kv_heads: int | None = None,
) -> LlamaForCausalLM:
    """Train a donor from scratch on packed rows with transformers' Trainer.

    ``documents`` in place of the standard library, and fewer key/value heads than heads, are for research.
    """
    set_seed(settings.seed)
    special: Any = tokenizer
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary, hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, num_key_value_heads=kv_heads or settings.heads,
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=special.eos_token_id, pad_token_id=special.pad_token_id,
        )
    )  # fmt: skip
    documents = load_documents("stdlib", split="train") if documents is None else documents
    rows = pack_documents(documents, tokenizer, context_length=CONTEXT, seed=settings.seed)
    arguments = TrainingArguments(
        output_dir=str(default_cache_dir() / "donors" / "trainer"), max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size, learning_rate=settings.learning_rate,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=settings.steps // 15,
        lr_scheduler_kwargs={"num_decay_steps": settings.steps // 3}, max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(), seed=settings.seed, remove_unused_columns=False, report_to=[],
        disable_tqdm=True, save_strategy="no", logging_steps=10, dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks: list[TrainerCallback] = [ProgressReport(console, "donor")]
    _initialise(model)
    trainer = Trainer(
        model, arguments, train_dataset=_PlainRows(rows), data_collator=collate, callbacks=callbacks,
        optimizers=(MuonAndAdamW(model, settings), None),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


@torch.no_grad()
def _initialise(model: LlamaForCausalLM) -> None:
    """Scale by fan-in, and residual outputs down by depth: 0.02 is far too small at this width."""
    depth = 2 * int(model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            residual = depth**-0.5 if "down_proj" in name or "o_proj" in name else 1.0
            parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5 * residual)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices, AdamW for embeddings and norms, behind one face for the Trainer.

    At this scale Muon needs about half the steps (figures in LOG.md); with a PyTorch older than 2.9, which
    has no Muon, AdamW does it all.
    """

    def __init__(self, model: torch.nn.Module, settings: DonorSettings) -> None:
        matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        known = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in known]
        embedding_rate, rate = settings.embedding_learning_rate, settings.learning_rate
        muon: Any = getattr(torch.optim, "Muon", None)
        first = (
            torch.optim.AdamW(matrices, lr=embedding_rate, betas=(0.9, 0.95))
            if muon is None
            else muon(matrices, lr=rate, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        )
        second = torch.optim.AdamW(others, lr=embedding_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.parts: list[torch.optim.Optimizer] = [first, second]
        super().__init__([*matrices, *others], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class _PlainRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Packed rows without segment ids: the donor's own class tells segments by positions that restart."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.rows[index].items() if name != "segment_ids"}
