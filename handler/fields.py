"""Reads a frozen dataclass of options from a mapping that came from outside.

The dataclass is the one statement of what is allowed: types from its annotations, limits from
each field's metadata (`minimum`, `above`, `maximum` of numbers, `longest` of strings). Recipes and
REST requests are both read here, so both answer mistakes in the same words.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

Options = TypeVar("Options")


class FieldError(ValueError):
    """One field is wrong. `field` is its dotted name; the message names the value and what is
    allowed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


def read(cls: type[Options], given: object, where: str = "") -> Options:
    """The instance of dataclass `cls` that `given` describes.

    Args:
        given: what a JSON or YAML parser returned.
        where: dotted name of the place of `given`, for messages.

    Raises:
        FieldError: a field that is unknown, missing, of the wrong type or out of its range.
    """
    if not isinstance(given, Mapping):
        problem = f"got {shown(given)}; allowed: a mapping of options"
        raise FieldError(where or "the whole", problem)
    hints = hints_of(typing.cast(Any, cls))
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            raise FieldError(dotted(where, named(key)), unknown(str(key), list(fields)))
    values: dict[str, Any] = {}
    for name, f in fields.items():
        if name in given:
            values[name] = value_of(hints[name], given[name], f.metadata, dotted(where, name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise FieldError(dotted(where, name), f"missing; allowed: {allowed(hints[name], {})}")
    try:
        return cls(**values)
    except FieldError:
        raise
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        raise FieldError(dotted(where, name), problem) from None


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass' fields; resolving them takes as long as tokenizing a sentence."""
    return typing.get_type_hints(cls)


def value_of(
    hint: Any, given: object, limits: Mapping[str, Any], where: str, words: str = ""
) -> Any:
    """`given` as a value of type `hint` within `limits`, which are `words`; see `read`."""
    words = words or allowed(hint, limits)
    wrong = FieldError(where, f"got {shown(given)}; allowed: {words}")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if given is None and type(None) in inner:
            return None
        (hint,) = (h for h in inner if h is not type(None))
        return value_of(hint, given, limits, where, words)
    if origin is Literal:
        if not isinstance(given, str) or given not in inner:
            raise wrong
        return given
    if origin is tuple:  # of any length
        if not isinstance(given, (list, tuple)):
            raise wrong
        return tuple(
            value_of(inner[0], one, limits, f"{where}[{i}]") for i, one in enumerate(given)
        )
    if dataclasses.is_dataclass(hint):
        return read(typing.cast(type, hint), given, where)
    if hint is float and isinstance(given, int) and not isinstance(given, bool):
        try:
            given = float(given)
        except OverflowError:
            raise wrong from None
    if type(given) is not hint:  # bool is an int, but True is no number here
        raise wrong
    if isinstance(given, str) and len(given) > limits.get("longest", len(given)):
        raise wrong
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        if isinstance(given, float) and not math.isfinite(given):
            raise wrong
        low, above, high = (limits.get(k) for k in ("minimum", "above", "maximum"))
        if (
            (low is not None and given < low)
            or (above is not None and given <= above)
            or (high is not None and given > high)
        ):
            raise wrong
    return given


def allowed(hint: Any, limits: Mapping[str, Any]) -> str:
    """What a field of type `hint` within `limits` may hold, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if h is type(None) else allowed(h, limits) for h in inner)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in inner)
    if origin is tuple:
        return f"a list, each of it {allowed(inner[0], limits)}"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(f.name for f in dataclasses.fields(hint))
    if hint is bool:
        return "true or false"
    if hint is str:
        longest = limits.get("longest")
        return f"a string of at most {longest} characters" if longest else "a string"
    words = "an integer" if hint is int else "a number"
    low, above, high = (limits.get(k) for k in ("minimum", "above", "maximum"))
    if above is not None:
        words += f" above {above}"
    if low is not None and high is not None:
        return f"{words} from {low} to {high}"
    if low is not None:
        words += f" of at least {low}"
    if high is not None:
        words += f"{' and' if above is not None else ''} of at most {high}"
    return words


def unknown(key: str, known: list[str]) -> str:
    """The problem with a key that no field has."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown option; {hint}allowed: {', '.join(known)}"


def dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def named(key: object) -> str:
    """A key from outside, as it is where it could be a name."""
    text = str(key)
    return text if text.isprintable() and len(text) <= 60 else shown(text)


def shown(value: object, limit: int = 60) -> str:
    """A value from outside, short and harmless enough for a message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    text = ascii(value)
    if len(text) <= limit:
        return text
    return f"{text[:limit]}... ({len(value) if isinstance(value, str) else len(text)} characters)"
