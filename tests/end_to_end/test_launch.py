"""scripts/: read by bash and shellcheck, run at toy size; the SLURM launcher with stand-ins for SLURM's own commands."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import REPO, run_processes
from tests.training.test_resume import STEPS, flags, log_of  # noqa: F401 (flags is a fixture)
from util.checkpoint import load_latest

SCRIPTS = sorted((REPO / "scripts").glob("*.sh"))
FAKE_SLURM = {
    # one node; the step's shell leaves its number, so that scancel finds it
    "srun": 'shift; echo $$ > "$FAKE_SLURM/step"; exec "$@"',
    "scontrol": 'case $1 in show) echo localhost ;; *) echo "$@" >> "$FAKE_SLURM/asked" ;; esac',
    "scancel": 'kill -USR1 "$(cat "$FAKE_SLURM/step")"',
}


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


def launch(script: str, arguments: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """The script with one process per node; `arguments` without --output_dir and --resume, which it sets itself."""
    kept = [part for i, part in enumerate(arguments) if not {"--output_dir", "--resume"} & {part, arguments[i - 1]}]
    environment = (
        os.environ
        | {"PYTHON": sys.executable, "PROCESSES": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        | environment
    )
    with log.open("a") as file:
        return subprocess.Popen(
            ["bash", REPO / "scripts" / script, arguments[arguments.index("--output_dir") + 1], *kept],
            cwd=REPO,
            stdout=file,
            stderr=file,
            env=environment,
        )


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen, log: Path) -> None:
    while not (folder / "log.jsonl").exists() or len((folder / "log.jsonl").read_text().splitlines()) < count:
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)


@pytest.mark.slow
def test_one_node_stopped_and_continued(flags, tmp_path: Path) -> None:  # noqa: ANN001, F811
    """SIGTERM to the script while it trains: a checkpoint and exit code 0; the same command finishes the run."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = flags(out, log_freq=1, save_every_steps=1000, save_last_freq=1000, max_steps=200)
    process = launch("train_node.sh", arguments, log)
    wait_for_steps(out, 3, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    step = load_latest(str(out))[1]["step"]
    assert 3 <= step < 200 and f"stopped by a signal after step {step}" in log.read_text()
    assert launch("train_node.sh", flags(out, max_steps=step + 3), log).wait(120) == 0
    assert load_latest(str(out))[1]["step"] == step + 3


@pytest.mark.slow
def test_slurm_tells_it_to_stop_and_it_queues_itself_again(flags, tmp_path: Path) -> None:  # noqa: ANN001, F811
    fake, out, log = tmp_path / "slurm", tmp_path / "run", tmp_path / "log.txt"
    fake.mkdir()
    for name, text in FAKE_SLURM.items():
        (fake / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (fake / name).chmod(0o755)
    environment = dict(
        PATH=f"{fake}:{os.environ['PATH']}",
        FAKE_SLURM=str(fake),
        SLURM_SUBMIT_DIR=str(REPO),
        SLURM_JOB_NODELIST="localhost",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_ID="17",
        PORT="0",
    )
    process = launch(
        "train_slurm.sh",
        flags(out, log_freq=1, save_every_steps=1000, save_last_freq=1000, max_steps=200),
        log,
        **environment,
    )
    wait_for_steps(out, 3, process, log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 0, log.read_text()[-3000:]
    step = load_latest(str(out))[1]["step"]
    assert 3 <= step < 200 and (fake / "asked").read_text() == "requeue 17\n"
    assert launch("train_slurm.sh", flags(out, max_steps=step + 3), log, **environment).wait(120) == 0
    # done: not again
    assert load_latest(str(out))[1]["step"] == step + 3 and (fake / "asked").read_text() == "requeue 17\n"


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_the_run_goes_on(flags, tmp_path: Path) -> None:  # noqa: ANN001, F811
    """kill -9 of rank 1: torchrun starts both again, and they continue from the checkpoint by themselves."""
    arguments = [
        "--max_restarts=2",
        REPO / "tests" / "processes" / "run_elastic.py",
        *flags(tmp_path / "run", batch_size=2),
    ]
    result = run_processes(arguments, nproc=2, timeout=600, env={"PYTHONPATH": str(REPO)})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed from" in result.stderr and load_latest(str(tmp_path / "run"))[1]["step"] == STEPS
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, STEPS + 1))
