"""Conversion of Hugging Face models: surgery, branch states, Auto classes, checkpoints."""
