"""The registry: lookup, and what it says to a misspelt name."""

from __future__ import annotations

import pytest

from equipoise.registry import Registry, UnknownNameError, unknown_name


@pytest.fixture
def fruits() -> Registry[int]:
    registry: Registry[int] = Registry("fruit")
    registry.register("pear")(1)
    registry.register("apple")(2)
    return registry


def test_entries_are_found_by_name(fruits: Registry[int]) -> None:
    assert fruits["apple"] == 2
    assert "apple" in fruits
    assert "plum" not in fruits
    assert list(fruits) == ["apple", "pear"]
    assert len(fruits) == 2


def test_decorator_returns_what_it_files(fruits: Registry[int]) -> None:
    assert fruits.register("fig")(7) == 7


def test_misspelt_name(fruits: Registry[int]) -> None:
    with pytest.raises(UnknownNameError) as caught:
        fruits["aple"]
    assert str(caught.value) == "unknown fruit 'aple'. Did you mean 'apple'? Known: apple, pear."


def test_nothing_near(fruits: Registry[int]) -> None:
    with pytest.raises(ValueError, match=r"^unknown fruit 'xyz'\. Known: apple, pear\.$"):
        fruits["xyz"]


def test_nothing_known() -> None:
    assert str(unknown_name("fruit", None, [])) == "unknown fruit None. Known: none."


def test_a_name_is_given_once(fruits: Registry[int]) -> None:
    with pytest.raises(ValueError, match="fruit 'pear' is registered twice; give the new one another name"):
        fruits.register("pear")(3)
    assert fruits["pear"] == 1
