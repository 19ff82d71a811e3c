"""What the command lines of all entry points share: parsing, process flags, checks that name the flag, the end."""

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from util import start
from util.files import CannotWrite, os_reason
from util.launcher import launched
from util.locks import folder_lock
from util.log import first_line
from util.options import ArgumentError, add_options, check_options, flag_names, option, read_options

_UNSET = object()
FOLDERS = {"output_dir", "cached_path"}  # what a command writes to
ROOT = Path(__file__).resolve().parents[1]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with defaults and a description whose lines stay as written."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults and takes no abbreviated flags: a misspelt one is an error, never another flag."""
    return argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=HelpFormatter)


@dataclass(frozen=True)
class ProcessOptions:
    """Device, seed, loader and launcher; names and meanings as published, but `device` defaults to auto, not to
    cuda.
    """

    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes cuda where there is one")
    seed: int = option(0, "seed of every random draw", lowest=0, highest=2**63 - 1)
    num_workers: int = option(
        10, "loader processes per training process, by default at most its cores; 0 loads in the process", lowest=0
    )
    pin_mem: bool = option(True, "pin the loader's memory (faster copies to a GPU)")
    world_size: int = option(1, "set by torchrun; accepted for old launch lines, must agree with it")
    local_rank: int = option(-1, "set by torchrun; accepted for old launch lines")
    dist_on_itp: bool = option(False, "refused: MPI launch on one particular cluster; use torchrun")
    dist_url: str = option("env://", "where the processes meet (torch.distributed init_method)")

    def __post_init__(self) -> None:
        check_options(self)
        if self.dist_on_itp:
            reason = "it belongs to the MPI launcher of one particular cluster; start the processes with torchrun"
            raise ArgumentError("dist_on_itp", f"--dist_on_itp is refused: {reason}")


def add_process_flags(parser: argparse.ArgumentParser, seed: int) -> None:
    """The flags of ProcessOptions, in the published spellings; `seed` is the default of --seed."""
    add_options(parser, ProcessOptions, "processes", seed=seed)
    parser.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", default=True, help="do not pin it")
    parser.add_argument("--local-rank", type=int, dest="local_rank", default=-1, help="as --local_rank")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and the names (dest) of those given on the command line, also if given as the default."""
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, _UNSET)))
    given = {name for name, value in vars(args).items() if value is not _UNSET}
    for name in defaults.keys() - given:
        setattr(args, name, defaults[name])
    for name in FOLDERS & given:
        not_empty(getattr(args, name), f"--{name}")
    if hasattr(args, "dist_url"):
        with flag_names(parser):
            _apply_process_flags(args, given)
    return args, given


def _apply_process_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Check the process flags against the launcher; LOCAL_RANK and the default number of workers follow them."""
    options = read_options(ProcessOptions, args)
    processes = launched("WORLD_SIZE")
    if "world_size" in given and options.world_size != processes:
        advice = "leave the flag out and use torchrun --nproc_per_node"
        raise ValueError(f"--world_size {options.world_size}, but {processes} processes were launched; {advice}")
    rank = options.local_rank
    if rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(rank))
    if rank >= 0 and launched("LOCAL_RANK") != rank:
        launcher = f"the launcher's LOCAL_RANK {os.environ['LOCAL_RANK']}"
        raise ValueError(f"--local_rank {rank} contradicts {launcher}; leave the flag out")
    if "num_workers" not in given:
        cores = (os.cpu_count() or 1) // launched("LOCAL_WORLD_SIZE")
        args.num_workers = min(args.num_workers, max(1, cores))


def not_empty(folder: str | Path, flag: str) -> None:
    """ValueError for an empty name, which would mean the current directory: the variable behind it may be unset."""
    if str(folder) == "":
        raise ValueError(f'{flag} is "": name a folder ("." is the current directory)')


def check_writable(folder: str | Path, flag: str) -> Path:
    """Make the folder if need be and write a file in it; ValueError naming the flag if that fails."""
    not_empty(folder, flag)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({flag}): {error.strerror or error}") from error
    return folder


@contextlib.contextmanager
def own_folder(folder: str | Path, flag: str) -> Iterator[None]:
    """Make `folder` and keep other runs out of it (`folder_lock`); an empty folder that was made here is removed again.

    One process of a run enters it: `with dist.on_main(own_folder(...))`.
    """
    made = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    check_writable(folder, flag)
    try:
        with folder_lock(folder, flag):
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def run_cli(main: Callable[[], object]) -> int:
    """Run an entry point; returns the exit code. Every failure ends in one line on stderr.

    0; 2 for bad input, and files that cannot be read or written (ValueError, OSError); 130 after ctrl-C; 1 for what
    was not foreseen, whose line says what was being done. TOKENBRIDGE_DEBUG=1 shows the traceback instead.
    """
    before, code = signal.getsignal(signal.SIGINT), 0
    started_here = before is start.end_at_once
    if started_here:
        signal.signal(signal.SIGINT, start.raise_interrupt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding stops nothing
    try:
        main()
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes on what the terminal sent already
        code, text = start.INTERRUPTED, "interrupted"
    except Exception as error:
        code = 2 if isinstance(error, (ValueError, OSError)) else 1
        text = f"error: {describe_error(error)}"
        if isinstance(error, BrokenPipeError):  # stdout's reader has gone; Python would flush it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if os.environ.get("TOKENBRIDGE_DEBUG"):
            raise
    finally:
        if started_here and code != start.INTERRUPTED:
            signal.signal(signal.SIGINT, start.end_at_once)
    print(text, file=sys.stderr, flush=True)
    if code == start.INTERRUPTED:
        signal.signal(signal.SIGINT, start.end_quietly if started_here else before)
    return code


def is_ours(file: str) -> bool:
    """Whether a file of code is this repository's."""
    return Path(file).is_relative_to(ROOT) and "site-packages" not in file


def describe_error(error: Exception) -> str:
    """An error in one line: bad input by its message, what the system refused with the file, else what was being done.

    torch puts the traceback of a loader's process into the message; only its last line counts.
    """
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:
        text = text.rstrip().splitlines()[-1].split(": ", 1)[-1]
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, CannotWrite):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        return ": ".join([*names, os_reason(error)])
    if isinstance(error, (ValueError, OSError)):
        return "; ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__
    what = getattr(error, "doing", "")
    place = [frame for frame in traceback.extract_tb(error.__traceback__) if is_ours(frame.filename)]
    at = f"{Path(place[-1].filename).relative_to(ROOT)}:{place[-1].lineno}, " if place else ""
    kind, text = type(error).__name__, first_line(text)
    reason = f"{kind}: {text or kind}"
    if isinstance(error, MemoryError) or re.search("can't allocate memory|out of memory", text):
        reason = f"not enough memory ({text or kind})"
    return f"{what + ': ' if what else ''}{reason} ({at}TOKENBRIDGE_DEBUG=1 shows the traceback)"
