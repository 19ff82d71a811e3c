"""--evaluate (evaluation/scores.py, evaluation/store.py): scores, resuming, saved images, sweeps, guards, processes that die, bad input."""

import csv
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main_tokenbridge
from checkpoints import download
from dataset.images import read_image
from evaluation.metrics import FEATURE_DIM, FeatureStatistics, fid, inception_score, kid, precision_recall
from evaluation.reference import Reference
from evaluation.scores import (
    Scores,
    evaluate,
    spread_of_labels,
    sweep_table,
    sweep_values,
    vae_roundtrip,
    warn_of_flaws,
)
from evaluation.store import EvalStore, batches_of, image_flaws
from generation.pipeline import GenerationSettings, generate_batches
from generation.sample import balanced_labels
from main_tokenbridge import main
from tests.evaluation.test_fid_stats import Colours, adm, crops, write_stats
from tests.helpers import REPO, run_processes, tiny_model, tiny_vae
from util.presets import load_preset

CPU = torch.device("cpu")
SIZE = 64
SAMPLE = GenerationSettings(num_iter=2, cfg=2.0, seed=5, batch_size=4)
SMALL = 6  # feature dimensions of the stand-ins: the Fréchet distance of 2048 takes ten seconds


class FewColours(Colours):
    """Six features that stand for the 2048."""

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = super().__call__(images)
        return found | {"2048": found["2048"][:, :SMALL]}


def reference(with_features: bool = True) -> Reference:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(2, 1, (30, SMALL)).astype(np.float32))
    return Reference(
        features.double().numpy().mean(0),
        np.cov(features.double().numpy(), rowvar=False),
        features=features if with_features else None,
    )


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """The 20 images that the tiny model makes, in batches of four (B, 3, 64, 64)."""
    labels = balanced_labels(20, range(10))
    return torch.cat(
        [
            batch
            for numbers in batches_of(20, 4)
            for _, batch in generate_batches(tiny_model(), tiny_vae(), labels, numbers, SAMPLE, CPU)
        ]
    )


def scored(**more: object) -> dict:
    return evaluate(
        tiny_model(), tiny_vae(), balanced_labels(20, range(10)), SAMPLE, FewColours(), reference(), CPU, **more
    )


# ------------------------------------------------------------------------------------------------------------- scores


def test_every_image_is_scored_once(images: torch.Tensor) -> None:
    found, statistics = FewColours()(images), FeatureStatistics(SMALL)
    statistics.update(found["2048"])
    scores = scored(with_infinity=True)
    assert scores["fid"] == pytest.approx(fid(statistics.as_dict(), reference().pool), rel=1e-9)
    assert (scores["inception_score"], scores["inception_score_std"]) == pytest.approx(
        inception_score(found["logits_unbiased"]), rel=1e-9
    )
    assert (scores["precision"], scores["recall"]) == precision_recall(found["2048"], reference().features)
    assert scores["kid"] == pytest.approx(kid(found["2048"], reference().features)[0], rel=1e-6)
    assert math.isfinite(scores["fid_infinity"]) and scores["sfid"] is None


def test_without_real_features_there_is_no_precision() -> None:
    scores = Scores(12, reference(with_features=False))
    found = FewColours()(torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)) | {
        "near_constant": torch.ones(12),
        "saturated": torch.zeros(12),
    }
    scores.add(range(12), found)
    result = scores.finish()
    assert (
        result["precision"] is result["recall"] is result["kid"] is result["fid_infinity"] is None
        and result["near_constant_share"] == 1
    )


def test_sfid_needs_its_statistics() -> None:
    ref = reference()
    ref.mu_s, ref.sigma_s = np.zeros(5), np.eye(5)
    scores = Scores(40, ref)
    scores.spatial = FeatureStatistics(5)
    spatial = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (40, 5)))
    scores.add(
        range(40),
        FewColours()(torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8))
        | {"spatial": spatial, "near_constant": torch.zeros(40), "saturated": torch.zeros(40)},
    )
    statistics = FeatureStatistics(5)
    statistics.update(spatial)
    assert scores.finish()["sfid"] == pytest.approx(fid(statistics.as_dict(), ref.spatial), rel=1e-9)


def test_labels_that_do_not_divide_are_explained() -> None:
    for count, words in (
        (20, "2 of each of 10 classes"),
        (23, "2 of each of 10 classes and one more of each of the first 3"),
        (4, "one of each of the first 4 of 10 classes, none of the others"),
    ):
        labels = balanced_labels(count, range(10))
        assert (
            spread_of_labels(labels, 10) == words
            and len(labels) == count
            and max(np.bincount(labels)) - min(np.bincount(labels, minlength=10)) <= 1
        )


# ------------------------------------------------------------------------------------------------------------- resuming and saving


def test_a_second_run_makes_nothing_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = EvalStore(tmp_path, "none")
    first = scored(store=store)
    monkeypatch.setattr(
        "evaluation.scores.generate_batches", lambda *args, **kwargs: pytest.fail("an image was made again")
    )
    again = scored(store=store)
    keys = [key for key in first if key not in ("images_per_s", "vae_roundtrip")]
    assert [again[key] for key in keys] == [first[key] for key in keys] and again["images_per_s"] is None
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == [f"{i:06d}.npz" for i in range(0, 20, 4)]


@pytest.mark.parametrize("damage", ["deleted", "cut short", "another size"])
def test_a_lost_shard_costs_its_batch_only(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    store = EvalStore(tmp_path, "none")
    first, shard, made = scored(store=store), store.shard(8), []
    if damage == "deleted":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:100])
    else:
        shard.write_bytes(store.shard(4).read_bytes())
        with np.load(shard) as arrays:
            short = {key: arrays[key][:2] for key in arrays.files}
        np.savez(shard, **short)
    monkeypatch.setattr(
        "evaluation.scores.generate_batches", lambda *args: made.append(list(args[3])) or generate_batches(*args)
    )
    assert scored(store=store)["fid"] == first["fid"]
    assert made == [[8, 9, 10, 11]]
    assert damage == "deleted" or any("000008.npz cannot be used" in line for line in messages)


def test_saved_pngs_are_the_images(images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, made = EvalStore(tmp_path, "png"), []
    scored(store=store)
    for number, image in enumerate(images):
        assert torch.equal(torch.from_numpy(np.array(read_image(store.picture(number)))), image.permute(1, 2, 0))
    store.picture(13).unlink()  # its features are there, but the image was wanted
    monkeypatch.setattr(
        "evaluation.scores.generate_batches", lambda *args: made.append(list(args[3])) or generate_batches(*args)
    )
    scored(store=store)
    assert made == [[12, 13, 14, 15]] and store.picture(13).is_file()


def test_the_archive_is_the_adm_evaluators_format(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arr_0 uint8 (N, S, S, 3) in image order, labels beside it; made as it is from a run that was cut short; nothing else stays."""
    store = EvalStore(tmp_path, "npz")
    calls = iter(range(100))

    def dies(*args: object) -> object:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return generate_batches(*args)

    monkeypatch.setattr("evaluation.scores.generate_batches", dies)
    with pytest.raises(KeyboardInterrupt):
        scored(store=store)
    assert not store.archive.exists()
    scored(store=store)
    with np.load(store.archive) as arrays:
        assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy()) and arrays[
            "arr_1"
        ].tolist() == balanced_labels(20, range(10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "samples.npz"]
    assert next(calls) == 3 + 1 + 2  # three batches, the death, the two that were left
    scored(store=store)
    assert next(calls) == 7


def test_an_archive_of_lost_batches_is_refused(tmp_path: Path) -> None:
    store = EvalStore(tmp_path, "npz")
    with pytest.raises(ValueError, match="--save_images npz: .*000000.npy and 4 more batches are not on this machine"):
        store.write_archive(list(range(20)), 4)


# ------------------------------------------------------------------------------------------------------------- guards


def test_flawed_images_are_told(messages: list[str]) -> None:
    noise = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey, black_and_white = torch.full((1, 3, 16, 16), 77, dtype=torch.uint8), (noise[:1] > 127).to(torch.uint8) * 255
    flaws = image_flaws(torch.cat([noise, grey, black_and_white]))
    assert flaws["near_constant"].tolist() == [False] * 3 + [True, False] and flaws["saturated"].tolist() == [
        False
    ] * 4 + [True]
    warn_of_flaws({"near_constant_share": 0.05, "saturated_share": 0.0})
    assert not messages
    warn_of_flaws({"near_constant_share": 0.5, "saturated_share": 0.9})
    assert (
        "50 % of the images show next to nothing" in messages[0] and "90 % of the images are saturated" in messages[1]
    )


def test_the_vae_check_warns_of_a_wrong_scale(
    images: torch.Tensor, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vae()
    monkeypatch.setattr("evaluation.scores.ROUNDTRIP_PSNR", 0.0)  # random weights reproduce nothing
    latents = vae.encode(images[:8].float() / 127.5 - 1).mode().detach()
    vae.scale_factor = float(1 / latents.std())
    found = vae_roundtrip(vae, images, -5.0, 5.0)
    assert found["latent_std"] == pytest.approx(1, abs=0.01) and found["out_of_range"] < 0.1 and not messages
    vae.scale_factor *= 30
    found = vae_roundtrip(vae, images, -5.0, 5.0)
    assert found["latent_std"] == pytest.approx(30, rel=0.01) and found["out_of_range"] > 0.5
    assert "is --vae_path the model's VAE, and is its scale right?" in messages[0]
    monkeypatch.setattr("evaluation.scores.ROUNDTRIP_PSNR", 90.0)
    vae.scale_factor /= 30
    vae_roundtrip(vae, images, -5.0, 5.0)
    assert len(messages) == 2


# ------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A VAE, a run of one step with two classes, statistics."""
    root = tmp_path_factory.mktemp("evaluate")
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    torch.save({"model": vae.state_dict(), "config": vae.config}, root / "vae.pth")
    from tests.helpers import write_image_folder

    pictures = write_image_folder(root / "pictures", per_class=2, size=(40, 36))
    main(
        [
            str(x)
            for x in (
                "--model",
                "tokenbridge_digits",
                "--img_size",
                32,
                "--class_num",
                2,
                "--buffer_size",
                4,
                "--vae_path",
                root / "vae.pth",
                "--data_path",
                pictures,
                "--output_dir",
                root / "run",
                "--batch_size",
                4,
                "--max_steps",
                1,
                "--warmup_epochs",
                0,
                "--ema_rate",
                0.1,
                "--num_workers",
                0,
                "--device",
                "cpu",
            )
        ]
    )
    write_stats(root / "stats.npz", **adm())
    (root / "inception.pth").write_bytes(b"not weights")
    return {"root": root, "vae": root / "vae.pth", "run": root / "run", "stats": root / "stats.npz"}


def command(files: dict[str, Path], out: Path, *more: object) -> list[str]:
    return [
        str(x)
        for x in (
            "--evaluate",
            "--resume",
            files["run"],
            "--vae_path",
            files["vae"],
            "--num_images",
            13,
            "--num_iter",
            2,
            "--eval_bsz",
            4,
            "--device",
            "cpu",
            "--num_workers",
            0,
            "--fid_stats",
            files["stats"],
            "--output_dir",
            out,
            "--data_path",
            out / "none",
            *more,
        )
    ]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and a reference that need no weights; everything else is the command's own."""
    monkeypatch.setattr("evaluation.scores.InceptionFeatures", lambda weights, device: FewColours())
    monkeypatch.setattr("evaluation.scores.load_references", lambda *args, **kwargs: reference())


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("stand_ins")
def test_a_sweep(
    files: dict[str, Path],
    tmp_path: Path,
    messages: list[str],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All pairs, a folder each; table, CSV, plot; the record names every setting; a second command makes only what is new."""
    main(command(files, tmp_path, "--cfg", 1, 2.5, "--temperature", 0.9, 1, "--save_images", "npz"))
    found = records(tmp_path)
    assert [(r["cfg"], r["temperature"]) for r in found] == [(1, 0.9), (1, 1), (2.5, 0.9), (2.5, 1)]
    assert len({r["folder"] for r in found}) == 4 and all(
        Path(r["folder"]).name.startswith(f"cfg{r['cfg']:g}-t{r['temperature']:g}-") for r in found
    )
    assert all(np.load(Path(r["folder"]) / "samples.npz")["arr_0"].shape == (13, 32, 32, 3) for r in found)
    first = found[0]
    assert {
        "checkpoint",
        "checkpoint_sha256",
        "weights",
        "vae_sha256",
        "num_images",
        "seed",
        "num_iter",
        "order",
        "cfg_schedule",
        "arithmetic",
        "img_size",
        "model",
        "inception_sha256",
        "fid_stats_sha256",
        "batch_size",
        "world_size",
        "torch",
        "head_start",
        "top_k",
    } <= first.keys()
    assert first["weights"] == "ema" and first["num_images"] == 13 and len(first["checkpoint_sha256"]) == 64
    assert any("13 images: 6 of each of 2 classes and one more of each of the first 1" in line for line in messages)
    assert any("13 images make FID too high" in line for line in messages)
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 5 and table.count("*") == 1
    assert [float(row["cfg"]) for row in csv.DictReader((tmp_path / "eval_sweep.csv").open())] == [1, 1, 2.5, 2.5]
    assert read_image(tmp_path / "eval_sweep.png").width > 500
    monkeypatch.setattr("evaluation.scores.generate_batches", lambda *args: pytest.fail("an image was made again"))
    main(command(files, tmp_path, "--cfg", 2.5))
    assert records(tmp_path)[4]["fid"] == found[3]["fid"]
    with pytest.raises(pytest.fail.Exception, match="made again"):
        main(command(files, tmp_path, "--cfg", 2.5, "--seed", 7))  # another setting never takes the first one's images


@pytest.mark.usefixtures("stand_ins")
def test_a_preset_ends_with_every_setting_that_differs(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The command itself: its record has every setting that is compared, and the last lines of its output name those that differ."""
    main(command(files, tmp_path, "--preset", "large_eval", "--model", "tokenbridge_digits", "--order", "halton"))
    record, (*_, line, neutral, always) = records(tmp_path)[0], capsys.readouterr().out.splitlines()
    assert load_preset("large_eval").decisive.keys() | {"arithmetic"} <= record.keys()
    assert line.startswith(
        "differs from the published run, figures are not comparable: model tokenbridge_digits instead of tokenbridge_large; "
    )
    for words in (
        "num_images 13 instead of 50000",
        "num_iter 2 instead of 256",
        "precision fp32 instead of fp16",
        "img_size 32 instead of 256",
        "checkpoint ",
        "vae_path ",
        "class_num 2 instead of 1000",
        "head_start trained instead of official",
        "order halton instead of random",
        "device cpu instead of cuda",
        "fid_stats ",
        "inception_weights other than torch-fidelity's",
    ):
        assert words in line, words
    assert all(words not in line for words in ("quant_bits", "cfg", "temperature", "weights ema", "tf32"))
    assert (
        neutral.endswith("eval_bsz 4 instead of 256; processes 1 instead of 8") and "VAE decodes in float32" in always
    )


@pytest.mark.usefixtures("stand_ins")
def test_a_checkpoint_without_ema_is_refused_unless_told(files: dict[str, Path], tmp_path: Path) -> None:
    content = torch.load(files["run"] / "checkpoint-last.pth", weights_only=True)
    del content["model_ema"]
    (tmp_path / "plain").mkdir()
    torch.save(content, tmp_path / "plain" / "checkpoint-last.pth")
    plain = files | {"run": tmp_path / "plain"}
    with pytest.raises(ValueError, match=r"no model_ema; give weights .model. .*\(--weights\)"):
        main(command(plain, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    main(command(plain, tmp_path / "out", "--weights", "model"))
    assert records(tmp_path / "out")[0]["weights"] == "model"


def test_sweeps_are_for_evaluation(tmp_path: Path) -> None:
    for flags, message in (
        (["--sample", "--classes", "0", "--temperature", "1", "2"], "--evaluate and --online_eval only"),
        (["--temperature", "1", "2"], "--evaluate and --online_eval only"),
        (["--cfg", "1", "2"], "--evaluate and --online_eval and --sample only"),
    ):
        with pytest.raises(ValueError, match=f"{flags[-3]} takes several values with {message}"):
            main([*flags, "--output_dir", str(tmp_path / "out")])
    args = main_tokenbridge.build_parser().parse_args(["--evaluate", "--cfg", "3", "1", "3", "--temperature", "0.9"])
    assert sweep_values(args) == [(3, 0.9), (1, 0.9)] and (args.cfg, args.temperature) == (3, 0.9)


def test_the_table_marks_the_lowest_fid() -> None:
    keys = dict.fromkeys(("sfid", "precision", "recall", "kid", "fid_infinity"))
    rows = sweep_table(
        [
            keys | dict(cfg=c, temperature=1.0, fid=f, inception_score=9.0)
            for c, f in ((1.0, 7.0), (2.0, 3.5), (3.0, 4.0))
        ]
    ).splitlines()
    assert [line.endswith("*") for line in rows] == [False, False, True, False] and "3.5" in rows[2]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_images", 0], "--num_images must be at least 1"),
        (["--num_images", 9], "needs at least 10 images"),
        (["--cfg", "nan"], "--cfg must be finite"),
        (["--temperature", 1, -1], "--temperature must be at least 0, got -1"),
        (["--inception_weights", "/nowhere.pth"], r"no Inception weights at /nowhere\.pth.*--inception_weights"),
        (["--eval_bsz", 0], "--eval_bsz must be at least 1"),
    ],
)
def test_bad_flags_are_refused(
    flags: list, message: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.scores.generate_batches", lambda *args: pytest.fail("an image was made"))
    with pytest.raises((ValueError, OSError), match=message):
        main(command(files, tmp_path / "out", *flags))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(mu=np.zeros(FEATURE_DIM)), "no array sigma"),
        (dict(mu=np.zeros(64), sigma=np.eye(64)), r"mu \(64,\), sigma \(64, 64\); expected \(2048,\)"),
        (adm() | dict(img_size=256), "made from images of 256 pixels, the model makes 32"),
        (None, r"holds no images"),
        (dict(arr_0=np.zeros((4, 48, 48, 3), np.uint8)), "holds images of 48 pixels, the model makes 32"),
    ],
)
def test_bad_references_are_refused_before_generation(
    arrays: dict | None, message: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.scores.InceptionFeatures", lambda weights, device: FewColours())
    monkeypatch.setattr("evaluation.scores.generate_batches", lambda *args: pytest.fail("an image was made"))
    (tmp_path / "empty").mkdir()
    stats = tmp_path / "empty" if arrays is None else write_stats(tmp_path / "bad.npz", **arrays)
    with pytest.raises((ValueError, OSError), match=message):
        main(command(files, tmp_path / "out", "--fid_stats", stats))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("stand_ins")
def test_an_unwritable_output_is_refused_before_generation(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.scores.generate_batches", lambda *args: pytest.fail("an image was made"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/out \(--output_dir\)"):
        main(command(files, tmp_path / "file" / "out"))


def test_flags_of_evaluation_are_refused_elsewhere(tmp_path: Path) -> None:
    for flags in (["--save_images", "png"], ["--fid_infinity"]):
        with pytest.raises(ValueError, match="change --evaluate only"):
            main(["--sample", "--classes", "0", *flags])


# ------------------------------------------------------------------------------------------------------ published files


def test_precision_comes_from_a_second_reference(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """--fid_stats of statistics alone and --pr_reference in ADM's format, in one run; without it the log names the way
    to it.
    """
    monkeypatch.setattr("evaluation.scores.InceptionFeatures", lambda weights, device: Colours())
    monkeypatch.setattr("evaluation.scores.fid", lambda *_: 1.0)  # of 2048 dimensions: minutes
    batch = write_stats(tmp_path / "batch.npz", arr_0=crops(12, size=32), **adm())
    main(command(files, tmp_path / "out"))
    assert any(
        "holds statistics alone, so precision, recall and KID are not computed: they need images or features" in line
        for line in messages
    )
    main(command(files, tmp_path / "out", "--pr_reference", batch))
    main(command(files | {"stats": batch}, tmp_path / "out"))
    without, beside, alone = records(tmp_path / "out")
    assert (
        without["precision"] is without["recall"] is None
        and without["pr_reference"] is None
        and without["sfid"] is not None
    )
    assert 0 <= beside["precision"] <= 1 and (beside["precision"], beside["recall"]) == (
        alone["precision"],
        alone["recall"],
    )
    assert beside["pr_reference"] == str(batch) and len(beside["pr_reference_sha256"]) == 64
    assert without["folder"] == beside["folder"] == alone["folder"], "another reference needs no other images"


def test_the_published_command_fetches_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, VAE and statistics from their addresses to where the command looks for them; --no_download refuses and
    names the command.
    """
    model, vae, fetched = tiny_model(img_size=256, class_num=10), tiny_vae(), []
    contents = {
        "large": {
            "model": model.state_dict(),
            "model_ema": dict(model.named_parameters()),
            "epoch": 799,
            "config": {
                "model_name": "tokenbridge_large",
                "model": model.config.to_dict(),
                "vae": vae.config,
                "vae_fingerprint": vae.latent_fingerprint(),
                "args": {},
            },
        },
        "vae": {"model": vae.state_dict(), "config": vae.config},
        "stats": None,
    }

    def fetch(names: list[str], args: object) -> None:
        for name in names:
            fetched.append(name)
            target = Path(download.PUBLISHED[name].target)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch() if contents[name] is None else torch.save(contents[name], target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("checkpoints.download.fetch_all", fetch)
    monkeypatch.setattr("evaluation.scores.InceptionFeatures", lambda weights, device: FewColours())
    monkeypatch.setattr("evaluation.scores.load_references", lambda *args, **kwargs: reference())
    flags = shlex.split(
        "--model tokenbridge_large --eval_bsz 256 --num_images 10 --num_iter 1 --cfg 3.1 --quant_bits 4 --cfg_schedule linear "
        "--temperature 0.96 --output_dir OUT --resume pretrained_models/tokenbridge/tokenbridge_large --data_path DIR "
        "--evaluate --device cpu"
    )
    with pytest.raises(
        FileNotFoundError,
        match=r"kl16\.ckpt \(--vae_path\), and --no_download is given: python -m tools.download vae fetches it",
    ):
        main([*flags, "--no_download"])
    assert not fetched
    main(flags)
    assert fetched == ["vae", "large", "stats"] and records(tmp_path / "OUT")[0]["num_images"] == 10
    monkeypatch.setattr(
        "evaluation.scores.fetch_inception_weights", lambda path, download: fetched.append(("inception", download))
    )
    main([*flags, "--no_download"])
    assert fetched[3:] == [("inception", False)]


# ------------------------------------------------------------------------------------------------------------- processes

SCRIPT = """
import os, signal, sys
sys.path.insert(0, "tests")
from evaluation import scores as engine_evaluate, main_tokenbridge
from tests.evaluation.test_evaluation import FewColours, reference
from util.log import run_cli
engine_evaluate.InceptionFeatures = lambda weights, device: FewColours()
engine_evaluate.load_references = lambda *args, **kwargs: reference()
rank, real, count = os.environ.get("RANK", "0"), engine_evaluate.generate_batches, 0

def generate(*args):
    global count
    count += 1
    if os.environ.get("DIE") == rank and count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("FAIL") == rank and count == 2:
        raise ValueError("this process has failed")
    print("made a batch", flush=True)
    return real(*args)

engine_evaluate.generate_batches = generate
sys.exit(run_cli(main_tokenbridge.main))
"""


@pytest.mark.slow
def test_processes(files: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 of one process ends the job within a minute with an exit code; the same command makes what is left; then two processes have given
    what one gives, to 1e-6. A process that meets an error ends the job too."""
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    batches, environment = 7, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    killed = run_processes(
        [script, *command(files, tmp_path / "two", "--num_images", 26, "--cfg", 2)],
        nproc=2,
        env={"DIE": "1"},
        timeout=240,
    )
    ended = time.time()
    shards = list((tmp_path / "two").glob("eval/*/features/*.npz"))
    assert killed.returncode != 0 and 2 <= len(shards) < batches
    assert ended - max(path.stat().st_mtime for path in shards) < 60
    resumed = run_processes(
        [script, *command(files, tmp_path / "two", "--num_images", 26, "--cfg", 2)], nproc=2, timeout=240
    )
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stdout.count("made a batch") == batches - len(shards)
    one = subprocess.run(
        [sys.executable, script, *command(files, tmp_path / "one", "--num_images", 26, "--cfg", 2)],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert one.returncode == 0 and one.stdout.count("made a batch") == batches, one.stderr[-2000:]
    alone, together = (records(tmp_path / name)[0] for name in ("one", "two"))
    for key in ("fid", "inception_score", "inception_score_std", "precision", "recall", "kid"):
        assert together[key] == pytest.approx(alone[key], rel=1e-6), key
    failed = run_processes(
        [script, *command(files, tmp_path / "three", "--num_images", 26)], nproc=2, env={"FAIL": "0"}, timeout=240
    )
    assert (
        failed.returncode != 0
        and "error: this process has failed" in failed.stderr
        and not (tmp_path / "three" / "eval.jsonl").exists()
    )


@pytest.mark.slow
def test_kill_and_continue_loses_one_batch(files: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    run = [sys.executable, script, *command(files, tmp_path / "out", "--num_images", 20)]
    killed = subprocess.run(run, cwd=REPO, env=environment | {"DIE": "0"}, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL and killed.stdout.count("made a batch") == 2
    again = subprocess.run(run, cwd=REPO, env=environment, capture_output=True, text=True, timeout=200)
    assert (
        again.returncode == 0
        and again.stdout.count("made a batch") == 3
        and records(tmp_path / "out")[0]["num_images"] == 20
    )


# ------------------------------------------------------------------------------------------------------------- the real network


@pytest.mark.slow
def test_the_whole_way_with_inception(files: dict[str, Path], tmp_path: Path) -> None:
    """Seeded weights in the real format: statistics by evaluation.reference from a folder, --evaluate against them, FID and IS equal to torch-fidelity's
    run on the two folders of PNGs (1e-3 relative), sFID and precision there too."""
    import torch_fidelity

    from evaluation import reference as fid_stats
    from tests.evaluation.test_fid_stats import crops, write_folder
    from tools.bench.evaluation import write_random_inception

    weights, real = (
        write_random_inception(tmp_path / "inception.pth"),
        write_folder(tmp_path / "real", crops(12, size=32)),
    )
    fid_stats.main(
        [
            "--data_path",
            str(real),
            "--out",
            str(tmp_path / "stats.npz"),
            "--img_size",
            "32",
            "--crop",
            "none",
            "--device",
            "cpu",
            "--num_workers",
            "0",
            "--inception_weights",
            str(weights),
        ]
    )
    main(
        command(
            files,
            tmp_path / "out",
            "--num_images",
            12,
            "--fid_stats",
            tmp_path / "stats.npz",
            "--inception_weights",
            weights,
            "--save_images",
            "png",
        )
    )
    found = records(tmp_path / "out")[0]
    expected = torch_fidelity.calculate_metrics(
        input1=str(Path(found["folder"]) / "images"),
        input2=str(real),
        samples_find_deep=True,
        cuda=False,
        batch_size=12,
        isc=True,
        fid=True,
        verbose=False,
        feature_extractor_weights_path=str(weights),
        save_cpu_ram=True,
        cache=False,
    )
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["inception_score"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    assert math.isfinite(found["sfid"]) and 0 <= found["precision"] <= 1 and found["kid"] is not None
