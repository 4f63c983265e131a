"""How hybrids take part in transformers' ``generate``: which cache they get, and which they refuse."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode

from equipoise.layers.cache import CacheError, HybridCache
from equipoise.layers.interface import adopt, mixers_of
from equipoise.layers.static_cache import StaticHybridCache

PAGED = (
    "paged continuous batching keeps keys and values in pages that any number of sequences share; a hybrid's "
    "state is one fixed-size sum per sequence, and there is nothing to page. Batch with generate() and left "
    "padding, or serve with cache.batch_select_indices between steps."
)
"""Why transformers' continuous batching is refused."""

_REASONS = {
    "quantized": "its decode state is constant in size already, and sums held in less than float32 lose "
    "tokens: in bfloat16, 60% of z by 4,000",
}


class HybridGeneration(PreTrainedModel, GenerationMixin):
    """The part of an ``Equipoise…ForCausalLM`` that ``generate`` talks to."""

    def make_cache(self, *, offload: bool = False) -> HybridCache:
        """A fresh decode cache for the branch state the model is in.

        Args:
            offload: keep the states of converted layers on the CPU between two steps.
        """
        config: Any = self.config
        return HybridCache(config.get_text_config(decoder=True), mixers_of(self), offload=offload)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any
    ) -> Any:
        kind, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if given is None and generation_config.use_cache is not False:
            given = model_kwargs["past_key_values"] = self._made_for(kind)
            if generation_config.is_assistant:  # drafts are taken back
                given.activate_past_recording()
            return None
        if given is not None and not isinstance(given, (HybridCache, tuple)):
            adopt(given, self.get_decoder())
        drafted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if drafted and isinstance(given, Cache) and given.get_seq_length() > 0:
            # transformers 5.23 hands all of the prompt over in the first step, whatever the cache holds: with
            # softmax attention too the tokens are wrong then, without a word
            raise CacheError(
                "expected an empty cache to decode with drafts, got one with "
                f"{given.get_seq_length()} tokens in it: transformers would read the prompt a second time. "
                "Leave past_key_values out, or decode without a draft."
            )
        inherited: Any = super()
        return inherited._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, *args
        )

    def _made_for(self, kind: str | None) -> HybridCache:
        if kind in (None, "dynamic"):
            return self.make_cache()
        if kind == "static":
            config: Any = self.config
            return StaticHybridCache(config.get_text_config(decoder=True), mixers_of(self))
        if kind == "offloaded":
            return self.make_cache(offload=True)
        reason = _REASONS.get(str(kind), "its decode state is constant in size, whatever is read")
        raise ValueError(
            f"cache_implementation={kind!r} does not apply to a hybrid: {reason}. Leave cache_implementation "
            "unset."
        )

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, past_key_values: Any = None, attention_mask: Any = None,
        inputs_embeds: Any = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """As in transformers. A static cache takes no mask in decoding: new tokens are real, and a mask that
        grows with every token would make every step another shape.
        """
        decoding = kwargs.get("next_sequence_length") == 1 and not kwargs.get("is_first_iteration")
        if decoding and isinstance(past_key_values, StaticHybridCache):
            attention_mask = None
        inherited: Any = super()
        # transformers looks for the name inputs_embeds in this signature
        return inherited.prepare_inputs_for_generation(
            input_ids, *args, past_key_values=past_key_values, attention_mask=attention_mask,
            inputs_embeds=inputs_embeds, **kwargs,
        )  # fmt: skip

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            NotImplementedError: always; says why.
        """
        raise NotImplementedError(PAGED)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as `init_continuous_batching` is."""
        raise NotImplementedError(PAGED)
