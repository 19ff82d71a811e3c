"""The background writer of util/checkpoint.py, random states, and stopping by signals (training/preempt.py)."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from training.preempt import StopRequest
from training.progress import duration
from util import checkpoint
from util.checkpoint import LAST, CheckpointWriter, numbered, read_file

CPU = torch.device("cpu")


def test_it_writes_in_the_background_and_never_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns while the file before it is being written; the next one waits for it."""
    real, running, most, go = checkpoint.atomic_save, 0, 0, threading.Event()

    def slow(content: dict, path: Path) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        go.wait(10)
        time.sleep(0.02)
        real(content, path)
        running -= 1

    monkeypatch.setattr(checkpoint, "atomic_save", slow)
    writer = CheckpointWriter(tmp_path)
    writer.save({"step": 1})
    assert running == 1 and not (tmp_path / LAST).exists()
    go.set()
    for step in (2, 3):
        writer.save({"step": step})
        assert read_file(tmp_path / LAST)["step"] == step - 1
    writer.close()
    assert read_file(tmp_path / LAST)["step"] == 3 and most == 1 and not numbered(tmp_path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=3)
    for step in (2, 4, 10, 100, 1000):
        writer.save({"step": step})
    writer.close()
    assert [path.name for path in numbered(tmp_path)] == [f"checkpoint-{step:08d}.pth" for step in (10, 100, 1000)]
    assert (tmp_path / LAST).samefile(numbered(tmp_path)[-1]) and len(list(tmp_path.iterdir())) == 4
    writer.save({"step": 1000})  # the same step once more: one file, two names
    writer.close()
    assert read_file(tmp_path / LAST)["step"] == 1000 and len(list(tmp_path.iterdir())) == 4


def test_without_hard_links_it_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.save({"step": 7})
    writer.close()
    assert read_file(tmp_path / LAST) == read_file(numbered(tmp_path)[0]) == {"step": 7}
    assert not (tmp_path / LAST).samefile(numbered(tmp_path)[0])


def test_an_error_reaches_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say: raised by the next save or close, once; the old file stays."""
    writer = CheckpointWriter(tmp_path)
    writer.save({"step": 1})
    writer.close()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "atomic_save", full)
    writer.save({"step": 2})
    with pytest.raises(OSError, match="No space left"):
        writer.save({"step": 3})
    writer.close()
    assert read_file(tmp_path / LAST)["step"] == 1


def test_random_states_are_put_back(tmp_path: Path) -> None:
    """Through a file read with weights_only."""
    checkpoint.seed_generators(5)
    checkpoint.atomic_save({"rng": checkpoint.random_state(CPU)}, tmp_path / "a.pth")
    first = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    checkpoint.set_random_state(read_file(tmp_path / "a.pth")["rng"], CPU)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first
    checkpoint.seed_generators(5)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noticed_and_handlers_are_put_back(number: int) -> None:
    before, stop = signal.getsignal(number), StopRequest()
    with stop.listening():
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.received == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (90061, "1d 1:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
