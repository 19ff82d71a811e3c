"""--preset large_eval and huge_eval: the published settings (SPEC 6, 9), flags that win, the comparison at the end."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from checkpoints.download import PRECISION_RECALL_HINT, file_hash
from evaluation.presets import (
    EVAL_PRESETS,
    EXPECTED,
    INCEPTION_SHA256,
    PR_REFERENCE,
    STATS_BLOB,
    apply_eval_preset,
    comparison,
    published_settings,
)
from evaluation.scores import plain
from generation.pipeline import sample_settings
from main_tokenbridge import build_parser, sweep_values
from tests.helpers import REPO
from util import dist
from util.cli import parse

ALWAYS = "always different (docs/differences.md): the random numbers, and the VAE decodes in float32"


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --device auto choose CUDA; nothing is computed there."""
    monkeypatch.setattr(dist, "pick_device", lambda flag: torch.device("cpu" if flag == "cpu" else "cuda:0"))


def arguments(preset: str, *flags: str) -> tuple[argparse.Namespace, set[str]]:
    args, given = parse(build_parser(), ["--preset", preset, *flags])
    apply_eval_preset(args, given)
    sweep_values(args)
    return args, given


def record_of(args: argparse.Namespace, **scores: object) -> dict:
    """The line of eval.jsonl that these arguments lead to on 8 CUDA devices with published weights, VAE and statistics."""
    names = (
        "num_images",
        "fid_stats",
        "weights",
        "model",
        "img_size",
        "vae_path",
        "quant_bits",
        "quant_min",
        "quant_max",
        "class_num",
    )
    figures = {"fid": 1.60, "inception_score": 310.3, "precision": None, "recall": 0.65}
    return (
        figures
        | plain(sample_settings(args, torch.device("cuda")))
        | {name: getattr(args, name) for name in names}
        | {
            "checkpoint": f"{args.resume}/checkpoint-last.pth",
            "inception_sha256": INCEPTION_SHA256 + "0" * 56,
            "head_start": "official",
            "world_size": 8,
            "device": "cuda:0",
            "tf32": False,
            "torch": "2.15",
        }
        | scores
    )


def test_settings_and_numbers_are_the_published_ones() -> None:
    large, huge = EVAL_PRESETS["large_eval"], EVAL_PRESETS["huge_eval"]
    assert (large["cfg"], large["temperature"], huge["cfg"], huge["temperature"]) == (3.1, 0.96, 3.45, 0.91)
    assert large["precision"] == huge["precision"] == "fp16"
    readme = (REPO / "README.md").read_text()
    for name, words in (("large_eval", "1.76 / 294.8"), ("huge_eval", "1.55 / 313.3")):
        assert words == f"{EXPECTED[name]['fid']} / {EXPECTED[name]['inception_score']}" and words in readme
    flags = {action.dest for action in build_parser()._actions}
    assert all(name in flags for preset in EVAL_PRESETS.values() for name in preset)


def test_given_flags_win_and_all_is_said(messages: list[str]) -> None:
    args, given = parse(build_parser(), ["--cfg", "2", "--num_images", "20", "--cfg_schedule", "linear"])
    args.preset = "large_eval"
    apply_eval_preset(args, given)
    assert (
        args.evaluate
        and args.cfg == [2.0]
        and args.num_images == 20
        and args.temperature == 0.96
        and args.model == "tokenbridge_large"
    )
    assert (
        args.resume == "pretrained_models/tokenbridge/tokenbridge_large" and {"model", "temperature", "resume"} <= given
    )
    assert any("--preset large_eval: " in line and "--cfg 3.1" in line and "--evaluate" in line for line in messages)
    assert any(
        line.startswith("given on the command line instead of")
        and "--cfg (preset 3.1)" in line
        and "--num_images (preset 50000)" in line
        and "cfg_schedule" not in line
        for line in messages
    )
    assert any(
        "expected (published): FID 1.76, Inception Score 294.8, precision 0.8, recall 0.63; with other settings" in line
        for line in messages
    )


@pytest.mark.parametrize("preset", EVAL_PRESETS)
def test_fp16_as_published_on_a_gpu(preset: str, with_cuda: None, messages: list[str]) -> None:
    assert arguments(preset)[0].precision == "fp16"
    assert arguments(preset, "--precision", "bf16")[0].precision == "bf16"
    assert any("--precision (preset fp16)" in line for line in messages)


def test_float32_on_a_cpu_unless_given(messages: list[str]) -> None:
    assert arguments("large_eval", "--device", "cpu")[0].precision == "fp32"
    assert any("on a CPU: --precision fp32" in line for line in messages)
    assert arguments("large_eval", "--device", "cpu", "--precision", "fp16")[0].precision == "fp16"


@pytest.mark.parametrize("preset", EVAL_PRESETS)
def test_the_comparison_of_a_published_run(preset: str, with_cuda: None) -> None:
    record = record_of(arguments(preset)[0])
    lines = comparison(preset, record).splitlines()
    published = EXPECTED[preset]
    assert lines[1].split() == ["FID", f"{published['fid']}", "1.6", f"{1.6 - published['fid']:+.4g}"]
    assert lines[2].split()[:4] == ["Inception", "Score", f"{published['inception_score']}", "310.3"]
    assert lines[3].split()[-2:] == ["not", "computed"]
    assert lines[5:] == ["settings are the published ones", ALWAYS, PRECISION_RECALL_HINT]
    assert "python -m tools.download adm_batch" in lines[-1] and f"--pr_reference {PR_REFERENCE}" in lines[-1]
    assert "adm_batch" not in comparison(preset, record | {"precision": 0.8})
    assert published_settings(preset).keys() - {"precision"} <= record.keys()  # nothing published goes unchecked


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--precision", "bf16"], "precision bf16 instead of fp16"),
        (["--num_images", "20"], "num_images 20 instead of 50000"),
        (["--num_iter", "64"], "num_iter 64 instead of 256"),
        (["--cfg", "3.1"], "cfg 3.1 instead of 3.45"),
        (["--cfg_schedule", "constant"], "cfg_schedule constant instead of linear"),
        (["--temperature", "1"], "temperature 1.0 instead of 0.91"),
        (["--weights", "model"], "weights model instead of ema"),
        (["--order", "halton"], "order halton instead of random"),
        (["--top_k", "8"], "top_k 8 instead of 0"),
        (["--channel_temperature", "1", "0.9"], "channel_temperature [1.0, 0.9] instead of []"),
        (["--reuse_features", "2"], "reuse_features 2 instead of 1"),
        (["--vae_path", "mine.pth"], "vae_path mine.pth instead of pretrained_models/"),
        (
            ["--resume", "OUT"],
            "checkpoint OUT/checkpoint-last.pth instead of pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth",
        ),
        (["--fid_stats", "mine.npz"], "fid_stats mine.npz instead of fid_stats/adm_in256_stats.npz"),
    ],
)
def test_a_flag_that_changes_the_result_is_named(flags: list[str], words: str, with_cuda: None) -> None:
    line = comparison("huge_eval", record_of(arguments("huge_eval", *flags)[0])).splitlines()[5]
    assert (
        line.startswith("differs from the published run, figures are not comparable: ")
        and words in line
        and ";" not in line
    )


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"device": "cpu"}, "device cpu instead of cuda"),
        ({"tf32": True}, "tf32 True instead of False"),
        ({"head_start": "trained"}, "head_start trained instead of official"),
        ({"quant_bits": 5}, "quant_bits 5 instead of 6"),
        ({"pr_reference": "mine.npz"}, "pr_reference mine.npz instead of fid_stats/VIRTUAL_imagenet256_labeled.npz"),
        ({"inception_sha256": "ab"}, "inception_weights other than torch-fidelity's"),
    ],
)
def test_what_the_run_itself_shows_is_named(found: dict, words: str, with_cuda: None) -> None:
    assert words in comparison("large_eval", record_of(arguments("large_eval")[0], **found)).splitlines()[5]


def test_speed_and_seed_do_not_make_figures_incomparable(with_cuda: None) -> None:
    record = record_of(arguments("large_eval", "--eval_bsz", "32", "--seed", "7")[0], world_size=4)
    assert comparison("large_eval", record).splitlines()[5:] == [
        "settings are the published ones",
        "differs, but the images are drawn from the same distribution: seed 7 instead of 1; "
        "eval_bsz 32 instead of 256; processes 4 instead of 8",
        ALWAYS,
        PRECISION_RECALL_HINT,
    ]


def test_a_statistics_file_of_the_right_name_and_another_content(with_cuda: None, tmp_path: Path) -> None:
    path = tmp_path / "adm_in256_stats.npz"
    np.savez(path, mu=np.zeros(2), sigma=np.eye(2))
    assert file_hash(path, STATS_BLOB) != STATS_BLOB
    line = comparison("large_eval", record_of(arguments("large_eval")[0], fid_stats=str(path))).splitlines()[5]
    assert line.endswith(f"not comparable: fid_stats {path} has another content than the published file")


def test_adms_reference_batch_for_precision_and_recall_is_as_published(with_cuda: None) -> None:
    record = record_of(arguments("large_eval")[0], pr_reference="elsewhere/VIRTUAL_imagenet256_labeled.npz")
    assert comparison("large_eval", record).splitlines()[5] == "settings are the published ones"


def test_the_inception_weights_are_torch_fidelitys() -> None:
    assert URL_INCEPTION_V3.endswith(f"-{INCEPTION_SHA256}.pth")


def test_unknown_presets() -> None:
    with pytest.raises(KeyError):
        apply_eval_preset(argparse.Namespace(preset="medium_eval"), set())
