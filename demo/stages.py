"""A demo's stages: each is a command, printed before it runs; finished ones are skipped, an interrupted one resumes."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.files import write_json
from util.start import INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".made-by-demo.json"  # in the folders that the demo made, and may delete


@dataclass
class Stage:
    """A step of the pipeline: a command, or `work` in this process."""

    name: str
    command: list[str] | None
    folder: Path  # what it writes; deleted if another command or other inputs made it
    result: Callable[[], str]  # its line in the table, from the files it wrote; called once, when the stage is done
    expected: str  # that line on a healthy run
    work: Callable[[], object] = lambda: None


def read_stage(number: int, stage: Stage, out: Path, before: float) -> tuple[Path, dict, dict]:
    """A stage's file, the key that it must have for the stage to go on where it is, and what it has."""
    record = out / "stages" / f"{number}-{stage.name.replace(' ', '-')}.json"
    command = [part.replace(str(out), "OUT").replace(sys.executable, "python") for part in stage.command or []]
    try:
        found = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}): delete it, and the stage runs again") from error
    found = found if isinstance(found, dict) else {}
    numbers = [found.get(name, 0.0) for name in ("seconds", "finished")]
    if "result" in found and not ({"seconds", "finished"} <= found.keys() and all(type(x) is float for x in numbers)):
        raise ValueError(f"{record} is damaged: delete it, and the stage runs again")
    return record, {"command": command, "after": before}, found


def agrees(key: dict, found: dict) -> bool:
    """Whether a stage was begun with this command, after the same stages."""
    return all(found.get(name) == value for name, value in key.items())


def check_folders(stages: Sequence[Stage], out: Path) -> None:
    """ValueError, before any work, if a stage would write to a folder that it did not make (it has no STAMP)."""
    before, unchanged = 0.0, True
    for number, stage in enumerate(stages, 1):
        _, key, found = read_stage(number, stage, out, before)
        unchanged = unchanged and agrees(key, found) and "result" in found
        before = found.get("finished", 0.0)
        made_here = (stage.folder / STAMP).is_file() and not stage.folder.is_symlink()
        if not unchanged and os.path.lexists(stage.folder) and not made_here:
            what = f"was not made by this demo (it has no {STAMP}), which would replace it"
            raise ValueError(f"{stage.folder} {what}: choose another --output_dir, or move that folder away")


def run_stages(stages: Sequence[Stage], out: Path) -> list[dict]:
    """Run the stages that are not finished; "seconds", "result" and "skipped" of each. ValueError if one fails.

    A file per stage holds its command and the time when the stage before it finished: if either changed, the stage
    starts from nothing. Only folders with a STAMP, which this writes, are deleted or written to.
    """
    check_folders(stages, out)
    rows, before = [], 0.0
    for number, stage in enumerate(stages, 1):
        record, key, found = read_stage(number, stage, out, before)
        same = agrees(key, found)
        skipped = same and "result" in found  # (records of earlier versions have none)
        title = f"[{number}/{len(stages)}] {stage.name}"
        if skipped:
            print(f"{title}: finished before ({found['seconds']:.0f} s): {found['result']}", flush=True)
        else:
            if not same and stage.folder.is_dir():
                shutil.rmtree(stage.folder)
            write_json(stage.folder / STAMP, {"made by": "python -m demo.run", "stage": stage.name})
            write_json(record, key)
            started = time.perf_counter()
            run_stage(stage, title)
            found = key | {"seconds": time.perf_counter() - started, "result": stage.result(), "finished": time.time()}
            write_json(record, found)
            print(f"    {found['seconds']:.0f} s: {found['result']}", flush=True)
        rows.append(found | {"skipped": skipped})
        before = found["finished"]
    return rows


def run_stage(stage: Stage, title: str) -> None:
    """Print and run one stage. ValueError if its command fails."""
    command = stage.command or []
    typed = ["torchrun" if part == "torch.distributed.run" else part for part in command]
    print(f"\n{title}\n    " + shlex.join(part for part in typed if part not in (sys.executable, "-m")), flush=True)
    stage.work()
    if command:
        environment = {"OMP_NUM_THREADS": "1"} | os.environ if "torch.distributed.run" in command else None
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sends it to both
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.wait(20) == INTERRUPTED:  # and has said so
                    sys.exit(INTERRUPTED)
            process.terminate()
            raise
        if code:
            raise ValueError(
                f"{title} failed with exit code {code}, see its message above; rerun to continue from here"
            )
