"""demo/ablations.py: its figures on known answers, its verdicts, and a toy run of one ablation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import ablations, digits
from demo.ablations import ABLATIONS, VARIANTS, bits_per_dim, frechet, margins, summary, verdict
from demo.run import Size
from main_tokenbridge import build_parser
from tests.helpers import tiny_model, tiny_vae


def test_every_variant_is_named_and_its_flags_exist() -> None:
    assert {variant for variants in ABLATIONS.values() for variant in variants} == set(VARIANTS)
    for flags in VARIANTS.values():
        build_parser().parse_args(flags)


def test_verdicts_weigh_the_gain_against_its_spread() -> None:
    assert (
        verdict([2.0, 2.1, 1.9], [1.0, 1.2, 0.9], -1) == "holds"
        and verdict([2.0, 2.1, 1.9], [1.0, 1.2, 0.9], +1) == "does not hold"
    )
    assert verdict([1.0, 2.0, 3.0], [1.1, 1.9, 3.05], +1) == "undecided (within the spread)"
    # seeds differ more than variants do; a seed is compared with itself
    assert verdict([1.0, 2.0, 3.0], [1.3, 2.2, 3.3], +1) == "holds"
    assert verdict([1.0], [5.0], +1) == "undecided (one seed)"


def test_bits_of_a_model_that_knows_nothing(image_root: Path) -> None:
    """All logits zero: log2 of the number of levels, whatever the images."""
    model, vae = (
        tiny_model(img_size=32, vae_stride=8, vae_embed_dim=4, channel_order=None, class_num=2),
        tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2)),
    )
    for head in model.channel_heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    assert bits_per_dim(model, vae, image_root / "train", rounds=2) == pytest.approx(
        math.log2(model.num_levels), rel=1e-6
    )


def test_classifier_features(tmp_path: Path) -> None:
    """45 margins of ten classes, which agree with the classifier's decisions; the distance of a set to itself is 0."""
    digits.write_image_folder(tmp_path)
    judge, (pixels, labels) = digits.fit_judge(tmp_path / "train"), digits.read_part(tmp_path / "val")
    found = margins(judge, pixels)
    assert found.shape == (len(labels), 45) and (judge.predict(pixels) == labels).mean() > 0.95
    assert abs(frechet(found, found)) < 1e-6 < frechet(found, found + 1) == pytest.approx(45, rel=1e-6)


def test_the_summary_leaves_bits_of_other_quantizers_uncompared() -> None:
    runs = {
        variant: [{"bits_per_dim": 3.0 + seed, "accuracy": 0.5 + i / 10, "frechet": 9.0 - i} for seed in range(3)]
        for i, variant in enumerate(ABLATIONS["bits"])
    }
    found = summary("bits", runs)
    assert found["table"]["base"]["accuracy"] == [pytest.approx(0.7), pytest.approx(0)]
    assert all(
        set(signs) == {"accuracy", "frechet"} and set(signs.values()) == {"holds"} for signs in found["signs"].values()
    )


@pytest.mark.parametrize(
    "flags, message",
    [(["head", "--seeds", "0"], "--seeds must be at least 1"), (["head", "--num_images", "5"], "--num_images")],
)
def test_bad_flags(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ablations.main(flags)


@pytest.mark.slow
def test_a_toy_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Every part of a run, learned or not; run again, nothing is trained anew; the reversed order reaches the model."""
    monkeypatch.setattr(ablations, "Size", lambda: Size(vae_steps=2))
    command = ["order", "--seeds", "2", "--steps", "2", "--num_images", "20", "--output_dir", str(tmp_path)]
    ablations.main(command)
    found = json.loads((tmp_path / "ablations" / "order.json").read_text())
    assert [len(runs) for runs in found["runs"].values()] == [2, 2]
    assert all(
        0 <= run["accuracy"] <= 1 and np.isfinite(run["frechet"]) and run["bits_per_dim"] > 1
        for runs in found["runs"].values()
        for run in runs
    )
    orders = [
        torch.load(tmp_path / "ablations" / name / "checkpoint-last.pth", weights_only=True)["config"]["model"][
            "channel_order"
        ]
        for name in ("base-2x32-seed0", "reversed-order-2x32-seed0")
    ]
    assert orders[0] == orders[1][::-1]
    assert "base better than reversed order" in capsys.readouterr().out
    monkeypatch.setattr(ablations, "train", lambda *args: pytest.fail("a run was done again"))
    ablations.main(command)
