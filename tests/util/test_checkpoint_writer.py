"""util/checkpoint_folder.py, random states, and stopping by signals (training/preempt.py)."""

import os
import random
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from training.preempt import StopRequest
from training.progress import duration
from util import checkpoint_folder, seeds
from util.checkpoint import LAST, atomic_save, read_file
from util.checkpoint_folder import CheckpointWriter, load_latest, numbered, read_listing

CPU = torch.device("cpu")


def test_it_writes_in_the_background_and_never_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns while its file waits to be written; the next one waits for it."""
    real, running, most, may_write = checkpoint_folder.atomic_save, 0, 0, threading.Semaphore(0)

    def held_up(content: dict, path: Path) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        assert may_write.acquire(timeout=60)
        real(content, path)
        running -= 1

    monkeypatch.setattr(checkpoint_folder, "atomic_save", held_up)
    writer = CheckpointWriter(tmp_path)
    writer.save({"step": 1})
    assert not (tmp_path / LAST).exists()
    for step in (2, 3):
        may_write.release()
        writer.save({"step": step})
        assert read_file(tmp_path / LAST)["step"] == step - 1
    may_write.release()
    writer.close()
    assert read_file(tmp_path / LAST)["step"] == 3 and most == 1 and not numbered(tmp_path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep_last=3)
    for step in (2, 4, 10, 100, 1000):
        writer.save({"step": step})
    writer.close()
    assert [path.name for path in numbered(tmp_path)] == [f"checkpoint-{step:08d}.pth" for step in (10, 100, 1000)]
    assert (tmp_path / LAST).samefile(numbered(tmp_path)[-1]) and len(list(tmp_path.iterdir())) == 5
    writer.save({"step": 1000})  # the same step once more: one file, two names
    writer.close()
    assert read_file(tmp_path / LAST)["step"] == 1000 and len(list(tmp_path.iterdir())) == 5


def write(folder: Path, steps: Sequence[int], keep_last: int = 2, run: str = "") -> None:
    """As a process of a run: checkpoints at these steps."""
    writer = CheckpointWriter(folder, keep_last)
    for step in steps:
        writer.save({"step": step, "run": run, "w": torch.full((100,), float(step))})
    writer.close()


def steps_in(folder: Path) -> list[int]:
    return [int(path.stem[-8:]) for path in numbered(folder)]


def test_a_resumed_run_goes_on_deleting_its_own(tmp_path: Path) -> None:
    write(tmp_path, (1, 2))
    write(tmp_path, (3,))
    assert steps_in(tmp_path) == [2, 3]
    write(tmp_path, (3, 4))  # step 3 once more
    assert steps_in(tmp_path) == [3, 4] and list(read_listing(tmp_path)) == [path.name for path in numbered(tmp_path)]


def test_checkpoints_of_another_run_stay(tmp_path: Path) -> None:
    """Row 5: the folder holds numbered checkpoints of another run, with or without its list, and no checkpoint-last."""
    write(tmp_path, (10, 20), run="other")
    (tmp_path / LAST).unlink()
    for path in numbered(tmp_path):
        path.chmod(0o444)
    write(tmp_path, (10, 11, 12), run="new")
    assert steps_in(tmp_path) == [11, 12, 20]
    content = read_file(tmp_path / "checkpoint-00000010.1.pth")
    assert (content["run"], content["step"]) == ("other", 10)
    assert read_file(tmp_path / "checkpoint-00000020.pth")["run"] == "other"
    (tmp_path / LAST).unlink()
    (tmp_path / LAST).write_bytes(b"damaged")  # its own one is taken then, not the other run's, though that is later
    assert load_latest(tmp_path)[1]["step"] == 12
    write(tmp_path, (20, 21), run="new")
    assert steps_in(tmp_path) == [20, 21] and read_file(tmp_path / "checkpoint-00000020.1.pth")["run"] == "other"


def test_damaged_checkpoints_are_not_counted(tmp_path: Path) -> None:
    """Row 6: with the newest one truncated, two good ones are there at all times."""
    write(tmp_path, (15, 20))
    newest = tmp_path / "checkpoint-00000020.pth"
    newest.write_bytes(newest.read_bytes()[:-700])
    assert load_latest(tmp_path)[1]["step"] == 15
    for step, there in ((16, [15, 16, 20]), (17, [16, 17, 20]), (20, [17, 20]), (21, [20, 21])):
        write(tmp_path, (step,))
        assert steps_in(tmp_path) == there
    assert all(read_file(path)["step"] in (20, 21) for path in numbered(tmp_path))


def test_checkpoints_of_earlier_versions_stay(tmp_path: Path) -> None:
    """They have no list: all are read, none is deleted but the one that checkpoint-last.pth is."""
    write(tmp_path, (1, 2), keep_last=3)
    (tmp_path / "checkpoints.json").unlink()
    write(tmp_path, (3, 4))
    assert steps_in(tmp_path) == [1, 3, 4]


@pytest.mark.parametrize("text", ["[", "[1]", '{"../victim": "1-a"}', '{"checkpoint-00000001.pth": 3}'])
def test_a_damaged_list_deletes_nothing(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "run"
    write(folder, (1, 2, 3), keep_last=3)
    (tmp_path / "victim").write_text("precious")
    (folder / "checkpoints.json").write_text(text)
    write(folder, (4, 5))
    assert steps_in(folder) == [1, 2, 4, 5] and (tmp_path / "victim").exists()


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

    monkeypatch.setattr(checkpoint_folder, "atomic_save", full)
    writer.save({"step": 2})
    with pytest.raises(OSError, match="No space left"):
        writer.save({"step": 3})
    writer.close()
    assert read_file(tmp_path / LAST)["step"] == 1


def test_random_states_are_put_back(tmp_path: Path) -> None:
    """Through a file read with weights_only."""
    seeds.seed_generators(5)
    atomic_save({"rng": seeds.random_state(CPU)}, tmp_path / "a.pth")
    first = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    seeds.set_random_state(read_file(tmp_path / "a.pth")["rng"], CPU)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == first
    seeds.seed_generators(5)
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
