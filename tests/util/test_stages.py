"""util/stages.py: finished stages are skipped, interrupted ones resume, folders of others stay, commands end too."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from util.stages import Stage, StageRunner, run_command


def python(code: str) -> list[str]:
    return ["python", "-c", code]


class Recorded:
    """Stages a, b, c, d, each with a folder; b and c need the one before. It records which ran."""

    def __init__(self, out: Path):
        self.out, self.runs, self.data, self.fails = out, [], out / "data", set()
        self.data.write_text("1")

    def run(self, flag: str = "1") -> list[dict]:
        def work(name: str) -> None:
            self.runs.append(name)
            (self.out / name / "mark").touch()
            if name in self.fails:
                raise KeyError("x") if name == "d" else ValueError(f"stage {name} broke")

        def stage(name: str, needs: Sequence[str] = ()) -> Stage:
            more = dict(command=["python", "-c", f"print({flag})"] if name == "a" else (), folder=self.out / name)
            more |= dict(inputs=[self.data] * (name == "a"), products=[self.out / name / "mark"])
            return Stage(name=name, result=lambda: f"{name} done", work=lambda: work(name), needs=needs, **more)

        stages = [stage("a"), stage("b", "a"), stage("c", "b"), stage("d")]
        return StageRunner(stages, self.out).run(machine="m")

    def ran(self, flag: str = "1") -> str:
        """The names of the stages that this run ran."""
        self.runs = []
        self.run(flag)
        return "".join(self.runs)


def test_stages_continue_after_a_failure_and_finished_ones_are_skipped(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.fails = {"b", "d"}
    rows = recorded.run()
    assert recorded.runs == ["a", "b", "d"]
    assert [row.get("error", "")[:13] for row in rows] == ["", "stage b broke", "b failed", "KeyError: 'x'"]
    assert rows[0]["result"] == "a done" and rows[0]["inputs"][0]["bytes"] == 1 and rows[0]["machine"] == "m"
    (tmp_path / "b" / "half").touch()
    recorded.fails = set()
    assert recorded.ran() == "bcd" and (tmp_path / "b" / "half").exists()  # resumed
    rows = recorded.run()
    assert recorded.runs == ["b", "c", "d"] and all(row["skipped"] and row["seconds"] >= 0 for row in rows)
    (tmp_path / "d" / "mark").unlink()  # its product
    assert recorded.ran() == "d"
    old = tmp_path / "stages" / "c.json"  # as a kill leaves it
    old.write_text(old.read_text().replace('"result"', '"figure"'))
    assert recorded.ran() == "c"
    old.write_text("{")
    with pytest.raises(ValueError, match=r"c\.json is damaged .*: delete it"):
        recorded.run()


def test_another_command_or_input_starts_a_stage_and_those_that_need_it_from_nothing(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)

    def kept() -> str:
        return "".join(name for name in "abcd" if (tmp_path / name / "old").exists())

    recorded.run()
    for name in "abcd":
        (tmp_path / name / "old").touch()
    os.utime(recorded.data, (0, 0))  # copied: the same content
    assert recorded.ran() == "" and kept() == "abcd"
    assert recorded.ran(flag="2") == "abc" and kept() == "d"
    assert (tmp_path / "logs" / "a.log").read_text() == "1\n2\n"
    recorded.data.write_text("2")
    assert recorded.ran(flag="2") == "abc"
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("a", "b", "c", "d", "stages"):
        shutil.copytree(tmp_path / name, moved / name)
    other = Recorded(moved)
    other.data = recorded.data
    assert other.ran(flag="2") == ""


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_that_no_stage_made_are_refused(tmp_path: Path) -> None:
    """A folder of the user's, also one that replaced a stage's; nothing is begun. Links are not followed."""
    recorded = Recorded(tmp_path)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_bytes(b"precious")

    def refused() -> None:
        before = everything(tmp_path)
        with pytest.raises(ValueError, match=r"c was not made by this command .*choose another --output_dir"):
            recorded.run(flag="2")
        assert everything(tmp_path) == before

    refused()
    shutil.rmtree(tmp_path / "c")
    recorded.run()
    shutil.move(tmp_path / "c", tmp_path / "elsewhere")
    (tmp_path / "c").symlink_to(tmp_path / "elsewhere")
    refused()


def test_a_failing_command_says_why(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    with pytest.raises(ValueError, match=rf"^no such thing; see {log}$"):
        run_command(python("import sys; print('Traceback'); print('error: no such thing'); sys.exit(2)"), log)
    with pytest.raises(ValueError, match=r"^exit status 3; see"):
        run_command(python("raise SystemExit(3)"), log)
    assert log.read_text() == "Traceback\nerror: no such thing\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_command_ends_with_a_killed_parent(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = multiprocessing.get_context("fork").Process(target=run_command, args=(python(code), tmp_path / "log"))
    parent.start()
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.02)
    parent.kill()
    parent.join()
    child = Path(f"/proc/{mark.read_text()}/stat")
    for _ in range(200):
        if not child.exists() or child.read_text().split(") ")[1][0] == "Z":
            return
        time.sleep(0.02)
    os.kill(int(mark.read_text()), signal.SIGKILL)
    pytest.fail("the command went on without its parent")
