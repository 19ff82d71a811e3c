"""util/log.py: the log of a resumed run, who speaks."""

import json
import logging
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import REPO
from util.log import JsonlLog, get_logger


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- jsonl


def test_lines_are_written_at_once(tmp_path):
    """One JSON object a line, there before the log is closed: a killed run keeps what it logged."""
    log = JsonlLog(tmp_path / "new" / "log.jsonl")
    log.write({"step": 1, "loss": 4.5, "lrs": [1, 2]})
    record = json.loads((tmp_path / "new" / "log.jsonl").read_text())
    assert record.pop("time") > 1.7e9 and record == {"step": 1, "loss": 4.5, "lrs": [1, 2]}
    log.close()


def test_resuming_drops_later_steps_and_half_lines(tmp_path):
    """A run wrote up to step 7 but its checkpoint is of step 4: the log goes on with step 5, once."""
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": i, "loss": 1.0}) for i in range(1, 8)]
    path.write_text("\n".join([*lines[:2], '"text"', "[1]", '{"loss": 3}', *lines[2:], '{"step": 8, "lo']))
    log = JsonlLog(path, resume_step=4)
    for i in (5, 6):
        log.write({"step": i, "loss": 2.0})
    log.close()
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1, 1, 1, 1, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_fresh_run_starts_its_log_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 3}\n')
    JsonlLog(path).close()
    assert path.read_text() == ""


def test_tensorboard_gets_the_same_scalars(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl", tensorboard_dir=tmp_path)
    for i in (1, 2):
        log.write({"step": i, "loss": 0.5 * i, "grad_norm": 3, "per_level": [1, 2]})
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0)]
    assert set(events.Tags()["scalars"]) == {"loss", "grad_norm", "per_level/00", "per_level/01"}


# ------------------------------------------------------------------------------------------------------- the logger


def test_the_logger_is_one():
    first, handlers = get_logger(), list(get_logger().handlers)
    assert first is get_logger() is logging.getLogger("tokenbridge") and get_logger().handlers == handlers
    assert not first.propagate


@pytest.mark.parametrize(("rank", "expected"), [("0", ["hello", "careful", "all"]), ("1", ["[rank 1] careful"])])
def test_rank_0_informs_and_every_rank_warns(rank, expected):
    """On stderr, so that stdout stays free for results. A warning of all ranks comes once."""
    code = "from util.log import get_logger, warn_once; log = get_logger(); log.info('hello'); log.warning('careful')"
    code += "; warn_once('%s', 'all')"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={"RANK": rank, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout == ""
    assert [line.partition(" ")[2] for line in found.stderr.splitlines()] == expected
