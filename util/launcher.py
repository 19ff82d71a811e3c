"""What torchrun tells the processes that it starts, in environment variables."""

import os

LOWEST = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}  # also the value of one process by itself


def launched(name: str) -> int:
    """The value of the variable; ValueError if it is no number in its range, or missing among several processes."""
    text, lowest = os.environ.get(name), LOWEST[name]
    if text is None and name == "RANK" and launched("WORLD_SIZE") > 1:
        text = ""
    try:
        value = lowest if text is None else int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest or name == "RANK" and value >= launched("WORLD_SIZE"):
        what = f"the environment variable {name} is {text!r}, which is no number of at least {lowest}"
        what += f" and below WORLD_SIZE {os.environ.get('WORLD_SIZE', 1)}" if name == "RANK" else ""
        raise ValueError(f"{what}; torchrun sets it, without torchrun leave it and WORLD_SIZE unset")
    return value
