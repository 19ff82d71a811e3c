"""dataset/classes.py: numbers and names of classes in messages and on the command line."""

import pytest

from dataset.classes import class_label, labels_in_words, misleading_numbers, parse_classes

NAMES = ["tench", "gold fish", "a,b", "3", "a", "all"]


def test_labels():
    assert [class_label(i, NAMES) for i in (0, 2, 6, -1)] == [
        "class 0 = 'tench'",
        "class 2 = 'a,b'",
        "class 6",
        "class -1",
    ]
    assert labels_in_words([1, 1, 0], NAMES) == "class 1 = 'gold fish', class 0 = 'tench'"
    assert labels_in_words([{0: 0.25, 1: 0.75}], NAMES) == "0.25 x class 0 = 'tench' + 0.75 x class 1 = 'gold fish'"
    assert labels_in_words(range(10), ()).endswith("class 7 and 2 more")


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("4,0", [4, 0]),
        (" 4 , 0 ", [4, 0]),
        ("tench", [0]),
        ("tench, gold fish,1", [0, 1, 1]),
        ("a,b,a", [2, 4]),
        ("a,tench", [4, 0]),
        ("3", [3]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("tench,all", [0, 5]),
    ],
)
def test_classes_by_number_and_by_name(text, classes):
    assert parse_classes(text, 6, "classes", NAMES) == classes


@pytest.mark.parametrize(
    ("text", "names", "words"),
    [
        ("6", NAMES, r"classes: \[6\] not in \[0, 6\)"),
        ("-1", NAMES, r"classes: \[-1\] not in \[0, 6\)"),
        ("tensch", NAMES, r"no class is called 'tensch'; there is class 0 = 'tench'"),
        ("tench,", NAMES, "no class is called ''"),
        ("1_0", NAMES, "no class is called '1_0'"),
        ("tench", (), "takes numbers separated by commas, or all; got 'tench' .*no class names"),
    ],
)
def test_classes_that_do_not_exist(text, names, words):
    with pytest.raises(ValueError, match=words):
        parse_classes(text, 6, "classes", names)


def test_folders_named_with_numbers_are_sorted_as_text():
    assert not misleading_numbers([]) and not misleading_numbers(["0", "1"]) and not misleading_numbers(["00", "01"])
    assert not misleading_numbers(["10", "2012", "n2"])  # names, not numbers
    assert "1 class number" in misleading_numbers(["1", "n2"])
    ten = misleading_numbers(sorted(map(str, range(11))))
    assert "9 class numbers are not the folders' names: class 2 = '10', class 3 = '2', class 4 = '3', ..." in ten
    assert "2 class numbers" in misleading_numbers(["1", "2"])
