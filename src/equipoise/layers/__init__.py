"""A converted layer: feature maps, mixer, cache, and how they sit in transformers' attention interface."""

# First of all: it triggers the registration of equipoise's classes, which must not happen halfway through a
# sibling module that some import of transformers' Auto classes interrupts.
import transformers.models.auto.modeling_auto as _  # noqa: F401
