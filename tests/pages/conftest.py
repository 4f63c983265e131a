"""One browser for all tests of pages, where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chromium import NAMES, Browser, executable


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = executable()
    if program is None:
        pytest.skip(f"no browser found ({', '.join(NAMES)}, or EQUIPOISE_CHROMIUM=PATH): install Chromium")
    with Browser(program) as running:
        yield running
