"""--preset large_eval and huge_eval: the published settings (SPEC 6, 9), flags that win, the comparison at the end."""

import argparse

import pytest
from conftest import REPO

from main_tokenbridge import build_parser
from util.cli import parse
from util.eval_presets import EVAL_PRESETS, EXPECTED, apply_eval_preset, comparison


def test_settings_and_numbers_are_the_published_ones() -> None:
    large, huge = EVAL_PRESETS["large_eval"], EVAL_PRESETS["huge_eval"]
    assert (large["cfg"], large["temperature"], huge["cfg"], huge["temperature"]) == (3.1, 0.96, 3.45, 0.91)
    readme = (REPO / "README.md").read_text()
    for name, words in (("large_eval", "1.76 / 294.8"), ("huge_eval", "1.55 / 313.3")):
        assert words == f"{EXPECTED[name]['fid']} / {EXPECTED[name]['inception_score']}" and words in readme
    flags = {action.dest for action in build_parser()._actions}
    assert all(name in flags for preset in EVAL_PRESETS.values() for name in preset)


def test_given_flags_win_and_all_is_said(messages: list[str]) -> None:
    args, given = parse(build_parser(), ["--cfg", "2", "--num_images", "20", "--cfg_schedule", "linear"])
    args.preset = "large_eval"
    apply_eval_preset(args, given)
    assert args.evaluate and args.cfg == [2.0] and args.num_images == 20 and args.temperature == 0.96 and args.model == "tokenbridge_large"
    assert args.resume == "pretrained_models/tokenbridge/tokenbridge_large" and {"model", "temperature", "resume"} <= given
    assert any("--preset large_eval: " in line and "--cfg 3.1" in line and "--evaluate" in line for line in messages)
    assert any(line.startswith("given on the command line instead of") and "--cfg (preset 3.1)" in line and "--num_images (preset 50000)" in line
               and "cfg_schedule" not in line for line in messages)
    assert any("expected (published): FID 1.76, Inception Score 294.8, precision 0.8, recall 0.63; with other settings" in line for line in messages)


def test_the_comparison() -> None:
    record = dict(EVAL_PRESETS["huge_eval"]) | {"fid": 1.60, "inception_score": 310.3, "precision": None, "recall": 0.65}
    lines = comparison("huge_eval", record).splitlines()
    assert lines[1].split() == ["FID", "1.55", "1.6", "+0.05"] and lines[2].split() == ["Inception", "Score", "313.3", "310.3", "-3"]
    assert lines[3].split()[-2:] == ["not", "computed"] and lines[-1] == "settings are the published ones"
    other = record | {"num_images": 20, "cfg": 3.1}
    assert comparison("huge_eval", other).endswith("not comparable: cfg 3.1 instead of 3.45; num_images 20 instead of 50000")


def test_unknown_presets() -> None:
    with pytest.raises(KeyError):
        apply_eval_preset(argparse.Namespace(preset="medium_eval"), set())
