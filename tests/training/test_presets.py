"""training/presets.py: every flag printed, any flag given wins, the published global batch on any number of processes."""

import shlex

import pytest
import torch

import main_tokenbridge
from tests.helpers import tiny_model, tiny_vae
from training.presets import PRESETS, apply_preset, training_differences
from util import dist
from util.cli import parse


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
    assert {key: value for key, value in vars(typed).items() if key != "preset"} == {
        key: value for key, value in vars(args).items() if key != "preset"
    }
    assert PRESETS[name].keys() <= given


def test_the_published_recipes() -> None:
    large, huge = arguments("--preset", "large")[0], arguments("--preset", "huge")[0]
    assert (large.model, large.epochs, large.warmup_epochs) == ("tokenbridge_large", 400, 100)
    assert (huge.model, huge.epochs, huge.warmup_epochs) == ("tokenbridge_huge", 800, 200)
    for args in (large, huge):
        assert (
            args.batch_size * args.accum_iter * 32 == 2048
            and args.blr == 5e-5
            and args.lr is None
            and args.weight_decay == 0.02
        )


def test_flags_given_win_and_are_named(messages: list[str]) -> None:
    args, given = arguments("--preset", "large", "--epochs", "10", "--blr", "1e-4", "--quant_bits", "6")
    assert (args.epochs, args.blr, args.warmup_epochs) == (10, 1e-4, 100) and "warmup_epochs" in given
    line = next(line for line in messages if "instead of the preset's" in line)
    assert "--epochs (preset 400)" in line and "--blr (preset 5e-05)" in line and "quant_bits" not in line


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
def test_the_global_batch_stays_the_published_one(
    processes: int, flags: tuple[str, ...], accum: int, warned: bool, messages: list[str]
) -> None:
    assert arguments("--preset", "large", *flags, processes=processes)[0].accum_iter == accum
    assert any("the published one 2048" in line for line in messages) == warned


def test_without_a_preset_nothing_changes(messages: list[str]) -> None:
    args, given = arguments("--epochs", "3")
    assert args.preset is None and given == {"epochs"} and not messages


# ------------------------------------------------------------------------------------------------------------- what differs at the end

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def published_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 processes without TF32."""
    monkeypatch.setattr(dist, "world_size", lambda: 32)
    monkeypatch.setattr(dist, "allows_tf32", lambda device: False)


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_run_differs_in_nothing(name: str, published_machine: None) -> None:
    args, _ = arguments("--preset", name, "--precision", "fp16")
    assert training_differences(args, CUDA) == [f"--preset {name}: settings are the published ones"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--precision", "bf16"), "precision bf16 instead of fp16"),
        (("--epochs", "10"), "epochs 10 instead of 400"),
        (("--lr", "1e-3"), "lr 0.001 instead"),
        (("--batch_size", "32"), "batch_size 32 instead of 64; global_batch 1024 instead of 2048"),
        (("--no_flip",), "no_flip True instead of False"),
        (("--ema_warmup",), "ema_warmup True instead of False"),
        (("--max_steps", "9"), "max_steps 9 instead of None"),
        (("--head", "parallel"), "head parallel instead of autoregressive"),
        (("--vae_path", "mine.pth"), "vae_path mine.pth instead of pretrained_models"),
        (("--attn_dropout", "0"), "attn_dropout 0.0 instead of 0.1"),
    ],
)
def test_every_flag_that_changes_the_model_is_named(
    flags: tuple[str, ...], words: str, published_machine: None
) -> None:
    args, _ = arguments("--preset", "large", "--precision", "fp16", *flags)
    (line,) = training_differences(args, CUDA)
    assert line.startswith("--preset large differs from the published training: ") and words in line


def test_precision_device_and_tf32_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    args, _ = arguments("--preset", "huge")
    assert training_differences(args, CUDA) == [
        "--preset huge differs from the published training: precision bf16 instead of fp16; tf32 True instead of False"
    ]
    assert training_differences(args, CPU) == [
        "--preset huge differs from the published training: precision fp32 instead of fp16; device cpu instead of cuda"
    ]


def test_processes_accumulation_and_seed_are_apart(published_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 8)
    args, _ = arguments("--preset", "large", "--precision", "fp16", "--seed", "3", processes=8)
    assert training_differences(args, CUDA) == [
        "--preset large: settings are the published ones",
        "differs, but the training draws from the same "
        "distributions: seed 3 instead of 1; processes 8 instead of 32; accum_iter 4 instead of 1",
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, None),
        ({"format": "shards", "mode": "moments", "dtype": "float32", "crops": 1}, None),
        (
            {"format": "shards", "mode": "moments", "dtype": "float16", "crops": 1},
            "cache float16 moments instead of float32 moments",
        ),
        ({"mode": "mean", "dtype": "float16", "crops": 1}, "cache float16 mean instead"),
        ({"mode": "indices", "dtype": "uint8"}, "cache quantized indices"),
        (
            {"mode": "moments", "dtype": "float32", "crops": 4},
            "cache float32 moments of 4 crops instead of float32 moments",
        ),
    ],
)
def test_what_the_cache_holds(record: dict | None, words: str | None, published_machine: None) -> None:
    args, _ = arguments("--preset", "large", "--precision", "fp16", "--use_cached", "--cached_path", "CACHE")
    (line,) = training_differences(args, CUDA, record)
    assert words in line if words else line.endswith("settings are the published ones")


def test_no_preset_no_line() -> None:
    assert training_differences(arguments("--epochs", "3")[0], CPU) == []


def test_the_command_says_it_before_and_after_training(monkeypatch: pytest.MonkeyPatch, messages: list[str]) -> None:
    monkeypatch.setattr(main_tokenbridge, "read_checkpoint", lambda args: (None, None))
    # fetches the VAE that is not there
    monkeypatch.setattr("checkpoints.download.provide", lambda *args, **kwargs: None, raising=False)
    monkeypatch.setattr(main_tokenbridge, "load_vae", lambda *args: tiny_vae())
    monkeypatch.setattr(main_tokenbridge, "build_model", lambda *args: tiny_model())
    monkeypatch.setattr(main_tokenbridge, "train", lambda *args: messages.append("TRAINING"))
    main_tokenbridge.main(["--preset", "large", "--device", "cpu"])
    said = (
        "--preset large differs from the published training: precision fp32 instead of fp16; device cpu instead of cuda"
    )
    assert [line for line in messages if line in (said, "TRAINING")] == [said, "TRAINING", said]
    assert messages[-1].endswith("processes 1 instead of 32; accum_iter 32 instead of 1")
