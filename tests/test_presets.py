"""util/presets.py: every flag printed, any flag given wins, the published global batch on any number of processes."""

import shlex

import pytest

import main_tokenbridge
from util.cli import parse
from util.presets import PRESETS, apply_preset


def arguments(*flags: str, processes: int = 32):  # noqa: ANN201
    args, given = parse(main_tokenbridge.build_parser(), list(flags))
    apply_preset(args, given, processes)
    return args, given


@pytest.mark.parametrize("name", PRESETS)
def test_the_printed_line_is_the_preset(name: str, messages: list[str]) -> None:
    """What it prints, typed as a command line, gives the same arguments."""
    args, _ = arguments("--preset", name)
    line = next(line for line in messages if line.startswith(f"--preset {name}: "))
    typed, given = parse(main_tokenbridge.build_parser(), shlex.split(line.partition(": ")[2]))
    assert {key: value for key, value in vars(typed).items() if key != "preset"} == {key: value for key, value in vars(args).items() if key != "preset"}
    assert PRESETS[name].keys() <= given


def test_the_published_recipes() -> None:
    large, huge = arguments("--preset", "large")[0], arguments("--preset", "huge")[0]
    assert (large.model, large.epochs, large.warmup_epochs) == ("tokenbridge_large", 400, 100)
    assert (huge.model, huge.epochs, huge.warmup_epochs) == ("tokenbridge_huge", 800, 200)
    for args in (large, huge):
        assert args.batch_size * args.accum_iter * 32 == 2048 and args.blr == 5e-5 and args.lr is None and args.weight_decay == 0.02


def test_flags_given_win_and_are_named(messages: list[str]) -> None:
    args, given = arguments("--preset", "large", "--epochs", "10", "--blr", "1e-4", "--quant_bits", "6")
    assert (args.epochs, args.blr, args.warmup_epochs) == (10, 1e-4, 100) and "warmup_epochs" in given
    line = next(line for line in messages if "instead of the preset's" in line)
    assert "--epochs (preset 400)" in line and "--blr (preset 5e-05)" in line and "quant_bits" not in line


@pytest.mark.parametrize(("processes", "flags", "accum", "warned"), [
    (32, (), 1, False), (8, (), 4, False), (1, (), 32, False), (3, (), 1, True), (8, ("--batch_size", "32"), 1, True),
    (8, ("--accum_iter", "2"), 2, True), (16, ("--batch_size", "32", "--accum_iter", "4"), 4, False)])
def test_the_global_batch_stays_the_published_one(processes: int, flags: tuple[str, ...], accum: int, warned: bool, messages: list[str]) -> None:
    assert arguments("--preset", "large", *flags, processes=processes)[0].accum_iter == accum
    assert any("the published one 2048" in line for line in messages) == warned


def test_without_a_preset_nothing_changes(messages: list[str]) -> None:
    args, given = arguments("--epochs", "3")
    assert args.preset is None and given == {"epochs"} and not messages
