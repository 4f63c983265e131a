"""Verbs silence the libraries for their whole process; other tests share this one."""

from __future__ import annotations

from collections.abc import Iterator

import datasets
import pytest
import transformers


@pytest.fixture
def libraries_as_before() -> Iterator[None]:
    levels = transformers.logging.get_verbosity(), datasets.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(levels[0])
    datasets.logging.set_verbosity(levels[1])
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()
