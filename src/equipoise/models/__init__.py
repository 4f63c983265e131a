"""Conversion of Hugging Face models: surgery, branch states, Auto classes, checkpoints."""

# First of all: it triggers the registration of equipoise's classes, which must not happen halfway through a
# sibling module that some import of transformers' Auto classes interrupts.
import transformers.models.auto.modeling_auto as _  # noqa: F401
