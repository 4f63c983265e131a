"""What a library warned of, for a report rather than for the terminal."""

from __future__ import annotations

import logging
import re


class Notes(logging.Handler):
    """Collects what lm-eval warns of, each place in its code once."""

    _EXPECTED = ("num_fewshot", "Custom kwargs can be passed", "overrides existing task")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: dict[tuple[str, int], tuple[str, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Note a warning."""
        text = re.sub(r"\s+", " ", record.getMessage())
        if not any(words in text for words in self._EXPECTED):
            place = record.pathname, record.lineno
            first, count = self._seen.get(place, (text, 0))
            self._seen[place] = first, count + 1

    @property
    def texts(self) -> tuple[str, ...]:
        """The first wording of each, and how often it came."""
        return tuple(
            f"{text[:300]} ({count} times)" if count > 1 else text[:300]
            for text, count in self._seen.values()
        )
