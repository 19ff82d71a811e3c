"""util/json_reader.py: JSON of any origin is used, or refused in words."""

from pathlib import Path

import pytest

from util.json_reader import check_schema, read_json


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"n": 3, "x": 1, "names": ["a"], "inner": {"y": None}}, None),
        ({"n": True, "x": 1, "names": []}, "n is True, expected a whole number"),
        ({"n": 3, "x": 10**400, "names": []}, "expected a finite number"),
        ({"n": 3, "x": 1, "names": ["a", 5]}, "an entry of names is 5, expected a text"),
        ({"n": 3, "x": 1, "names": [], "inner": {"y": "z"}}, "y is 'z', expected a or null"),
        ({"n": 3, "x": 1}, "it lacks names"),
        ([], r"it is \[\], expected an object"),
    ],
)
def test_schemas(value: object, words: str | None) -> None:
    schema = {"n": int, "x": float, "names": [str], "inner?": {"y": ("a", None)}}
    if words is None:
        check_schema(value, schema)
    else:
        with pytest.raises(ValueError, match=words):
            check_schema(value, schema)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff{}", "no text in UTF-8"),
        (b"[" * 10**5, "nested too deep"),
        (b"[" * 60 + b"]" * 60, "nested too deep"),
        (b"[1" + b"0" * 400 + b"]", "has 401 digits"),
        (b" " * 200, "it has 101 bytes, more than 100"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "x.json", list, **({"largest": 100} if "101" in words else {}))
