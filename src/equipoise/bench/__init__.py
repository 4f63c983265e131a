"""Benchmarks: the operators and whole models against what users would run instead, in one process."""
