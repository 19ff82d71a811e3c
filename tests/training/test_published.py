"""training/published.py: every setting in which a run of a preset differs from the published training is named."""

from pathlib import Path

import pytest
import torch

import main_tokenbridge
from checkpoints.build import StructureOptions
from checkpoints.start import Start
from tests.helpers import tiny_model, tiny_vae
from training.published import training_differences
from util import dist
from util.cli import parse
from util.presets import apply_preset, load_preset

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SAME = "--preset large: settings are the published ones"


def differences(
    name: str, *flags: str, device: torch.device = CUDA, cache: dict | None = None, processes: int = 32
) -> list[str]:
    """The lines about a run of the preset with these flags on the command line."""
    args, given = parse(main_tokenbridge.build_parser(), flags)
    apply_preset(args, given, load_preset(name), processes)
    return training_differences(load_preset(name), vars(args), device, cache)


@pytest.fixture
def published_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 processes without TF32."""
    monkeypatch.setattr(dist, "world_size", lambda: 32)
    monkeypatch.setattr(dist, "allows_tf32", lambda device: False)


@pytest.mark.parametrize("name", ["large", "huge"])
def test_a_published_run_differs_in_nothing(name: str, published_machine: None) -> None:
    assert differences(name, "--precision", "fp16") == [f"--preset {name}: settings are the published ones"]


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
    (line,) = differences("large", "--precision", "fp16", *flags)
    assert line.startswith("--preset large differs from the published training: ") and words in line


def test_precision_device_and_tf32_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    for device, words in (
        (CUDA, "precision bf16 instead of fp16; tf32 True instead of False"),
        (CPU, "precision fp32 instead of fp16; device cpu instead of cuda"),
    ):
        line = f"--preset huge differs from the published training: {words}"
        assert differences("huge", device=device) == [line]


def test_processes_accumulation_and_seed_are_apart(published_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "world_size", lambda: 8)
    words = "seed 3 instead of 1; processes 8 instead of 32; accum_iter 4 instead of 1"
    neutral = f"differs, but the training draws from the same distributions: {words}"
    assert differences("large", "--precision", "fp16", "--seed", "3", processes=8) == [SAME, neutral]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, SAME),
        ({"format": "shards", "mode": "moments", "dtype": "float32", "crops": 1}, SAME),
        ({"mode": "moments", "dtype": "float16", "crops": 1}, "cache float16 moments instead of float32 moments"),
        ({"mode": "mean", "dtype": "float16", "crops": 1}, "cache float16 mean instead"),
        ({"mode": "indices", "dtype": "uint8"}, "cache quantized indices"),
        ({"mode": "moments", "dtype": "float32", "crops": 4}, "cache float32 moments of 4 crops instead of float32"),
    ],
)
def test_what_the_cache_holds(record: dict | None, words: str, published_machine: None) -> None:
    flags = ("--precision", "fp16", "--use_cached", "--cached_path", "CACHE")
    (line,) = differences("large", *flags, cache=record)
    assert words in line and (line == SAME) == (words == SAME)


def test_a_preset_with_nothing_published_is_compared_with_nothing() -> None:
    assert differences("digits", device=CPU) == []


def test_the_command_says_it_before_and_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    start = Start(tiny_model(), tiny_vae(), None, None, StructureOptions(model="tokenbridge_large"), "", CPU)
    monkeypatch.setattr(main_tokenbridge, "load_start", lambda *args, **kwargs: start)
    monkeypatch.setattr(main_tokenbridge, "train", lambda *args, **more: messages.append("TRAINING"))
    main_tokenbridge.main(["--preset", "large", "--device", "cpu", "--output_dir", str(tmp_path)])
    words = "precision fp32 instead of fp16; device cpu instead of cuda"
    said = f"--preset large differs from the published training: {words}"
    assert [line for line in messages if line in (said, "TRAINING")] == [said, "TRAINING", said]
    assert messages[-1].endswith("processes 1 instead of 32; accum_iter 32 instead of 1")
