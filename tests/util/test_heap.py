"""util/heap.py: freed memory stays with the process, or does not."""

import resource

import pytest
import torch

from util.heap import keep_freed_memory


def page_faults(rounds: int) -> int:
    """Page faults of filling 64 MiB that many times, in a tensor taken anew each time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.empty(2**24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_without_page_faults() -> None:
    if not keep_freed_memory():
        pytest.skip("malloc is not glibc's")
    page_faults(20)
    kept = page_faults(20)
    assert keep_freed_memory(False)
    assert page_faults(20) > 2 * kept + 100
