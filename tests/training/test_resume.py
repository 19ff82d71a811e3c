"""A run that was killed or stopped at any moment, and resumed, is the uninterrupted run."""

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests.helpers import REPO, Argv, assert_same, log_of
from tests.processes.forked import run_processes, start
from util.checkpoint import LAST
from util.checkpoint_folder import load_latest, numbered

STEPS = 12  # 3 per epoch


@pytest.fixture(scope="module")
def flags(toy_flags: Argv) -> Callable[..., list[str]]:
    """A resumable run with a checkpoint every 2 steps."""
    saving = dict(warmup_epochs=1, log_freq=5, save_last_freq=2, save_every_steps=2, keep_last=2)
    return lambda output, **changes: toy_flags(
        output, **(saving | dict(resume=output, epochs=100, max_steps=STEPS) | changes)
    )


def train(flags: list[str], log: Path, killed: str = "") -> BaseProcess:
    """A training, started, its messages in the file `log`. killed: the arguments of run_killed.py."""
    script = [REPO / "tests" / "processes" / "run_killed.py", *killed.split()]
    return start([*(script if killed else [REPO / "main_tokenbridge.py"]), *flags], log, log)


def finish(flags: list[str], log: Path, code: int = 0, killed: str = "") -> None:
    """Run to the end."""
    process = train(flags, log, killed)
    process.join(120)
    assert process.exitcode == code, log.read_text()[-2000:]


@pytest.fixture(scope="module")
def whole(flags: Argv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    finish(flags(folder / "run"), folder / "log.txt")
    return folder / "run"


def assert_same_run(mine: Path, other: Path) -> None:
    """Weights, EMA, optimizer, random states and the loss log, bit for bit."""
    a, b = (load_latest(str(path))[1] for path in (mine, other))
    for key in ("model", "model_ema", "optimizer", "epoch", "step", "rng", "data"):
        assert_same(a[key], b[key])
    assert log_of(mine) == log_of(other)


@pytest.mark.slow
def test_killed_at_ten_random_points(flags: Argv, whole: Path, tmp_path: Path) -> None:
    """kill -9, each time at a random moment of a whole run's length; then to the end."""
    started = time.perf_counter()
    finish(flags(tmp_path / "timed"), tmp_path / "log.txt")
    seconds = time.perf_counter() - started
    out, rng, steps = tmp_path / "run", random.Random(0), []  # of the newest checkpoint after each kill
    while len(steps) < 10 or not any(steps):
        process = train(flags(out), tmp_path / "log.txt")
        process.join(rng.uniform(0.2, 0.7 + len(steps) / 20) * seconds)  # later and later: some kill finds a checkpoint
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (tmp_path / "log.txt").read_text()[-2000:]
        if process.exitcode == 0:  # it was quicker than the kill; begin again
            assert_same_run(out, whole)
            out = out.with_name(f"run{len(steps)}")
            continue
        steps.append(load_latest(str(out))[1]["step"] if (out / LAST).exists() else 0)
    finish(flags(out), tmp_path / "log.txt")
    assert_same_run(out, whole)


def test_killed_in_the_middle_of_a_checkpoint(flags: Argv, whole: Path, tmp_path: Path) -> None:
    """Half of its bytes are on the disk, under another name: the one before it is taken, or none before the first."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    for number in (1, 3):  # checkpoints are saved after step 2, after 3, the end of epoch 0, and after 4
        finish(flags(out), log, code=-signal.SIGKILL, killed=f"KILL save {number}")
        (left,) = out.glob(".*.tmp")
        assert left.name.startswith(".checkpoint-last.pth.") and (out / LAST).exists() == (number > 1)
    assert load_latest(str(out))[1]["step"] == 3
    finish(flags(out), log)
    assert_same_run(out, whole)
    kept = [f"checkpoint-{step:08d}.pth" for step in (STEPS - 2, STEPS)]
    assert not list(out.glob(".*.tmp")) and [path.name for path in numbered(out)] == kept


def test_a_signal_ends_the_run_with_a_checkpoint(flags: Argv, whole: Path, tmp_path: Path) -> None:
    """In the middle of an epoch, where no checkpoint is due: exit code 0, a message, and the rest of the run equal."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    rarely = dict(save_every_steps=1000, save_last_freq=1000, log_freq=1)
    for name, step in (("TERM", 4), ("USR1", 7)):  # each arrives when that step has begun
        finish(flags(out, **rarely), log, killed=f"{name} step {step}")
        assert load_latest(str(out))[1]["step"] == step + 1
        assert f"stopped by a signal after step {step + 1} of {STEPS}" in log.read_text()
    finish(flags(out, log_freq=1), log)
    a, b = load_latest(str(out))[1], load_latest(str(whole))[1]
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert [(line["step"], line["loss"]) for line in log_of(out)] == [
        (line["step"], line["loss"]) for line in log_of(whole)
    ]


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(flags: Argv, tmp_path: Path) -> None:
    """As after a power cut on a disk that lied about fsync: checkpoint-last.pth is half a file."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    finish(flags(out, max_steps=8, epochs=100), log)
    older, newest = numbered(out)
    newest.write_bytes(newest.read_bytes()[:-500])  # checkpoint-last.pth is the same file
    assert (out / LAST).samefile(newest)
    # max_steps 8 ended the schedule at step 8, so only the data order is compared here; the weights come from the older
    # file
    finish(flags(out, max_steps=8), log)
    text = log.read_text()
    assert f"skipped: {out / LAST}" in text and f"the checkpoint before it is taken instead: {older}" in text
    assert load_latest(str(out))[1]["step"] == 8


@pytest.mark.slow
def test_one_process_continues_as_two(flags: Argv, tmp_path: Path) -> None:
    """Two micro-batches of one process or one of each of two: the same images, draws and dropout, hence weights and
    losses equal up to the order of float sums.
    """
    same = dict(max_steps=16, batch_size=2)
    finish(flags(tmp_path / "one", accum_iter=2, **same), tmp_path / "log.txt")
    out = tmp_path / "two"
    saving = dict(save_every_steps=7, save_last_freq=1000)
    killed = dict(code=-signal.SIGKILL, killed="KILL step 5")
    finish(flags(out, accum_iter=2, **saving, **same), tmp_path / "log.txt", **killed)
    assert load_latest(str(out))[1]["step"] == 3  # the end of epoch 0
    result = run_processes([REPO / "main_tokenbridge.py", *flags(out, **same)], nproc=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "at step 3" in result.stderr
    one, two = log_of(tmp_path / "one"), log_of(out)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=2e-4)
    a, b = load_latest(str(tmp_path / "one"))[1]["model_ema"], load_latest(str(out))[1]["model_ema"]
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 1e-3  # lr is 1e-3: one step of AdamW
