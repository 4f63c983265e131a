"""A converted layer: feature maps, mixer, cache, and how they sit in transformers' attention interface."""
