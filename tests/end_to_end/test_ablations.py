"""demo/ablations.py: its figures on known answers, its verdicts, and a toy run of one ablation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import ablations
from demo.ablations import ABLATIONS, VARIANTS, bits_per_dim, summary, verdict
from demo.run import TOY, TRAINING
from main_tokenbridge import build_parser
from tests.helpers import tiny_model, tiny_vae


def test_every_variant_is_named_and_its_flags_exist() -> None:
    assert {variant for variants in ABLATIONS.values() for variant in variants} == set(VARIANTS)
    for flags in VARIANTS.values():
        build_parser().parse_args([*TRAINING.format(name="digits").split()[1:], *flags])


@pytest.mark.parametrize(
    "worse, better, direction, expected",
    [
        ([2.0, 2.1, 1.9], [1.0, 1.2, 0.9], -1, "holds"),
        ([2.0, 2.1, 1.9], [1.0, 1.2, 0.9], +1, "does not hold"),
        ([1.0, 2.0, 3.0], [1.1, 1.9, 3.05], +1, "undecided (within the spread)"),
        ([1.0, 2.0, 3.0], [1.3, 2.2, 3.3], +1, "holds"),  # a seed is compared with itself
        ([1.0], [5.0], +1, "undecided (one seed)"),
    ],
)
def test_verdicts_weigh_the_gain_against_its_spread(
    worse: list[float], better: list[float], direction: int, expected: str
) -> None:
    assert verdict(worse, better, direction) == expected


def test_bits_of_a_model_that_knows_nothing(image_root: Path) -> None:
    """All logits zero: log2 of the number of levels, whatever the images."""
    model = tiny_model(img_size=32, vae_stride=8, vae_embed_dim=4, channel_order=None, class_num=2)
    for head in model.channel_heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    bits = bits_per_dim(model, tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2)), image_root / "train", rounds=2)
    assert bits == pytest.approx(math.log2(model.num_levels), rel=1e-6)


def test_the_summary_leaves_bits_of_other_quantizers_uncompared() -> None:
    figures = [dict(accuracy=0.5 + i / 10, frechet=9.0 - i) for i in range(3)]
    runs = {
        variant: [{"bits_per_dim": 3.0 + seed} | figures[i] for seed in range(3)]
        for i, variant in enumerate(ABLATIONS["bits"])
    }
    found = summary("bits", runs)
    assert found["table"]["base"]["accuracy"] == [pytest.approx(0.7), pytest.approx(0)]
    assert list(found["signs"]) == ["4 bits better than 3 bits", "base better than 4 bits"]
    assert all(signs == {"accuracy": "holds", "frechet": "holds"} for signs in found["signs"].values())


@pytest.mark.slow
def test_a_toy_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Every part of a run, learned or not; rerunning trains nothing; the reversed order reaches the model."""
    command = ["order", "--seeds", "2", "--steps", "2", "--num_images", "20", "--output_dir", str(tmp_path)]
    ablations.main(command, TOY)
    runs = json.loads((tmp_path / "ablations" / "order.json").read_text())["runs"]
    assert [len(of_variant) for of_variant in runs.values()] == [2, 2]
    for run in (run for of_variant in runs.values() for run in of_variant):
        assert 0 <= run["accuracy"] <= 1 and np.isfinite(run["frechet"]) and run["bits_per_dim"] > 1
    base, other = (
        torch.load(tmp_path / "ablations" / name / "checkpoint-last.pth", weights_only=True)["config"]["model"]
        for name in ("base-2x32-seed0", "reversed-order-2x32-seed0")
    )
    assert base["channel_order"] == other["channel_order"][::-1]
    assert "base better than reversed order" in capsys.readouterr().out
    monkeypatch.setattr(ablations, "train", lambda *args: pytest.fail("a run was done again"))
    ablations.main(command, TOY)
