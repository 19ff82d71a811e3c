"""Settings that own their command-line flags.

A dataclass field made by `option` states the default, the help text and the allowed values once. `add_options` makes
flags of the fields, and `read_options` builds the settings from the parsed flags. `check_options` checks the values
wherever the settings are built, so that the library and the command line refuse the same ones.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Sequence

LARGEST = 10**9  # of an option that has no bound of its own: more is a slip, and would not end
KINDS = (  # of an option's values
    (bool, "True or False"),
    (numbers.Integral, "a whole number"),
    (numbers.Real, "a number"),
    ((str, os.PathLike), "text"),
)


NAMED = re.compile(r"(?<= )\((\w+)\)(?!\.?\w)")  # an argument after a path, in a message


class ArgumentError(ValueError):
    """A value that an argument cannot take. `argument` is its name; `flag_names` adds the flag to the message."""

    def __init__(self, argument: str, message: str):
        super().__init__(message)
        self.argument = argument


class MissingFile(ArgumentError, FileNotFoundError):
    """A file that an argument names and that does not exist."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What `option` keeps in the field's metadata."""

    help: str
    choices: Sequence[object] | None
    lowest: float | None
    highest: float | None
    above: float | None
    nargs: int | str | None
    metavar: str | tuple[str, ...] | None
    const: object
    check: bool


def option(
    default: object,
    help: str = "",
    *,
    choices: Collection | None = None,
    lowest: float | None = None,
    highest: float | None = None,
    above: float | None = None,
    nargs: int | str | None = None,
    metavar: str | tuple[str, ...] | None = None,
    const: object = None,
    check: bool = True,
) -> typing.Any:
    """A dataclass field that is a flag too.

    lowest, highest: inclusive bounds of a number (of each, where there are several), LARGEST unless given; above: an
    exclusive lower one. Numbers must be finite. check=False leaves the bounds to the settings' own checks.
    """
    kept = Option(
        help, None if choices is None else tuple(choices), lowest, highest, above, nargs, metavar, const, check
    )
    return dataclasses.field(default=default, metadata={"option": kept})


def option_fields(settings: type) -> dict[str, dataclasses.Field]:
    """The fields that are flags, by name."""
    return {field.name: field for field in dataclasses.fields(settings) if "option" in field.metadata}


def _value_type(annotation: object) -> type:
    """int for `int`, `int | None` and `tuple[int, ...]`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) in (tuple, list, Sequence):
        annotation = typing.get_args(annotation)[0]
    return typing.get_origin(annotation) or annotation


def add_options(
    parser: argparse.ArgumentParser,
    settings: type,
    title: str = "",
    *,
    only: Collection[str] | None = None,
    **defaults: object,
) -> None:
    """Add a flag --NAME for each option of `settings`, in a group of its own if there is a title.

    only: the fields to add. defaults: published defaults where they differ from the library's.
    """
    group = parser.add_argument_group(title) if title else parser
    annotations = typing.get_type_hints(settings)
    for name, field in option_fields(settings).items():
        if only is not None and name not in only:
            continue
        kept: Option = field.metadata["option"]
        default = defaults.get(name, field.default)
        kind = _value_type(annotations[name])
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", default=default, help=kept.help)
            continue
        default = list(default) if isinstance(default, tuple) else default
        more = {"nargs": kept.nargs, "const": kept.const, "metavar": kept.metavar, "choices": kept.choices}
        more = {key: value for key, value in more.items() if value is not None}
        group.add_argument(f"--{name}", type=kind, default=default, help=kept.help or None, **more)


def read_options(settings: type, args: argparse.Namespace, **values: object) -> typing.Any:
    """`settings` built from the flags of its fields; `values` are the fields that are no flags, or that override one.

    A field whose flag the parser does not have keeps its default. Lists become tuples.
    """
    found = {name: getattr(args, name) for name in option_fields(settings) if hasattr(args, name)} | values
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in found.items()})


def check_options(settings: object) -> None:
    """ArgumentError naming the first field whose value is outside its choices or bounds, or not finite; for
    `__post_init__`.
    """
    kinds = _kinds(type(settings))
    for name, field in option_fields(type(settings)).items():
        kept, value = field.metadata["option"], getattr(settings, name)
        if value is None and not _takes_none(settings, name) and kinds[name] in (bool, int, float):
            raise ArgumentError(name, f"{name} must have a value, got None")
        for part in value if isinstance(value, (tuple, list)) else () if value is None else (value,):
            _check_kind(name, kinds[name], part)
            if kept.check:
                _check_value(name, kept, part)


@functools.cache
def _kinds(settings: type) -> dict[str, type]:
    hints = typing.get_type_hints(settings)
    return {name: _value_type(hints[name]) for name in option_fields(settings)}


def _takes_none(settings: object, name: str) -> bool:
    return type(None) in typing.get_args(typing.get_type_hints(type(settings))[name])


def _check_kind(name: str, kind: type, value: object) -> None:
    """ArgumentError for a value, from a file or from Python, that the command line could not give."""
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ArgumentError(name, f"{name} must be a number of at most 64 bits")
    base, words = next(((base, words) for base, words in KINDS if issubclass(kind, base)), (object, ""))
    if not isinstance(value, base) or isinstance(value, bool) != issubclass(kind, bool):
        raise ArgumentError(name, f"{name} must be {words}, got {value!r:.60}")


def _check_value(name: str, kept: Option, value: object) -> None:
    if kept.choices is not None and value not in kept.choices:
        raise ArgumentError(name, f"{name} {value!r} is unknown; choose from {', '.join(map(str, kept.choices))}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ArgumentError(name, f"{name} must be finite, got {value}")
    if kept.above is not None and not value > kept.above:
        raise ArgumentError(name, f"{name} must be above {kept.above}, got {value}")
    if kept.lowest is not None and value < kept.lowest:
        raise ArgumentError(name, f"{name} must be at least {kept.lowest}, got {value}")
    highest = LARGEST if kept.highest is None else kept.highest
    if value > highest:
        raise ArgumentError(name, f"{name} must be at most {highest}, got {value}")


@contextlib.contextmanager
def flag_names(parser: argparse.ArgumentParser, **renamed: str) -> Iterator[None]:
    """Within, errors leave with the names of flags: "FILE (argument)" becomes "FILE (--argument)", and an ArgumentError
    that does not name its flag gets it at the end. They leave as ValueError, FileNotFoundError or OSError.

    renamed: argument -> dest of its flag, where the two differ.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        flags = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
        flags |= {argument: flags[dest] for argument, dest in renamed.items()}
        text = NAMED.sub(lambda match: f"({flags.get(match[1], match[1])})", str(error))
        flag = flags.get(getattr(error, "argument", None))
        text += f" ({flag})" if flag is not None and flag not in text else ""
        if text == str(error) and not isinstance(error, ArgumentError):
            raise
        kind = next(kind for kind in (FileNotFoundError, ValueError, OSError) if isinstance(error, kind))
        raise kind(text) from error
