"""A typed name -> object table that answers a misspelt name with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError):
    """A name that is not in the table it was looked up in."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Build the error for ``name``: what came, the nearest known name, and all names expected."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")


class Registry(Generic[T]):
    """Objects of one kind by name.

    Attributes:
        kind: what the objects are, as error messages should call them ("feature map").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files an object under ``name``.

        Raises:
            ValueError: the name is taken.
        """

        def file(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice; give the new one another name.")
            self._entries[name] = entry
            return entry

        return file

    def __getitem__(self, name: str) -> T:
        """Look a name up.

        Raises:
            UnknownNameError: nothing is registered under it.
        """
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
