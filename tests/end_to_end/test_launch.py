"""scripts/: read by bash and shellcheck, run at toy size; the SLURM launcher with stand-ins for SLURM's commands."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import REPO, Argv, torchrun
from util.checkpoint_folder import load_latest

SCRIPTS = sorted((REPO / "scripts").glob("*.sh"))
FAKE_SLURM = {
    # one node; the step's shell leaves its number, so that scancel finds it
    "srun": 'shift; echo $$ > "$FAKE_SLURM/step"; exec "$@"',
    "scontrol": 'case $1 in show) echo localhost ;; *) echo "$@" >> "$FAKE_SLURM/asked" ;; esac',
    "scancel": 'kill -USR1 "$(cat "$FAKE_SLURM/step")"',
}


@pytest.fixture(scope="module")
def flags(toy_flags: Argv) -> Callable[..., list[str]]:
    """flags(name=value, ...): a training of 12 images, 3 steps per epoch, up to 200 steps, a checkpoint at the end."""
    usual = dict(warmup_epochs=1, epochs=100, max_steps=200, log_freq=1, save_last_freq=1000, save_every_steps=1000)
    return lambda **changes: toy_flags(None, **(usual | changes))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    checker = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if checker is not None:
        result = subprocess.run([checker, script], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["train_node.sh", "train_slurm.sh"])
@pytest.mark.parametrize("arguments", [[], ["--epochs", "3"]])
def test_a_missing_folder_is_refused(script: str, arguments: list[str]) -> None:
    result = subprocess.run(["bash", REPO / "scripts" / script, *arguments], capture_output=True, text=True)
    assert result.returncode == 2 and "error: usage:" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_node.sh", "train_slurm.sh"])
def test_a_refused_flag_is_one_line_and_nothing_is_started(script: str, tmp_path: Path) -> None:
    """Row 139: torchrun would start it once more for each of its restarts."""
    environment = dict(PYTHON=sys.executable, PROCESSES="2", SLURM_SUBMIT_DIR=str(REPO), SLURM_JOB_NODELIST="a")
    environment |= dict(SLURM_JOB_NUM_NODES="1", SLURM_JOB_ID="17", PATH=f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tmp_path / "scontrol").chmod(0o755)
    command = ["bash", REPO / "scripts" / script, tmp_path / "out", "--lr", "nan"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: lr must be finite, got nan (--lr)\n")
    assert not (tmp_path / "out").exists()


def launch(
    script: str, out: str | Path, arguments: list[str], log: Path, cwd: Path = REPO, **environment: str
) -> subprocess.Popen:
    """The script with one process per node; it sets --output_dir and --resume itself."""
    one = {"PYTHON": sys.executable, "PROCESSES": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", REPO / "scripts" / script, out, *arguments]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=cwd, stdout=file, stderr=file, env=os.environ | one | environment)


def stop_after_steps(process: subprocess.Popen, how: signal.Signals, out: Path, log: Path) -> int:
    """Send the signal after three steps; the script ends with code 0. Returns the checkpoint's step."""
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    step = load_latest(str(out))[1]["step"]
    assert 3 <= step < 200
    return step


@pytest.mark.slow
def test_one_node_stopped_and_resumed(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """SIGTERM to the script while it trains: a checkpoint and exit code 0; the same command finishes the run.

    Started in another folder, to which OUT is relative.
    """
    out, log = tmp_path / "run", tmp_path / "log.txt"
    step = stop_after_steps(launch("train_node.sh", "run", flags(), log, tmp_path), signal.SIGTERM, out, log)
    assert f"stopped by a signal after step {step}" in log.read_text()
    assert launch("train_node.sh", "run", flags(max_steps=step + 3), log, tmp_path).wait(120) == 0
    assert load_latest(str(out))[1]["step"] == step + 3


@pytest.mark.slow
def test_slurm_signals_and_the_job_requeues_itself(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    fake, out, log = tmp_path / "slurm", tmp_path / "run", tmp_path / "log.txt"
    fake.mkdir()
    for name, text in FAKE_SLURM.items():
        (fake / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (fake / name).chmod(0o755)
    job = dict(SUBMIT_DIR=str(REPO), JOB_NODELIST="localhost", JOB_NUM_NODES="1", JOB_ID="17")
    environment = {f"SLURM_{name}": value for name, value in job.items()}
    environment |= dict(PATH=f"{fake}:{os.environ['PATH']}", FAKE_SLURM=str(fake), PORT="0")
    process = launch("train_slurm.sh", out, flags(), log, **environment)
    step = stop_after_steps(process, signal.SIGUSR1, out, log)
    assert (fake / "asked").read_text() == "requeue 17\n"
    assert launch("train_slurm.sh", out, flags(max_steps=step + 3), log, **environment).wait(120) == 0
    assert load_latest(str(out))[1]["step"] == step + 3
    assert (fake / "asked").read_text() == "requeue 17\n"  # finished: not again


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_the_run_resumes(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    """kill -9 of rank 1: torchrun starts both again, and they resume from the checkpoint by themselves."""
    out, script = tmp_path / "run", REPO / "tests" / "processes" / "run_elastic.py"
    changes = dict(batch_size=2, max_steps=24, save_last_freq=2, save_every_steps=2, output_dir=out, resume=out)
    result = torchrun(["--max_restarts=2", script, *flags(**changes)], nproc=2, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed from" in result.stderr and load_latest(str(out))[1]["step"] == 24
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))
