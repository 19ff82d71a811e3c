"""util/presets.py and configs/: every flag logged, any flag on the command line wins, the global batch stays."""

import argparse
import shlex

import pytest
import torch

from main_tokenbridge import build_parser
from tests.helpers import REPO
from util import dist, presets
from util.cli import parse
from util.presets import Preset, apply_preset, load_preset, preset_names

EVALUATIONS = ("large_eval", "huge_eval")


def arguments(name: str, *flags: str, processes: int = 32) -> tuple[argparse.Namespace, set[str]]:
    """The arguments of the command line with a preset, and the names of those given."""
    args, given = parse(build_parser(), flags)
    apply_preset(args, given, load_preset(name), processes)
    return args, given


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --device auto choose CUDA; nothing is computed there."""
    monkeypatch.setattr(dist, "pick_device", lambda flag: torch.device("cpu" if flag == "cpu" else "cuda:0"))


@pytest.mark.parametrize("name", preset_names())
def test_the_logged_line_is_the_preset(name: str, messages: list[str]) -> None:
    """The logged line, typed as a command line, gives the same arguments; every flag of the file exists."""
    args, given = arguments(name)
    line = next(line for line in messages if line.startswith(f"--preset {name}: "))
    typed, _ = parse(build_parser(), shlex.split(line.partition(": ")[2]))
    single = {key: value[0] for key, value in vars(typed).items() if isinstance(value, list) and len(value) == 1}
    assert vars(typed) | single == vars(args)
    assert load_preset(name).flags.keys() <= given
    assert any(line.startswith("expected (") for line in messages)


def test_the_published_recipes() -> None:
    for name, epochs, warmup_epochs in (("large", 400, 100), ("huge", 800, 200)):
        args = arguments(name)[0]
        assert (args.model, args.epochs, args.warmup_epochs) == (f"tokenbridge_{name}", epochs, warmup_epochs)
        assert args.batch_size * args.accum_iter * 32 == load_preset(name).global_batch == 2048
        assert (args.blr, args.lr, args.weight_decay) == (5e-5, None, 0.02)


def test_the_published_evaluations() -> None:
    table = (REPO / "docs" / "published.md").read_text()
    for name, cfg, temperature, words in zip(
        EVALUATIONS, (3.1, 3.45), (0.96, 0.91), ("1.76 / 294.8", "1.55 / 313.3"), strict=True
    ):
        preset = load_preset(name)
        flags = preset.flags
        assert (flags["cfg"], flags["temperature"], flags["precision"]) == (cfg, temperature, "fp16")
        assert words == f"{preset.expected['FID']} / {preset.expected['Inception Score']}" and words in table


def test_flags_given_win_and_are_named(messages: list[str]) -> None:
    args, given = arguments("large", "--epochs", "10", "--blr", "1e-4", "--quant_bits", "6")
    assert (args.epochs, args.blr, args.warmup_epochs) == (10, 1e-4, 100) and "warmup_epochs" in given
    line = next(line for line in messages if "instead of the preset's" in line)
    assert "--epochs (preset 400)" in line and "--blr (preset 5e-05)" in line and "quant_bits" not in line


def test_flags_of_an_evaluation_win_and_are_named(messages: list[str]) -> None:
    args, given = arguments("large_eval", "--cfg", "2", "--num_images", "20", "--cfg_schedule", "linear")
    assert args.evaluate and (args.cfg, args.num_images, args.temperature) == ([2.0], 20, 0.96)
    assert args.resume == "pretrained_models/tokenbridge/tokenbridge_large"
    assert args.model == "tokenbridge_large" and {"model", "temperature", "resume"} <= given
    line = next(line for line in messages if line.startswith("--preset large_eval: "))
    assert "--cfg 2.0" in line and "--evaluate" in line
    line = next(line for line in messages if line.startswith("given on the command line instead of"))
    assert "--cfg (preset 3.1)" in line and "--num_images (preset 50000)" in line and "cfg_schedule" not in line
    expected = "expected (published): FID 1.76, Inception Score 294.8, precision 0.8, recall 0.63; with other settings"
    assert any(expected in line for line in messages)


@pytest.mark.parametrize(
    ("processes", "flags", "accum", "warned"),
    [
        (32, (), 1, False),
        (8, (), 4, False),
        (1, (), 32, False),
        (3, (), 1, True),
        (8, ("--batch_size", "32"), 1, True),
        (8, ("--accum_iter", "2"), 2, True),
        (16, ("--batch_size", "32", "--accum_iter", "4"), 4, False),
    ],
)
def test_the_global_batch_stays_that_of_the_preset(
    processes: int, flags: tuple[str, ...], accum: int, warned: bool, messages: list[str]
) -> None:
    assert arguments("large", *flags, processes=processes)[0].accum_iter == accum
    assert any("the preset's 2048" in line for line in messages) == warned


@pytest.mark.parametrize("name", EVALUATIONS)
def test_fp16_as_published_on_a_gpu(name: str, with_cuda: None, messages: list[str]) -> None:
    assert arguments(name)[0].precision == "fp16"
    assert arguments(name, "--precision", "bf16")[0].precision == "bf16"
    assert any("--precision (preset fp16)" in line for line in messages)


def test_float32_on_a_cpu_unless_given(messages: list[str]) -> None:
    assert arguments("large_eval", "--device", "cpu")[0].precision == "fp32"
    assert any("on a CPU: --precision fp32" in line for line in messages)
    assert arguments("large_eval", "--device", "cpu", "--precision", "fp16")[0].precision == "fp16"


def test_the_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preset_names() == ["digits", "huge", "large", "photos", "huge_eval", "large_eval"]
    assert all(load_preset(name).source in ("published", "measured here") for name in preset_names())
    with pytest.raises(ValueError, match="preset 'medium_eval' is unknown; choose from digits, huge, large, photos"):
        load_preset("medium_eval")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    (tmp_path / "mine.yaml").write_text("flags: {epochs: 3}\n")
    assert load_preset("mine") == Preset("mine", {"epochs": 3}) and not load_preset("mine").evaluates
    for content, word in (("flag: {epochs: 3}\n", "flag"), ("flags: {epochs", "flow mapping")):
        (tmp_path / "mine.yaml").write_text(content)
        with pytest.raises(ValueError, match=rf"mine.yaml is no preset(.|\n)*{word}"):
            load_preset("mine")
