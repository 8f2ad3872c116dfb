"""The JSON Schema (2020-12) of request and answer, made from the dataclass of the options."""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema(options: type, most_texts: int) -> dict[str, Any]:
    """`{"$defs": {"request", "answer", "error"}}`; a document that is valid here may still be
    refused for options that contradict each other or the model."""
    hypothesis = {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "score": {"type": "number"},
            "tokens": {"type": "array", "items": {"type": "string"}},
            "alignment": {"type": "array", "items": {"$ref": "#/$defs/alignment"}},
            "finish_reason": {"enum": ["eos", "length", "time"]},
        },
        "required": ["text", "finish_reason"],
        "additionalProperties": False,
    }
    pieces = {"type": "array", "items": {"type": "string"}}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    alignment = record(
        source=pieces, target=pieces,
        weights={"type": "array", "items": {"type": "array", "items": share}},
    )
    tokens = {"type": "integer", "minimum": 0}
    usage = record(source_tokens=tokens, target_tokens=tokens)
    usage["properties"]["cut_texts"] = {
        "type": "array", "items": tokens, "minItems": 1, "uniqueItems": True,
        "description": "indices of the texts of which a sentence was too long for the model and "
        "was translated in pieces; only with such texts",
    }
    answer = record(
        translations={
            "type": "array", "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/hypothesis"}},
        },
        model=record(name={"type": "string"}, version={"type": "string"}),
        usage=usage,
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": {
            "request": request(options, most_texts),
            "answer": answer,
            "hypothesis": hypothesis,
            "alignment": alignment,
            "error": record(
                code={"type": "integer"}, type={"type": "string"}, message={"type": "string"}
            ),
        },
    }


def record(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }


def request(options: type, most_texts: int) -> dict[str, Any]:
    text = {"type": "string", "pattern": r"\S"}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": most_texts}
    hints, told = typing.get_type_hints(options), descriptions(options)
    properties = {
        one.name: {
            **value(hints[one.name], one.metadata),
            "default": one.default,
            "description": told[one.name],
        }
        for one in dataclasses.fields(options)
    }
    return {
        "type": "object",
        "properties": {"text": {"anyOf": [text, texts]}, **properties},
        "required": ["text"],
        "additionalProperties": False,
    }


def value(hint: Any, limits: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one field: its type, and the limits that `handler.fields.read` checks."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [one for one in typing.get_args(hint) if one is not type(None)]
        return {"anyOf": [*(value(one, limits) for one in inner), {"type": "null"}]}
    if typing.get_origin(hint) is Literal:
        return {"enum": list(typing.get_args(hint))}
    words = {
        "minimum": "minimum", "above": "exclusiveMinimum", "maximum": "maximum",
        "longest": "maxLength",
    }
    return {"type": TYPES[hint], **{words[name]: limit for name, limit in limits.items()}}


def descriptions(options: type) -> dict[str, str]:
    """What the docstrings of a dataclass, and of those it extends, say of each field."""
    told: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        if dataclasses.is_dataclass(cls):
            fields = {one.name for one in dataclasses.fields(cls)}
            entries = re.findall(
                r"^    (\w+(?:, \w+)*): (.*(?:\n        .*)*)", cls.__doc__ or "", re.M
            )
            for names, text in entries:
                for name in names.split(", "):
                    if name in fields:
                        told[name] = " ".join(text.split())
    return told
