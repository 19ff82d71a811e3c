"""What the command lines of all entry points share: parsing, process flags, checks that name the flag."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from util.options import ArgumentError, add_options, check_options, flag_names, option, read_options

_UNSET = object()


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
    seed: int = option(0, "seed of every random draw", lowest=0)
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
    if hasattr(args, "dist_url"):
        with flag_names(parser):
            _apply_process_flags(args, given)
    return args, given


def _apply_process_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Check the process flags against the launcher; LOCAL_RANK and the default number of workers follow them."""
    options = read_options(ProcessOptions, args)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "world_size" in given and options.world_size != launched:
        advice = "leave the flag out and use torchrun --nproc_per_node"
        raise ValueError(f"--world_size {options.world_size}, but {launched} processes were launched; {advice}")
    rank = options.local_rank
    if rank >= 0 and int(os.environ.setdefault("LOCAL_RANK", str(rank))) != rank:
        launcher = f"the launcher's LOCAL_RANK {os.environ['LOCAL_RANK']}"
        raise ValueError(f"--local_rank {rank} contradicts {launcher}; leave the flag out")
    if "num_workers" not in given:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        args.num_workers = min(args.num_workers, max(1, cores))


def at_least(args: argparse.Namespace, **lowest: float) -> None:
    """ValueError unless every named argument is None or at least its lowest value."""
    for name, value in lowest.items():
        given = getattr(args, name)
        if given is not None and not given >= value:
            raise ValueError(f"--{name} must be at least {value}, got {given}")


def check_writable(folder: str | Path, flag: str) -> Path:
    """Make the folder if need be and write a file in it; ValueError naming the flag if that fails."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to {folder} ({flag}): {error.strerror or error}") from error
    return folder
