"""evaluation/published.py: published figures beside those of a run, with every setting that differs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from checkpoints.download import PRECISION_RECALL_HINT
from checkpoints.transfer import file_hash
from evaluation.evaluator import plain
from evaluation.published import INCEPTION_SHA256, PR_REFERENCE, STATS_BLOB, comparison
from generation.pipeline import generation_settings
from generation.sweep import SweepOptions
from main_tokenbridge import build_parser
from util import dist
from util.cli import parse
from util.options import read_options
from util.presets import apply_preset, load_preset

ALWAYS = "always different (docs/differences.md): the random numbers, and the VAE decodes in float32"


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --device auto choose CUDA; nothing is computed there."""
    monkeypatch.setattr(dist, "pick_device", lambda flag: torch.device("cpu" if flag == "cpu" else "cuda:0"))


def record_of(preset: str, *flags: str, **scores: object) -> dict:
    """The line of eval.jsonl of a preset and flags on 8 CUDA devices with published weights, VAE and statistics."""
    args, given = parse(build_parser(), flags)
    apply_preset(args, given, load_preset(preset), 8)
    ((args.cfg, args.temperature),) = read_options(SweepOptions, args).pairs(["evaluate"])
    names = ("num_images", "fid_stats", "weights", "model", "img_size", "vae_path")
    names += ("quant_bits", "quant_min", "quant_max", "class_num")
    record = {"fid": 1.60, "inception_score": 310.3, "precision": None, "recall": 0.65}
    record |= plain(generation_settings(args, torch.device("cuda"))) | {name: getattr(args, name) for name in names}
    record |= {"checkpoint": f"{args.resume}/checkpoint-last.pth", "inception_sha256": INCEPTION_SHA256 + "0" * 56}
    run = {"head_start": "official", "world_size": 8, "device": "cuda:0", "tf32": False, "torch": "2.15"}
    return record | run | scores


def lines_of(preset: str, record: dict) -> list[str]:
    """The lines of the comparison."""
    return comparison(load_preset(preset), record).splitlines()


@pytest.mark.parametrize("preset", ["large_eval", "huge_eval"])
def test_the_comparison_of_a_published_run(preset: str, with_cuda: None) -> None:
    record, published = record_of(preset), load_preset(preset).expected
    lines = lines_of(preset, record)
    assert lines[1].split() == ["FID", f"{published['FID']}", "1.6", f"{1.6 - published['FID']:+.4g}"]
    assert lines[2].split()[:4] == ["Inception", "Score", f"{published['Inception Score']}", "310.3"]
    assert lines[3].split()[-2:] == ["not", "computed"]
    assert lines[5:] == ["settings are the published ones", ALWAYS, PRECISION_RECALL_HINT]
    assert "python -m tools.download adm_batch" in lines[-1] and f"--pr_reference {PR_REFERENCE}" in lines[-1]
    assert not any("adm_batch" in line for line in lines_of(preset, record | {"precision": 0.8}))
    assert load_preset(preset).decisive.keys() - {"precision"} <= record.keys()  # nothing published goes unchecked


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
            "checkpoint OUT/checkpoint-last.pth instead of "
            "pretrained_models/tokenbridge/tokenbridge_huge/checkpoint-last.pth",
        ),
        (["--fid_stats", "mine.npz"], "fid_stats mine.npz instead of fid_stats/adm_in256_stats.npz"),
    ],
)
def test_a_flag_that_changes_the_result_is_named(flags: list[str], words: str, with_cuda: None) -> None:
    line = lines_of("huge_eval", record_of("huge_eval", *flags))[5]
    assert line.startswith("differs from the published run, figures are not comparable: ")
    assert words in line and ";" not in line


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
    assert words in lines_of("large_eval", record_of("large_eval", **found))[5]


def test_speed_and_seed_do_not_make_figures_incomparable(with_cuda: None) -> None:
    record = record_of("large_eval", "--eval_bsz", "32", "--seed", "7", world_size=4)
    assert lines_of("large_eval", record)[5:] == [
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
    line = lines_of("large_eval", record_of("large_eval", fid_stats=str(path)))[5]
    assert line.endswith(f"not comparable: fid_stats {path} has another content than the published file")


def test_adms_reference_batch_for_precision_and_recall_is_as_published(with_cuda: None) -> None:
    record = record_of("large_eval", pr_reference="elsewhere/VIRTUAL_imagenet256_labeled.npz")
    assert lines_of("large_eval", record)[5] == "settings are the published ones"


def test_the_inception_weights_are_torch_fidelitys() -> None:
    assert URL_INCEPTION_V3.endswith(f"-{INCEPTION_SHA256}.pth")
