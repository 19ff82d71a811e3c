"""What only a GPU can show: `make test-gpu` (docs/gpu.md). Skipped without one.

The same bodies run on the CPU with TOKENBRIDGE_TEST_DEVICE=cpu, which shows that they work.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from util import dist

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts: what deterministic products need

OVERRIDE = "TOKENBRIDGE_TEST_DEVICE"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or what TOKENBRIDGE_TEST_DEVICE says."""
    name = os.environ.get(OVERRIDE)
    if not name and not torch.cuda.is_available():
        pytest.skip(f"no GPU here ({OVERRIDE}=cpu runs the same checks on the CPU)")
    return dist.init(name or "cuda")


@pytest.fixture
def exact(device: torch.device) -> Iterator[None]:
    """Full float32: no TF32."""
    with dist.float32_precision(device):
        yield


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """report(line): printed at once, so that a run which is stopped has it."""
    terminal, capture = map(pytestconfig.pluginmanager.get_plugin, ("terminalreporter", "capturemanager"))
    if terminal is None:  # in a worker of pytest-xdist
        return print

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            terminal.write_line(f"\n  {line}")

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow checks (compilation, processes) last, so that a time limit costs those alone."""
    items.sort(key=lambda item: {"gpu", "slow"} <= {mark.name for mark in item.iter_markers()})
