"""YAML as recipes are written in: plain values only, of a size a person could have written.

Nothing but strings, numbers, dates, lists and mappings can come of it; where it fails, a `yaml.YAMLError`
does. Needs nothing else of the package.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 100_000
"""Values with aliases written out: ten lines of aliases to aliases can stand for billions."""
MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string, and takes the last of two equal keys without a word; not here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                twice = f"{key.value!r} is set twice"
                raise yaml.constructor.ConstructorError(None, None, twice, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text: str) -> Any:
    """The value of one YAML document; None for an empty one.

    Raises:
        yaml.YAMLError: not YAML, more than plain values, too long or too deep, or an alias inside itself.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"expected at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    loader: Any = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, ())
        return _with_text_keys(loader.construct_document(node))
    except RecursionError:
        raise yaml.YAMLError(f"values are nested deeper than {MAX_DEPTH} levels") from None
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        # a date of the 40th of May, and such
        raise yaml.YAMLError(f"a value cannot be read ({error})") from None
    finally:
        loader.dispose()


def _with_text_keys(value: Any) -> Any:
    """``{1: x}`` -> ``{"1": x}``: settings have names."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(inner) for key, inner in value.items()}
    return [_with_text_keys(inner) for inner in value] if isinstance(value, list) else value


def _count(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node stands for, aliases written out."""
    if id(node) in above:
        raise yaml.YAMLError("an alias stands inside of what it names")
    if len(above) > MAX_DEPTH:
        raise yaml.YAMLError(f"values are nested deeper than {MAX_DEPTH} levels")
    if id(node) not in known:
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inside = node.value
        elif isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_count(one, known, (*above, id(node))) for one in inside)
    if known[id(node)] > MAX_VALUES:
        raise yaml.YAMLError(f"expected at most {MAX_VALUES:,} values, aliases written out")
    return known[id(node)]
