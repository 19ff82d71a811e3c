"""The stages of a pipeline: each is a command, printed before it runs, or work in this process; rerunning resumes.

A finished stage is skipped, an interrupted one resumes, and one that was begun with another command or other inputs
starts from nothing. OUT/stages/NAME.json records what a stage was made with and its result, OUT/logs/NAME.log what its
command printed.
"""

import contextlib
import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from util.cli import ROOT, describe_error
from util.files import file_sha256, write_json
from util.json_reader import read_json
from util.start import INTERRUPTED

STAMP = ".made-by-stage.json"  # in the folders that a stage made: only these are deleted or written to
LAUNCHERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
INPUT = {"path": str, "bytes": int, "changed": int, "sha256": str}
RECORD = {"command": [str], "inputs": [INPUT], "after": [float], "seconds?": float, "finished?": float, "error?": str}
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of a pipeline: `command`, as one types it from "python" or "torchrun" on, after `work` in this process.

    result: read from what it wrote, of JSON's types; called once, when the stage is done.
    needs: names of earlier stages; it does not run if one failed, and starts from nothing if one ran again.
    inputs: files; if their content changes, it starts from nothing. products: files that a finished stage has left.
    folder: what this stage alone fills, deleted when it starts from nothing; None if its command itself keeps what
    other settings made apart.
    """

    name: str
    result: Callable[[], object]
    about: str = ""
    command: Sequence[str] = ()
    work: Callable[[], object] = lambda: None
    needs: Sequence[str] = ()
    inputs: Sequence[Path] = ()
    products: Sequence[Path] = ()
    folder: Path | None = None


class StageRunner:
    """Runs stages, which write to the folder `out`, and keeps their records.

    ValueError, before any work, for a damaged record, and if a stage would write to a folder that it did not make.
    """

    def __init__(self, stages: Sequence[Stage], out: Path):
        self.stages, self.out = stages, out
        self.records = {stage.name: self._read(stage) for stage in stages}
        self._check_folders()

    def _path(self, stage: Stage) -> Path:
        return self.out / "stages" / f"{stage.name.replace(' ', '-')}.json"

    def _read(self, stage: Stage) -> dict:
        path = self._path(stage)
        try:
            return read_json(path, RECORD) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the stage runs again") from error

    def _command(self, stage: Stage) -> list[str]:
        """Its words, without where `out` is."""
        out = str(self.out)
        return ["OUT" + word[len(out) :] if f"{word}/".startswith(f"{out}/") else word for word in stage.command]

    def _input(self, path: Path) -> dict[str, object]:
        """A file's size, time of change and hash; the hash is not computed again if a record has it."""
        state = path.stat()
        mark = {"path": str(path), "bytes": state.st_size, "changed": state.st_mtime_ns}
        known = [one for record in self.records.values() for one in record.get("inputs", ())]
        hashes = [one["sha256"] for one in known if mark.items() <= one.items()]
        return mark | {"sha256": hashes[0] if hashes else file_sha256(path)}

    def _key(self, stage: Stage) -> dict[str, list]:
        """What a stage's result depends on."""
        inputs = [self._input(path) for path in stage.inputs if path.is_file()]
        after = [self.records[name].get("finished", 0.0) for name in stage.needs]
        return {"command": self._command(stage), "inputs": inputs, "after": after}

    def _begun(self, stage: Stage) -> bool:
        """Whether a stage was begun with what it would run with now."""
        record = self.records[stage.name]
        if not record or record["command"] != self._command(stage):  # spares the hashes
            return False
        key = self._key(stage)
        contents = [[(one["path"], one["sha256"]) for one in made["inputs"]] for made in (key, record)]
        return contents[0] == contents[1] and key["after"] == record["after"]

    def finished(self) -> set[str]:
        """Names of the stages that will be skipped."""
        names: set[str] = set()
        for stage in self.stages:
            left = "result" in self.records[stage.name] and all(path.exists() for path in stage.products)
            if left and names.issuperset(stage.needs) and self._begun(stage):
                names.add(stage.name)
        return names

    def _check_folders(self) -> None:
        skipped = self.finished()
        for stage in self.stages:
            folder = stage.folder
            if stage.name in skipped or folder is None or not os.path.lexists(folder):
                continue
            if folder.is_symlink() or not (folder / STAMP).is_file():
                what = f"was not made by this command (it has no {STAMP}), which would replace it"
                raise ValueError(f"{folder} {what}: choose another --output_dir, or move that folder away")

    def run(self, **more: object) -> list[dict]:
        """Run what is not finished; a record of each stage, with "skipped", and "error" or "result".

        A stage that fails leaves those running that do not need it. more: further entries of new records.
        """
        skipped, rows = self.finished(), {}
        for number, stage in enumerate(self.stages, 1):
            title, found = f"[{number}/{len(self.stages)}] {stage.name}", self.records[stage.name]
            failed = [name for name in stage.needs if "error" in rows[name]]
            if stage.name in skipped:
                print(f"{title}: finished before ({_in_words(found)})", flush=True)
            elif failed:
                found = {"command": [], "inputs": [], "seconds": 0.0, "error": f"{failed[0]} failed"} | more
                print(f"\n{title}: not run, {found['error']}", flush=True)
            else:
                about = f": {stage.about}" if stage.about else ""
                print(f"\n{title}{about}\n    {shlex.join(stage.command) or '(in this process)'}", flush=True)
                found = self._run_one(stage, more)
                print(f"    {_in_words(found)}", flush=True)
            rows[stage.name] = found | {"name": stage.name, "skipped": stage.name in skipped}
        return list(rows.values())

    def _run_one(self, stage: Stage, more: Mapping[str, object]) -> dict:
        begun, key, started = self._begun(stage), self._key(stage), time.perf_counter()
        if stage.folder is not None:
            if not begun and stage.folder.is_dir():
                shutil.rmtree(stage.folder)
            write_json(stage.folder / STAMP, {"stage": stage.name})
        write_json(self._path(stage), key)
        try:
            stage.work()
            if stage.command:
                run_command(stage.command, self.out / "logs" / f"{self._path(stage).stem}.log")
            found = {"result": stage.result()}
        except Exception as error:  # also a device out of memory: the other stages still run
            if os.environ.get("TOKENBRIDGE_DEBUG"):
                raise
            found = {"error": describe_error(error)}
        record = key | more | found | {"seconds": time.perf_counter() - started, "finished": time.time()}
        self.records[stage.name] = record
        write_json(self._path(stage), record)
        return record


def _in_words(record: Mapping) -> str:
    text = record.get("error", record.get("result"))
    return f"{record['seconds']:.0f} s" + (f": {text}" if isinstance(text, str) else "")


def _die_with_parent() -> None:
    """In a child: SIGTERM when the process that started it ends, killed or not (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_command(words: Sequence[str], log: Path) -> None:
    """Run a command in the repository with its output on the terminal and in `log`.

    ValueError with the command's own reason if it fails. Ctrl-C, which a terminal sends to both, ends both.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1"} if words[0] == "torchrun" else {}  # its own default, without its warning
    places = dict(cwd=ROOT, env={"PYTHONUNBUFFERED": "1"} | threads | os.environ)
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, preexec_fn=_die_with_parent)
    executed = [*LAUNCHERS[words[0]], *words[1:]]
    with log.open("ab") as file, subprocess.Popen(executed, **places, **pipe) as process:
        start = file.tell()

        def show(block: bytes) -> None:
            file.write(block)
            sys.stdout.buffer.write(block)
            sys.stdout.flush()

        try:
            while block := process.stdout.read(2**16):
                show(block)
        except KeyboardInterrupt:
            with contextlib.suppress(subprocess.TimeoutExpired):
                show(process.communicate(timeout=20)[0])
                if process.returncode == INTERRUPTED:  # and has said so
                    sys.exit(INTERRUPTED)
            process.terminate()
            raise
    if process.returncode:
        text = log.read_bytes()[start:].decode(errors="replace")
        reasons = re.findall(r"^error: (.*)$", text, flags=re.M)
        raise ValueError(f"{reasons[0] if reasons else f'exit status {process.returncode}'}; see {log}")
