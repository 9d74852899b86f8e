# SPDX-License-Identifier: Apache-2.0
"""The part of JSON Schema that result.schema.json uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "null": (type(None),),
}
SAID = {"$schema", "$defs", "title"}  # that ask nothing of a value
KEYWORDS = SAID | {"$ref", "anyOf", "const", "type", "required", "properties", "additionalProperties", "items"}


def problem(value: Any, schema: Mapping[str, Any], whole: Mapping[str, Any], at: str = "the file") -> str | None:
    """The first rule that a value breaks, in words, or None.

    whole: the schema that has the definitions.
    """
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        problems = [problem(value, each, whole, at) for each in schema["anyOf"]]
        return None if None in problems else " or ".join(map(str, problems))
    if "const" in schema and value != schema["const"]:
        return f"{at} must be {schema['const']!r}, got {value!r}"
    if "type" in schema and not _is(value, schema["type"]):
        return f"{at} must be of type {schema['type']}, got {type(value).__name__}"
    if isinstance(value, list):
        children = [(each, schema.get("items", {}), f"{at}[{i}]") for i, each in enumerate(value)]
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        if missing := [name for name in schema.get("required", ()) if name not in value]:
            return f"{at} must have {', '.join(missing)}"
        if others is False and (unknown := [name for name in value if name not in known]):
            return f"{at} must have no {', '.join(unknown)}"
        children = [(each, known.get(name, others or {}), f"{at}.{name}") for name, each in value.items()]
    else:
        children = []
    return next((found for child in children if (found := problem(child[0], child[1], whole, child[2]))), None)


def _is(value: Any, types: str | list[str]) -> bool:
    names = [types] if isinstance(types, str) else types
    return not isinstance(value, bool) and any(isinstance(value, TYPES[name]) for name in names)
