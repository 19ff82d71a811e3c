"""JSON of unknown origin: one reader, which checks size, depth and the schema that its user states."""

import contextlib
import json
import reprlib
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

LARGEST_JSON, DEEPEST_JSON = 2**24, 50  # bytes, and brackets within each other: no file of this project comes near


def parse_json(text: bytes | str, largest: int = LARGEST_JSON) -> object:
    """The content of a JSON text of unknown origin. ValueError if it is none, too large or too deep to be used.

    Whole numbers of more than 64 bits are refused: what is computed with them overflows.
    """
    if len(text) > largest:
        raise ValueError(f"it has {len(text):,} bytes, more than {largest:,}")
    try:
        content = json.loads(text, parse_int=_small_int)
        _check_depth(content, DEEPEST_JSON)
    except UnicodeDecodeError:
        raise ValueError("it is no text in UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return content


def _small_int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError(f"the number {digits[:12]}... has {len(digits)} digits")
    return number


def _check_depth(value: object, left: int) -> None:
    if left == 0:
        raise ValueError("it is nested too deep")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(part, (dict, list)):
            _check_depth(part, left - 1)


def read_json(path: str | Path, schema: object = dict, largest: int = LARGEST_JSON) -> typing.Any:
    """The content of a JSON file, as `schema` says (`check_schema`). ValueError (without the path) if it is another."""
    with open(path, "rb") as file:
        content = parse_json(file.read(largest + 1), largest)
    check_schema(content, schema)
    return content


def read_lines(path: str | Path, schema: object = dict) -> Iterator[typing.Any]:
    """The lines of a .jsonl file that are as `schema` says; others, such as the last one after a kill, are left out."""
    for line in Path(path).read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            check_schema(content := parse_json(line), schema)
            yield content


def check_schema(value: object, schema: object, name: str = "it") -> None:
    """ValueError, which says what is wrong, unless a value from a file is as `schema` says.

    schema: a type (float takes int and must be finite, int takes no bool), a word, None, a tuple of alternatives,
    [schema] for a list or {key: schema} for a dict, which may have other keys too; a key with "?" may be absent.
    """
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, part in schema.items():
            key, optional = key.removesuffix("?"), key.endswith("?")
            if key in value:
                check_schema(value[key], part, key)
            elif not optional:
                raise ValueError(f"{name} lacks {key}")
    elif isinstance(schema, list) and isinstance(value, list):
        for part in value:
            check_schema(part, schema[0], f"an entry of {name}")
    elif not conforms(value, schema):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {_schema_words(schema)}")


def conforms(value: object, schema: object) -> bool:
    """Whether `check_schema` accepts the value."""
    if isinstance(schema, tuple):
        return any(conforms(value, one) for one in schema)
    if isinstance(schema, (dict, list)):
        try:
            return type(value) is type(schema) and check_schema(value, schema) is None
        except ValueError:
            return False
    if schema is None or isinstance(schema, str):
        return value == schema
    if isinstance(value, bool):
        return schema is bool
    if schema is float and isinstance(value, (int, float)):
        return abs(value) < sys.float_info.max  # an int may be of any size
    return isinstance(value, schema)


def _schema_words(schema: object) -> str:
    if isinstance(schema, tuple):
        return " or ".join(map(_schema_words, schema))
    if isinstance(schema, str):
        return schema
    words = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", None: "null"}
    return (words | {list: "a list", dict: "an object"})[type(schema) if isinstance(schema, (list, dict)) else schema]
