"""util/cli.py: what the command lines of all entry points share."""

import argparse
import errno
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.helpers import REPO
from util import start
from util.cli import add_process_flags, check_writable, make_parser, parse, run_cli
from util.files import CannotWrite
from util.launcher import launched
from util.log import doing
from util.options import ArgumentError, MissingFile, flag_names


def small_parser() -> argparse.ArgumentParser:
    parser = make_parser("A script.\n  with its own lines")
    parser.add_argument("--num_images", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--name", default="x", choices=("x", "y"))
    parser.add_argument("--evaluate", action="store_true")
    add_process_flags(parser, seed=3)
    return parser


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As started by hand; variables that a test sets go away with it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


# ------------------------------------------------------------------------------------------------------- parsing


def test_defaults(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    args, given = parse(small_parser(), [])
    assert given == set()
    own = dict(num_images=50, cfg=1.0, name="x", evaluate=False)
    process = dict(device="auto", seed=3, num_workers=10, pin_mem=True, world_size=1, local_rank=-1, dist_on_itp=False)
    assert vars(args) == own | process | dict(dist_url="env://")


@pytest.mark.parametrize("cores, processes, workers", [(64, 1, 10), (64, 8, 8), (2, 2, 1), (1, 4, 1)])
def test_workers_by_default_no_more_than_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert parse(small_parser(), [])[0].num_workers == workers
    assert parse(small_parser(), ["--num_workers", "12"])[0].num_workers == 12  # a wish is a wish


def test_what_was_given_is_told_from_defaults():
    """Also when the value given is the default."""
    args, given = parse(small_parser(), ["--num_images", "50", "--evaluate", "--no_pin_mem", "--cfg=2"])
    assert given == {"num_images", "evaluate", "pin_mem", "cfg"}
    assert (args.num_images, args.evaluate, args.pin_mem, args.cfg, args.name) == (50, True, False, 2.0, "x")


def test_the_command_line_is_read_when_none_is_handed_in(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--cfg", "4"])
    assert parse(small_parser())[0].cfg == 4


@pytest.mark.parametrize(
    "line", ["--num_image 3", "--eval", "--cf 2", "--nosuch", "extra", "--num_images many", "--cfg", "--name z"]
)
def test_abbreviations_unknown_flags_and_values_of_another_kind_are_refused(line, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(small_parser(), line.split())
    message = capsys.readouterr().err
    assert caught.value.code == 2 and line.split()[0] in message
    assert line != "--name z" or re.search("'z'.*choose from.*x.*y", message)


def test_help_shows_defaults_and_keeps_lines(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(small_parser(), ["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "A script.\n  with its own lines" in shown and "(default: auto)" in shown


# ------------------------------------------------------------------------------------------------------- process flags


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--dist_on_itp", "--dist_on_itp is refused.*torchrun"),
        ("--num_workers -1", r"num_workers must be at least 0, got -1 \(--num_workers\)"),
        ("--seed -1", r"seed must be at least 0, got -1 \(--seed\)"),
    ],
)
def test_process_flags_that_are_refused(line, words):
    with pytest.raises(ValueError, match=words):
        parse(small_parser(), line.split())


def test_world_size_must_be_what_was_launched(monkeypatch):
    assert parse(small_parser(), ["--world_size", "1"])[0].world_size == 1
    with pytest.raises(ValueError, match="--world_size 8, but 1 processes were launched.*--nproc_per_node"):
        parse(small_parser(), ["--world_size", "8"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert parse(small_parser(), ["--world_size", "8"])[0].world_size == 8
    assert parse(small_parser(), [])[0].world_size == 1  # the default is no wish


@pytest.mark.parametrize("flag", ["--local_rank", "--local-rank"])
def test_local_rank_of_old_launchers(monkeypatch, flag):
    args, _ = parse(small_parser(), [flag, "3"])
    assert args.local_rank == 3 and os.environ["LOCAL_RANK"] == "3"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parse(small_parser(), [flag, "1"])[0].local_rank == 1
    with pytest.raises(ValueError, match="--local_rank 3 contradicts.*LOCAL_RANK 1"):
        parse(small_parser(), [flag, "3"])


def test_pin_mem_both_ways():
    found = [parse(small_parser(), argv)[0].pin_mem for argv in ([], ["--pin_mem"], ["--no_pin_mem"])]
    assert found == [True, True, False]


def test_a_parser_without_process_flags():
    parser = make_parser("x")
    parser.add_argument("--bits", type=int, default=6)
    assert parse(parser, ["--bits", "4"])[0].bits == 4


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (dict(WORLD_SIZE="abc"), "WORLD_SIZE is 'abc', which is no number of at least 1"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE is '0'"),
        (dict(LOCAL_WORLD_SIZE="0"), "LOCAL_WORLD_SIZE is '0', which is no number of at least 1"),
        (dict(WORLD_SIZE="2"), "RANK is '', which is no number of at least 0 and below WORLD_SIZE 2"),
        (dict(WORLD_SIZE="2", RANK="2"), "RANK is '2'"),
        (dict(LOCAL_RANK="-1"), "LOCAL_RANK is '-1'"),
    ],
)
def test_variables_of_the_launcher_are_checked(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"the environment variable {words}.*; torchrun sets it"):
        [launched(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]


@pytest.mark.parametrize("flag", ["output_dir", "cached_path"])
def test_a_folder_named_by_an_empty_string_is_refused(flag):
    """As of an unset variable: --output_dir "$OUT" must not write to the current directory."""
    parser = small_parser()
    parser.add_argument(f"--{flag}", default="")
    assert getattr(parse(parser, [])[0], flag) == ""
    with pytest.raises(ValueError, match=rf'--{flag} is "": name a folder'):
        parse(parser, [f"--{flag}", ""])
    with pytest.raises(ValueError, match=rf'--{flag} is "": name a folder'):
        check_writable("", f"--{flag}")


def test_check_writable_makes_the_folder_and_leaves_nothing(tmp_path):
    folder = check_writable(tmp_path / "a" / "b", "--output_dir")
    assert folder == tmp_path / "a" / "b" and folder.is_dir() and not list(folder.iterdir())
    (folder / "kept.txt").write_text("old")
    check_writable(str(folder), "--output_dir")
    assert [p.name for p in folder.iterdir()] == ["kept.txt"]


def test_folders_that_cannot_be_written(tmp_path):
    """A file in the way, as path or as parent (permissions do not stop root, who may run this)."""
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"cannot write to .*file.* \(--output_dir\)"):
            check_writable(path, "--output_dir")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="cannot write to.*--output_dir"):
            check_writable(tmp_path, "--output_dir")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ArgumentError("cfg", "cfg is too large"), ValueError, "cfg is too large (--cfg)"),
        (ArgumentError("folder", "x (folder) is empty"), ValueError, "x (--name) is empty"),
        (MissingFile("name", "no file x"), FileNotFoundError, "no file x (--name)"),
        (ValueError("a (seed).png (name): bad"), ValueError, "a (seed).png (--name): bad"),
        (OSError("full (name). Stop"), OSError, "full (--name). Stop"),
        (PermissionError(13, "no"), PermissionError, "[Errno 13] no"),
    ],
)
def test_entry_points_add_the_names_of_flags(error, kind, text):
    with pytest.raises(kind) as caught, flag_names(small_parser(), folder="name"):
        raise error
    assert type(caught.value) is kind and str(caught.value) == text


# ------------------------------------------------------------------------------------------------------- the end


def fail_with(error: BaseException):
    def main() -> None:
        raise error

    return main


@doing("reading the file x.pth")
def unforeseen(error: Exception) -> None:
    with doing("reading everything"):
        pass
    raise error


def test_success_is_0(capsys):
    assert run_cli(lambda: "whatever") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--bits 13"), "--bits 13"),
        (ValueError("first\n\n  second"), "first; second"),
        (FileNotFoundError("no folder x"), "no folder x"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: disk full (No space left on device)"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full (No space left on device)"),
        (
            CannotWrite("/a/b.pth", OSError(errno.EDQUOT, "Disk quota exceeded")),
            "cannot write /a/b.pth: disk full (Disk quota exceeded)",
        ),
    ],
)
def test_bad_input_is_2_and_one_line(capsys, monkeypatch, error, line):
    monkeypatch.delenv("TOKENBRIDGE_DEBUG", raising=False)
    assert run_cli(fail_with(error)) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("a"), "KeyError: 'a'"),
        (RuntimeError("first\nsecond"), "RuntimeError: first"),
        (AssertionError(), "AssertionError: AssertionError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (MemoryError("Unable to allocate 9 TiB"), "not enough memory (Unable to allocate 9 TiB)"),
        (RuntimeError("CUDA out of memory. Tried"), "not enough memory (CUDA out of memory. Tried)"),
    ],
)
def test_anything_else_says_what_was_being_done(capsys, monkeypatch, error, line):
    monkeypatch.delenv("TOKENBRIDGE_DEBUG", raising=False)
    assert run_cli(lambda: unforeseen(error)) == 1
    found = capsys.readouterr().err
    number = unforeseen.__wrapped__.__code__.co_firstlineno + 4
    where = f"tests/util/test_cli.py:{number}, TOKENBRIDGE_DEBUG=1 shows the traceback"
    assert found == f"error: reading the file x.pth: {line} ({where})\n"


class Broken(Dataset):
    """Reading an item raises an error."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("image a.png cannot be read"), 2, "^error: image a.png cannot be read$"),
        (OSError(5, "Input/output error", "a.png"), 2, "^error: .*Input/output error: 'a.png'$"),
        (KeyError("a"), 1, "^error: KeyError: 'a' \\("),
        (MemoryError("9 TiB"), 1, r"^error: not enough memory \(9 TiB\)"),
    ],
)
def test_an_error_in_a_loader_is_its_last_line(capsys, monkeypatch, error, code, words):
    monkeypatch.delenv("TOKENBRIDGE_DEBUG", raising=False)
    assert run_cli(lambda: list(DataLoader(Broken(error), num_workers=1))) == code
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(words, line), line


@pytest.mark.parametrize("error", [ValueError("--bits"), KeyError("bug"), OSError(28, "No space")])
def test_debug_shows_the_traceback(monkeypatch, error):
    monkeypatch.setenv("TOKENBRIDGE_DEBUG", "1")
    with pytest.raises(type(error)):
        run_cli(fail_with(error))


def test_ctrl_c_is_130_and_one_line(capsys):
    assert run_cli(fail_with(KeyboardInterrupt())) == 130 and capsys.readouterr().err == "interrupted\n"
    with pytest.raises(SystemExit):  # argparse's own ends
        run_cli(fail_with(SystemExit(3)))


@pytest.mark.parametrize(
    ("script", "expected"),
    [("-m", True), (REPO / "main_vae.py", True), ("main_vae.py", True), ("/usr/bin/pytest", False), ("-c", False)]
    + [("", False)],
)
def test_ctrl_c_is_taken_over_by_commands_only(monkeypatch, script, expected):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert start.is_a_command() == expected
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", ["main_vae.py"])
    assert not start.is_a_command()


DURING_IMPORTS = "import sys; sys.argv[0] = '-m'; import os, util.start; os.kill(os.getpid(), 2); print('went on')"
TWICE = """
import os, sys
sys.argv[0] = "-m"
import util.start
from util.cli import run_cli
code = run_cli(lambda: os.kill(os.getpid(), 2))
os.kill(os.getpid(), 2)
print("went on")
"""
HALF_MADE = """
import os, sys
sys.argv[0] = "-m"
import util.start
from util.cli import run_cli
class Loader:
    def __init__(self):
        os.kill(os.getpid(), 2)
        self.processes = []
    def __del__(self):
        self.processes.clear()
sys.exit(run_cli(Loader))
"""
IGNORED = """
import os, sys, time
sys.argv[0] = "-m"
import util.start
from util.cli import run_cli
class Loader:
    def __del__(self):
        os.kill(os.getpid(), 2)
def main():
    Loader()
    time.sleep(60)
sys.exit(run_cli(main))
"""
IN_A_WORKER = """
import os, signal, sys
sys.argv[0] = "-m"
import util.start
from util.cli import run_cli
def main():
    if (pid := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGINT)
        print("the worker went on", flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(run_cli(main))
"""


IN_A_SPAWNED_WORKER = """
import multiprocessing, os, signal, sys
sys.argv[0] = "-m"
import util.start
from util.cli import run_cli
WORK = "import util.start, os; os.kill(os.getpid(), 2); print('the worker went on')"
def main():
    worker = multiprocessing.get_context("spawn").Process(target=exec, args=(WORK,))
    worker.start()
    worker.join()
    os.kill(os.getpid(), signal.SIGINT)
sys.exit(run_cli(main))
"""


@pytest.mark.parametrize(
    ("code", "out"),
    [
        (DURING_IMPORTS, ""),
        (TWICE, ""),
        (HALF_MADE, ""),
        (IGNORED, ""),
        (IN_A_WORKER, "the worker went on\n"),
        (IN_A_SPAWNED_WORKER, "the worker went on\n"),
    ],
)
def test_ctrl_c_in_a_process_of_its_own(code, out):
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, out, "interrupted\n")


@pytest.mark.parametrize(
    ("target", "code", "line"),
    [("/dev/full", 2, "error: disk full (No space left on device)"), ("closed pipe", 2, "error: Broken pipe")]
    + [("ascii", 0, "")],
)
def test_an_output_that_cannot_take_it(target, code, line):
    program = "import sys; from util.cli import run_cli; sys.exit(run_cli(lambda: print('\xb1' * 3)))"
    environment = os.environ | ({"PYTHONIOENCODING": "ascii"} if target == "ascii" else {})
    read, write = os.pipe()
    if target == "closed pipe":
        os.close(read)
    with open("/dev/full", "w") if target == "/dev/full" else os.fdopen(write, "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPO, env=environment, stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr.strip()) == (code, line)
