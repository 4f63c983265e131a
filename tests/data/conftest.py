"""A byte-level BPE tokenizer trained on the spot, and chat templates of the kinds in use."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MARKED_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen3: the last turn alone carries a thinking block.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT_TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN_TEMPLATE
)
TEMPLATES = {
    "marked": MARKED_TEMPLATE,
    "plain": PLAIN_TEMPLATE,
    "thinking": THINKING_TEMPLATE,
    "strict": STRICT_TEMPLATE,
}
CORPUS = ["def window(size):\n    return size", "the quick brown fox jumps over the lazy dog"] * 4


def build_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Without a chat template; it adds no special tokens itself."""
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """With the chat template that the test names by indirect parametrisation, or the plain one."""
    built = build_tokenizer()
    built.chat_template = TEMPLATES[getattr(request, "param", "plain")]
    return built
