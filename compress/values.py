"""Located values as the types that a dataclass declares, within what CHOICES and RANGES allow: the checks of one key."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence

from compress.config import CHOICES, RANGES
from compress.document import Located
from compress.errors import RecipeError, nearest

NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def keys_of(config_type: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_type)]


def config_of(config_type: type, pairs: dict[str, Located], section: str, also: Sequence[str] = ()):
    hints = typing.get_type_hints(config_type)
    allowed = [*also, *keys_of(config_type)]
    for key, value in pairs.items():
        if key not in allowed:
            close = nearest(key, allowed)
            raise RecipeError(f"{value.place}unknown key '{key}' in '{section}'; allowed: {', '.join(allowed)}{close}")
    values = {key: value_of(value, hints[key], section, key) for key, value in pairs.items() if key in hints}
    return config_type(**values)


def value_of(located: Located, hint, section: str, key: str):
    """The value as the type `hint` says, within what CHOICES and RANGES allow."""
    value, place = located.value, located.place
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise RecipeError(f"{place}key '{key}' has no value")
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [located]
        return tuple(value_of(item, str, section, key) for item in items)
    if isinstance(value, list | dict):
        raise RecipeError(f"{place}key '{key}' must be {_noun(kind)}, not a {type(value).__name__}")
    if kind is float and isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)  # YAML 1.1 takes 3e-4 for text: it wants 3.0e-4
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        quotes = ": put it in quotes" if kind is str else ""
        raise RecipeError(f"{place}key '{key}' must be {_noun(kind)}, not {value!r}{quotes}")
    allowed = CHOICES.get((section, key)) or CHOICES.get((key,))
    if allowed and value not in allowed:
        raise RecipeError(f"{place}key '{key}': '{value}' is not one of {', '.join(allowed)}{nearest(value, allowed)}")
    if kind in (int, float) and not _within(value, RANGES[key]):
        raise RecipeError(f"{place}key '{key}' must be {_range(RANGES[key])}, not {value!r}")
    return value


def _noun(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]


def _within(value: float, limits: tuple) -> bool:
    least, most, least_allowed, most_allowed = limits
    above = value >= least if least_allowed else value > least
    below = value <= most if most_allowed else value < most
    return above and below  # false for nan


def _range(limits: tuple) -> str:
    least, most, least_allowed, most_allowed = limits
    low = f"{least:g} or more" if least_allowed else f"above {least:g}"
    high = "" if math.isinf(most) else f" and at most {most:g}" if most_allowed else f" and below {most:g}"
    return low + high
