"""Stages and their records: a finished one is skipped, a failed one leaves its reason, and the others still run."""

import ctypes
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tools.reproduce.commands import Command, added
from tools.reproduce.cost import Work
from util import dist
from util.checkpoint import versions
from util.files import file_sha256, read_json, write_json
from util.log import first_line

ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
RECORD = {"command": str, "inputs": dict, "seconds": float, "measured?": dict, "error?": str, "files?": dict}
PACKAGES = ("torchvision", "torch-fidelity", "timm", "scipy", "pillow")  # besides torch's own


@dataclass(frozen=True)
class Stage:
    """A command, or work of this process alone, and the figures that are read from what it wrote.

    about: one line. published: name of the command that it is. inputs: files that decide the result.
    measure: key of a figure -> value, None where it could not be computed; "differs" -> settings other than published.
    """

    name: str
    about: str
    measure: Callable[[], dict[str, object]]
    command: Command | None = None
    published: str = ""
    inputs: tuple[Path, ...] = ()
    work: Work = field(default_factory=Work)

    @property
    def added(self) -> list[str]:
        """What is added to the published command or changed in it."""
        return added(self.command, self.published) if self.command and self.published else []


def describe_machine(device: str) -> dict[str, object]:
    """The card ("cpu": the processor's architecture and cores), the versions of what decides figures, and the code."""
    name, cards = f"{platform.machine()}, {os.cpu_count()} cores", 0
    if device != "cpu":
        name, cards = dist.device_name(dist.pick_device(device)), dist.device_count()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    found = {package: metadata.version(package) for package in PACKAGES}
    return {"device": name, "devices": cards, "commit": commit} | versions() | found


def _marks(paths: Sequence[Path]) -> dict[str, list[int]]:
    """{path: [bytes, time of change]} of the files that exist."""
    return {str(p): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths if p.is_file()}


class Records:
    """OUT/stages/NAME.json: what made a stage's result, and the result."""

    def __init__(self, out: Path):
        self.folder, self.logs = out / "stages", out / "logs"

    def read(self, stage: Stage) -> dict:
        """The record, {} if there is none. ValueError that names a damaged one."""
        path = self.folder / f"{stage.name}.json"
        try:
            return read_json(path, RECORD) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the stage runs again") from error

    def key(self, stage: Stage) -> dict:
        """What a finished stage must have been made with to be skipped."""
        return {"command": str(stage.command or ""), "inputs": _marks(stage.inputs)}

    def finished(self, stage: Stage) -> dict | None:
        """The record of a stage that is finished and whose command and inputs are the same, otherwise None."""
        found = self.read(stage)
        same = all(found.get(name) == value for name, value in self.key(stage).items())
        return found if same and "measured" in found else None

    def hashes(self, stage: Stage, known: Sequence[dict]) -> dict[str, dict]:
        """{path: bytes, SHA-256} of the stage's inputs; those of known records are not computed again."""
        found = {}
        for path, mark in _marks(stage.inputs).items():
            before = [r["files"][path] for r in known if r.get("inputs", {}).get(path) == mark and path in r["files"]]
            found[path] = before[0] if before else {"bytes": mark[0], "sha256": file_sha256(path)}
        return found

    def run(self, stages: Sequence[Stage], device: str) -> list[dict]:
        """Run what is not finished; the record of each, with "error" instead of "measured" where it failed."""
        records: list[dict] = []
        machine = describe_machine(device)
        for number, stage in enumerate(stages, 1):
            title = f"[{number}/{len(stages)}] {stage.name}"
            record = self.finished(stage)
            if record is not None:
                print(f"{title}: finished before ({record['seconds']:.0f} s)", flush=True)
            else:
                print(f"\n{title}: {stage.about}\n    {stage.command or '(in this process)'}", flush=True)
                record = self.run_one(stage) | {"machine": machine}
                if "error" not in record:
                    record["files"] = self.hashes(stage, records)
                write_json(self.folder / f"{stage.name}.json", record)
                print(f"    {record.get('error') or 'done'} ({record['seconds']:.0f} s)", flush=True)
            records.append({"name": stage.name, "files": {}} | record)
        return records

    def run_one(self, stage: Stage) -> dict:
        """Run a stage's command and read its figures."""
        record, started = {}, time.perf_counter()
        try:
            if stage.command is not None:
                self.logs.mkdir(parents=True, exist_ok=True)
                run_command(stage.command, self.logs / f"{stage.name}.log")
            record = {"measured": stage.measure()}
        except Exception as error:  # also a device out of memory: the other stages still run
            if os.environ.get("TOKENBRIDGE_DEBUG"):
                raise
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            record = {"error": kind + first_line(error)}
        return self.key(stage) | record | {"seconds": time.perf_counter() - started}


def _die_with_parent() -> None:
    """In a child: SIGTERM when the process that started it ends, killed or not (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_command(command: Command, log: Path) -> None:
    """Run it with its output on the terminal and in `log`. ValueError with the command's own reason if it fails."""
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent)
    threads = {"OMP_NUM_THREADS": "1"} if command.processes > 1 else {}  # torchrun's own default, without its warning
    places = dict(cwd=ROOT, env=threads | os.environ)
    with log.open("ab") as file, subprocess.Popen(command.executed(), **places, **pipe) as process:
        start = file.tell()
        while block := process.stdout.read1(2**16):
            sys.stdout.buffer.write(block)
            sys.stdout.flush()
            file.write(block)
    if process.returncode:
        text = log.read_bytes()[start:].decode(errors="replace")
        reasons = re.findall(r"^error: (.*)$", text, flags=re.M)
        raise ValueError(f"{reasons[0] if reasons else f'exit status {process.returncode}'}; see {log}")
