"""util/cli.py: what the command lines of all entry points share."""

import argparse
import os

import pytest

from util.cli import add_process_flags, at_least, check_writable, make_parser, parse


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
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


# ------------------------------------------------------------------------------------------------------- parsing


def test_defaults(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    args, given = parse(small_parser(), [])
    assert given == set()
    assert vars(args) == {
        "num_images": 50,
        "cfg": 1.0,
        "name": "x",
        "evaluate": False,
        "device": "auto",
        "seed": 3,
        "num_workers": 10,
        "pin_mem": True,
        "world_size": 1,
        "local_rank": -1,
        "dist_on_itp": False,
        "dist_url": "env://",
    }


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


@pytest.mark.parametrize("argv", [["--num_image", "3"], ["--eval"], ["--cf", "2"], ["--nosuch"], ["extra"]])
def test_abbreviations_and_unknown_flags_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(small_parser(), argv)
    assert caught.value.code == 2 and argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--num_images", "many"], ["--cfg"], ["--name", "z"]])
def test_values_of_another_kind_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(small_parser(), argv)
    assert caught.value.code == 2 and argv[0] in capsys.readouterr().err


def test_a_wrong_choice_lists_the_choices(capsys):
    with pytest.raises(SystemExit):
        parse(small_parser(), ["--name", "z"])
    message = capsys.readouterr().err
    assert "'z'" in message and "x" in message.split("choose from")[1] and "y" in message.split("choose from")[1]


def test_help_shows_defaults_and_keeps_lines(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(small_parser(), ["--help"])
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "A script.\n  with its own lines" in shown and "(default: auto)" in shown


# ------------------------------------------------------------------------------------------------------- process flags


def test_dist_on_itp_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="--dist_on_itp is refused.*torchrun"):
        parse(small_parser(), ["--dist_on_itp"])


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


def test_num_workers_may_be_0_but_not_less():
    assert parse(small_parser(), ["--num_workers", "0"])[0].num_workers == 0
    with pytest.raises(ValueError, match=r"num_workers must be at least 0, got -1 \(--num_workers\)"):
        parse(small_parser(), ["--num_workers", "-1"])


def test_pin_mem_both_ways():
    assert [parse(small_parser(), argv)[0].pin_mem for argv in ([], ["--pin_mem"], ["--no_pin_mem"])] == [
        True,
        True,
        False,
    ]


def test_a_parser_without_process_flags():
    parser = make_parser("x")
    parser.add_argument("--bits", type=int, default=6)
    assert parse(parser, ["--bits", "4"])[0].bits == 4


# ------------------------------------------------------------------------------------------------------- checks


def test_at_least():
    args = argparse.Namespace(num_iter=1, temperature=0.0, max_steps=None, cfg=float("nan"))
    at_least(args, num_iter=1, temperature=0, max_steps=1)
    with pytest.raises(ValueError, match="--num_iter must be at least 2, got 1"):
        at_least(args, temperature=0, num_iter=2)
    with pytest.raises(ValueError, match="--cfg"):
        at_least(args, cfg=0)  # NaN is at least nothing


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
