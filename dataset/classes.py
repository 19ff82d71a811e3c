"""Class numbers and the names of the class folders that they were given to."""

import difflib
import re
from collections.abc import Mapping, Sequence

from util.options import ArgumentError

SHOWN = 8  # classes that a line of the log names


def class_label(number: int, names: Sequence[str]) -> str:
    """ "class 3 = 'tench'", or "class 3" where the name is not known."""
    return f"class {number} = {names[number]!r}" if 0 <= number < len(names) else f"class {number}"


def label_in_words(label: int | Mapping[int, float], names: Sequence[str]) -> str:
    """`class_label` of a class, or of each class of a mixture with its share."""
    if not isinstance(label, Mapping):
        return class_label(label, names)
    return " + ".join(f"{share:.3g} x {class_label(number, names)}" for number, share in label.items())


def labels_in_words(labels: Sequence[int | Mapping[int, float]], names: Sequence[str]) -> str:
    """The different labels, each once, the first SHOWN of them."""
    words = list(dict.fromkeys(label_in_words(label, names) for label in labels))
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more


def misleading_numbers(names: Sequence[str]) -> str:
    """A warning if folders are named with numbers that are not their class numbers, else "".

    Classes are sorted as text, as torchvision does: 0, 1, 10, 11, 2.
    """
    found = {number: name for number, name in enumerate(names) if name.isascii() and name.isdecimal()}
    limit = None if len(found) == len(names) else len(names)  # a year among words is no number of a class
    wrong = [n for n, name in found.items() if int(name) != n and (limit is None or int(name) < limit)]
    if not wrong:
        return ""
    examples = ", ".join(class_label(number, names) for number in wrong[:3])
    return (
        f"folders named with numbers are sorted as text, so {len(wrong)} class numbers are not the folders' names: "
        f"{examples}{', ...' if len(wrong) > 3 else ''}"
    )


def parse_classes(text: str, class_num: int, argument: str, names: Sequence[str] = ()) -> list[int]:
    """Class numbers of "207,360", of names such as "tench,goldfish", of both, or "all".

    A whole number is always a class number, also where a class has it as its name. A name may contain commas.
    ArgumentError if a number is not in [0, class_num), or a name is unknown.
    """
    if text == "all":
        return list(range(class_num))
    known, parts, classes = list(names)[:class_num], text.split(","), []
    while parts:
        if re.fullmatch(r"\s*[+-]?[0-9]+\s*", parts[0]):
            number, taken = int(parts[0]), 1
            if not 0 <= number < class_num:
                raise ArgumentError(argument, f"{argument}: [{number}] not in [0, {class_num}), the model's classes")
        else:
            number, taken = _named_class(parts, known, argument, text)
        classes.append(number)
        parts = parts[taken:]
    return classes


def _named_class(parts: Sequence[str], names: Sequence[str], argument: str, text: str) -> tuple[int, int]:
    """The class that the first parts name together, the most of them that do, and their number."""
    for taken in range(len(parts), 0, -1):
        name = ",".join(parts[:taken])
        for candidate in (name, name.strip()):
            if candidate in names:
                return names.index(candidate), taken
    if not names:
        takes = f"{argument} takes numbers separated by commas, or all; got {text!r}"
        raise ArgumentError(argument, f"{takes} (the checkpoint has no class names)")
    close = difflib.get_close_matches(parts[0].strip(), names, 3, 0.4) or names[:3]
    examples = ", ".join(class_label(names.index(name), names) for name in close)
    more = ", ..." if len(names) > len(close) else ""
    raise ArgumentError(argument, f"{argument}: no class is called {parts[0].strip()!r}; there is {examples}{more}")
