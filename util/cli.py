"""What the command lines of all entry points share: parsing, process flags, checks that name the flag."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

_UNSET = object()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with defaults and a description whose lines stay as written."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that shows defaults and takes no abbreviated flags: a misspelt one is an error, never another flag."""
    return argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=HelpFormatter)


def add_process_flags(parser: argparse.ArgumentParser, seed: int) -> None:
    """Device, seed, loader and launcher flags; names and meanings as published, --device defaults to auto instead of cuda."""
    group = parser.add_argument_group("processes")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto takes cuda where there is one")
    group.add_argument("--seed", type=int, default=seed, help="seed of every random draw")
    group.add_argument(
        "--num_workers",
        type=int,
        default=10,
        help="loader processes per training process, by default no more than it has cores; 0 loads in the process itself",
    )
    group.add_argument(
        "--pin_mem", action="store_true", default=True, help="pin the loader's memory (faster copies to a GPU)"
    )
    group.add_argument("--no_pin_mem", action="store_false", dest="pin_mem", help="do not pin it")
    group.add_argument(
        "--world_size", type=int, default=1, help="set by torchrun; accepted for old launch lines, must agree with it"
    )
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by torchrun; accepted for old launch lines"
    )
    group.add_argument(
        "--dist_on_itp", action="store_true", help="refused: MPI launch on one particular cluster; use torchrun"
    )
    group.add_argument("--dist_url", default="env://", help="where the processes meet (torch.distributed init_method)")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and the names (dest) of those given on the command line, to tell a default from a wish."""
    defaults = {action.dest: action.default for action in parser._actions if action.dest != "help"}
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, _UNSET)))
    given = {name for name, value in vars(args).items() if value is not _UNSET}
    for name in defaults.keys() - given:
        setattr(args, name, defaults[name])
    if hasattr(args, "dist_url"):
        _check_process_flags(args, given)
    return args, given


def _check_process_flags(args: argparse.Namespace, given: set[str]) -> None:
    if args.dist_on_itp:
        raise ValueError(
            "--dist_on_itp is refused: it belongs to the MPI launcher of one particular cluster; start the processes with torchrun"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "world_size" in given and args.world_size != launched:
        raise ValueError(
            f"--world_size {args.world_size}, but {launched} processes were launched; leave the flag out and use torchrun --nproc_per_node"
        )
    if args.local_rank >= 0 and int(os.environ.setdefault("LOCAL_RANK", str(args.local_rank))) != args.local_rank:
        raise ValueError(
            f"--local_rank {args.local_rank} contradicts the launcher's LOCAL_RANK {os.environ['LOCAL_RANK']}; leave the flag out"
        )
    if "num_workers" not in given:
        args.num_workers = min(
            args.num_workers, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        )
    at_least(args, num_workers=0)


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
