"""Fixtures of all tests; the plain functions are in tests/helpers.py."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import write_image_folder

torch.set_num_threads(
    1
)  # tiny models gain nothing from more, and lose much where the cores are shared; the same sums on any machine


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/{china,flower}/00..05.png, 96x80 crops of photographs. Read only: shared by all tests."""
    return write_image_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """The lines that the project's logger writes during the test, INFO and above (it does not propagate, so caplog misses them)."""
    logger, handler = logging.getLogger("tokenbridge"), _Messages()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)
