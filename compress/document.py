"""YAML as data, each value with the file and line where it was written: no tag, no duplicate key, few aliases, little depth."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from compress.errors import RecipeError

MOST_BYTES = 256 * 1024
MOST_ALIASES = 8
MOST_DEPTH = 16


@dataclass(frozen=True)
class Located:
    """A YAML value and where it was written: `value` is a dict of Located, a list of Located, or a plain scalar."""

    value: typing.Any
    place: str


def read(path: Path) -> Located:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    if len(raw) > MOST_BYTES:
        raise RecipeError(f"{path}: {len(raw)} bytes is too large for a recipe; at most {MOST_BYTES} are read")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text (byte {error.start}); a recipe is a YAML file") from None
    return parse(text, lambda line: f"{path}:{line}: ")


def parse(text: str, place: Callable[[int], str]) -> Located:
    """Parses YAML as data: no tag, no duplicate key, few aliases, little depth. `place(line)` gives the prefix of an error."""
    try:
        aliases = depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = place(event.start_mark.line + 1)
            if getattr(event, "tag", None):
                raise RecipeError(f"{line}the tag '{event.tag}' is not allowed: a recipe is data only; remove it")
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if aliases > MOST_ALIASES:
                raise RecipeError(f"{line}more than {MOST_ALIASES} aliases (*name); write the values out")
            if depth > MOST_DEPTH:
                raise RecipeError(f"{line}nested deeper than {MOST_DEPTH} levels")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (ValueError, OverflowError) as error:  # of an escape that is no character
        raise RecipeError(f"{place(1)}not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise RecipeError(f"{place(mark.line + 1 if mark else 1)}not valid YAML: {problem}") from None
    return Located(None, place(1)) if node is None else _located(node, place)


def _located(node: yaml.Node, place: Callable[[int], str], depth: int = 0) -> Located:
    here = place(node.start_mark.line + 1)
    if depth > MOST_DEPTH * MOST_ALIASES:  # no finite tree is this deep: an alias stands inside its own anchor
        raise RecipeError(f"{here}an alias that contains itself")
    if isinstance(node, yaml.ScalarNode):
        return Located(_scalar(node, here), here)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(item, place, depth + 1) for item in node.value], here)
    pairs: dict[str, Located] = {}
    for key_node, value_node in node.value:
        line = place(key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(f"{line}a key must be one word")
        key = key_node.value
        if key in pairs:
            raise RecipeError(f"{line}key '{key}' is written twice")
        value = _located(value_node, place, depth + 1)
        pairs[key] = Located(value.value, line)  # the line of the key is what a reader looks for
    return Located(pairs, here)


def _scalar(node: yaml.ScalarNode, place: str):
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError, OverflowError):
        raise RecipeError(f"{place}cannot read the value '{node.value[:40]}'") from None
