"""The code in Markdown pages: where it stands, and what a shell would make of it. Imports no equipoise."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Snippet:
    """One fenced block."""

    page: str
    """Path from the repository's root."""
    line: int
    """Of the block's first line."""
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where to look, for messages."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """The README and every page of docs/, decision records and generated pages left out."""
    found = (path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    left_out = ("docs/adr/", "docs/reference/command-line.md")
    return ["README.md", *sorted(page for page in found if not page.startswith(left_out))]


def snippets(page: str) -> list[Snippet]:
    """A page's fenced blocks, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Snippet(page, text.count("\n", 0, match.start()) + 2, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


LAUNCHERS = ("torchrun", "accelerate", "srun")


def commands(snippet: Snippet) -> list[list[str]]:
    """The words of each command of a ``bash`` or ``console`` block, without comments and output.

    Of what a launcher starts, the command that it starts.
    """
    if snippet.language not in ("bash", "console"):
        return []
    text = snippet.text
    if snippet.language == "console":
        text = "\n".join(re.findall(r"^\$ (.*(?:\n {4}\S.*)*)", text, re.MULTILINE))
        text = re.sub(r"\n {4}", " ", text)
    lines = _expanded(text.replace("\\\n", " ").splitlines())
    return [_without_launcher(words) for line in lines for words in _simple_commands(line)]


def _without_launcher(words: list[str]) -> list[str]:
    if words[0] not in LAUNCHERS or "equipoise" not in words:
        return words
    return words[words.index("equipoise") :]


def _expanded(lines: list[str]) -> Iterator[str]:
    """The lines that are no assignments, with the variables assigned so far in their places."""
    variables: dict[str, str] = {}
    for line in lines:
        assignment = re.fullmatch(r"(\w+)=\"(.*)\"", line)
        if assignment is not None:
            variables[assignment[1]] = assignment[2]
        else:
            yield re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line)


def _simple_commands(line: str) -> Iterator[list[str]]:
    """The commands that `&&` joins, without variables set in front and without a `&` behind."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, "&&"]:
        if word != "&&":
            if word != "&" and (words or not re.match(r"[A-Z_]+=", word)):
                words.append(word)
        elif words:
            yield words
            words = []
