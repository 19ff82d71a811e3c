"""`main_tokenbridge.py --evaluate`: sweeps, records, references, published files, processes that die, bad input."""

import csv
import json
import math
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity

import main_tokenbridge
from checkpoints import download
from dataset.images import read_image
from evaluation import evaluator, metrics
from evaluation.inception import write_random_inception
from generation.sweep import SweepOptions
from main_tokenbridge import main
from tests.helpers import REPO, tiny_model, tiny_vae, torchrun, write_image_folder
from tests.processes.forked import run_processes
from tests.stand_ins import Colours, FewColours, adm_arrays, crops, small_reference, write_folder, write_stats
from tools import fid_stats
from util.options import read_options
from util.presets import load_preset

SCRIPT = REPO / "tests" / "processes" / "evaluate.py"


def flag_list(**flags: object) -> list[str]:
    """name=value as --name value; True is a switch, a list several values."""
    words: list[str] = []
    for name, value in flags.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A VAE, a run of one step with two classes, statistics."""
    root = tmp_path_factory.mktemp("evaluate")
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    torch.save({"model": vae.state_dict(), "config": vae.config}, root / "vae.pth")
    pictures = write_image_folder(root / "pictures", per_class=2, size=(40, 36))
    model = dict(model="tokenbridge_digits", img_size=32, class_num=2, buffer_size=4, vae_path=root / "vae.pth")
    training = dict(batch_size=4, max_steps=1, warmup_epochs=0, ema_rate=0.1, num_workers=0, device="cpu")
    main(flag_list(data_path=pictures, output_dir=root / "run", **model, **training))
    write_stats(root / "stats.npz", **adm_arrays())
    return {"vae": root / "vae.pth", "run": root / "run", "stats": root / "stats.npz"}


def command(files: dict[str, Path], out: Path, **more: object) -> list[str]:
    paths = dict(resume=files["run"], vae_path=files["vae"], fid_stats=files["stats"], output_dir=out)
    small = dict(num_images=13, num_iter=2, eval_bsz=4, device="cpu", num_workers=0, data_path=out / "none")
    return flag_list(evaluate=True, **(paths | small | more))


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features and a reference that need no weights; everything else is the command's own."""
    monkeypatch.setattr(evaluator, "InceptionFeatures", FewColours)
    monkeypatch.setattr(evaluator, "load_references", lambda *_, **__: small_reference())


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generating an image fails the test."""
    monkeypatch.setattr(evaluator, "generate_batches", lambda *_: pytest.fail("an image was made"))


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
    """All pairs, a folder each; table, CSV, plot; the record names every setting; a second command makes new ones."""
    main(command(files, tmp_path, cfg=[1, 2.5], temperature=[0.9, 1], save_images="npz"))
    found = records(tmp_path)
    assert [(r["cfg"], r["temperature"]) for r in found] == [(1, 0.9), (1, 1), (2.5, 0.9), (2.5, 1)]
    folders = [Path(r["folder"]) for r in found]
    assert len(set(folders)) == 4
    assert all(
        f.name.startswith(f"cfg{r['cfg']:g}-t{r['temperature']:g}-") for f, r in zip(folders, found, strict=True)
    )
    assert all(np.load(folder / "samples.npz")["arr_0"].shape == (13, 32, 32, 3) for folder in folders)
    names = (
        "checkpoint weights_sha256 weights vae_weights_sha256 vae_path num_images seed num_iter order cfg_schedule "
        "arithmetic img_size model inception_sha256 fid_stats_sha256 batch_size world_size torch head_start top_k "
        "vae_roundtrip"
    )
    first = found[0]
    assert set(names.split()) <= first.keys()
    assert first["weights"] == "ema" and first["num_images"] == 13 and len(first["weights_sha256"]) == 64
    assert any("13 images: 6 of each of 2 classes and one more of each of the first 1" in line for line in messages)
    assert any("13 images make FID too high" in line for line in messages)
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 5 and table.count("*") == 1
    assert [float(row["cfg"]) for row in csv.DictReader((tmp_path / "eval_sweep.csv").open())] == [1, 1, 2.5, 2.5]
    assert read_image(tmp_path / "eval_sweep.png").width > 500
    monkeypatch.setattr(evaluator, "generate_batches", lambda *_: pytest.fail("an image was made again"))
    main(command(files, tmp_path, cfg=2.5))
    assert records(tmp_path)[4]["fid"] == found[3]["fid"]
    with pytest.raises(pytest.fail.Exception, match="made again"):
        main(command(files, tmp_path, cfg=2.5, seed=7))  # another setting never takes the first one's images


@pytest.mark.usefixtures("stand_ins")
def test_images_belong_to_the_weights_and_all_settings(
    files: dict[str, Path], tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights under the same name, another range of a file without config, fewer classes: a folder for each."""
    monkeypatch.setattr(evaluator, "load_references", lambda *_, **__: replace(small_reference(), num_images=30))
    content = torch.load(files["run"] / "checkpoint-last.pth", weights_only=True)
    plain, path = {key: content[key] for key in ("model", "model_ema")}, tmp_path / "x.pth"
    one_class = content | {"config": content["config"] | {"classes": ["china"]}}
    other = plain | {"model_ema": {key: 1.1 * value for key, value in plain["model_ema"].items()}}
    for saved, flags in ((plain, {}), (plain, {"quant_max": 4}), (other, {}), (content, {}), (one_class, {})):
        torch.save(saved, path)
        main(command(files | {"run": path}, tmp_path, **flags))
    found = records(tmp_path)
    assert len({record["folder"] for record in found}) == 5 and [record["classes"] for record in found] == 4 * [2] + [1]
    assert len({record["weights_sha256"] for record in found}) == 2 and found[1]["model_config"]["quant_max"] == 4
    assert any("has 2 classes, but was trained on the first 1 only: images are of these" in line for line in messages)
    assert any("stats.npz (--fid_stats) is of 30 images only" in line for line in messages)


@pytest.mark.usefixtures("stand_ins")
def test_a_preset_ends_with_every_setting_that_differs(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The record has every setting that is compared; the last lines of the output name those that differ."""
    main(command(files, tmp_path, preset="large_eval", model="tokenbridge_digits", order="halton"))
    record, (*_, line, neutral, always) = records(tmp_path)[0], capsys.readouterr().out.splitlines()
    assert load_preset("large_eval").decisive.keys() | {"arithmetic"} <= record.keys()
    start = "differs from the published run, figures are not comparable: model tokenbridge_digits instead of "
    assert line.startswith(f"{start}tokenbridge_large; ")
    for words in (
        *("num_images 13 instead of 50000", "num_iter 2 instead of 256", "precision fp32 instead of fp16"),
        *("img_size 32 instead of 256", "checkpoint ", "vae_path ", "class_num 2 instead of 1000"),
        *("head_start trained instead of official", "order halton instead of random", "device cpu instead of cuda"),
        *("fid_stats ", "inception_weights other than torch-fidelity's"),
    ):
        assert words in line, words
    assert all(words not in line for words in ("quant_bits", "cfg", "temperature", "weights ema", "tf32"))
    assert neutral.endswith("eval_bsz 4 instead of 256; processes 1 instead of 8")
    assert "VAE decodes in float32" in always


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
    main(command(plain, tmp_path / "out", weights="model"))
    assert records(tmp_path / "out")[0]["weights"] == "model"


def test_sweeps_are_for_evaluation(tmp_path: Path) -> None:
    for flags, message in (
        (["--sample", "--classes", "0", "--temperature", "1", "2"], "evaluate and online_eval only"),
        (["--temperature", "1", "2"], "evaluate and online_eval only"),
        (["--cfg", "1", "2"], "evaluate and online_eval and sample only"),
    ):
        with pytest.raises(ValueError, match=rf"{flags[-3][2:]} takes several values with {message} \({flags[-3]}\)"):
            main([*flags, "--output_dir", str(tmp_path / "out")])
    args = main_tokenbridge.build_parser().parse_args(["--evaluate", "--cfg", "3", "1", "3", "--temperature", "0.9"])
    assert read_options(SweepOptions, args).pairs(["evaluate"]) == [(3, 0.9), (1, 0.9)]


@pytest.mark.usefixtures("no_images")
@pytest.mark.parametrize(
    "arrays, message",
    [
        (adm_arrays() | dict(img_size=256), "made from images of 256 pixels, the model makes 32"),
        (None, r"holds no images"),
    ],
)
def test_bad_references_are_refused_before_generation(
    arrays: dict | None, message: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "InceptionFeatures", FewColours)
    (tmp_path / "empty").mkdir()
    stats = tmp_path / "empty" if arrays is None else write_stats(tmp_path / "bad.npz", **arrays)
    with pytest.raises((ValueError, OSError), match=message):
        main(command(files, tmp_path / "out", fid_stats=stats))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("stand_ins", "no_images")
def test_an_unwritable_output_is_refused_before_generation(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*file/out \(--output_dir\)"):
        main(command(files, tmp_path / "file" / "out"))


@pytest.mark.parametrize("flags", [["--save_images", "png"], ["--fid_infinity"]])
def test_flags_of_evaluation_are_refused_elsewhere(flags: list[str]) -> None:
    with pytest.raises(ValueError, match="change --evaluate only"):
        main(["--sample", "--classes", "0", *flags])


def test_precision_comes_from_a_second_reference(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """--fid_stats of statistics alone and --pr_reference in ADM's format; without it the log names the way to it."""
    monkeypatch.setattr(evaluator, "InceptionFeatures", Colours)
    monkeypatch.setattr(metrics, "fid", lambda *_: 1.0)  # of 2048 dimensions: minutes
    batch = write_stats(tmp_path / "batch.npz", arr_0=crops(12, size=32), **adm_arrays())
    main(command(files, tmp_path / "out"))
    said = "holds statistics alone, so precision, recall and KID are not computed: they need images or features"
    assert any(said in line for line in messages)
    main(command(files, tmp_path / "out", pr_reference=batch))
    main(command(files | {"stats": batch}, tmp_path / "out"))
    without, beside, alone = records(tmp_path / "out")
    assert without["precision"] is without["recall"] is without["pr_reference"] is None
    assert without["sfid"] is not None and 0 <= beside["precision"] <= 1
    assert (beside["precision"], beside["recall"]) == (alone["precision"], alone["recall"])
    assert beside["pr_reference"] == str(batch) and len(beside["pr_reference_sha256"]) == 64
    assert without["folder"] == beside["folder"] == alone["folder"], "another reference needs no other images"


def test_the_published_command_fetches_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, VAE and statistics to where the command looks for them; --no_download refuses and names the command."""
    model, vae, fetched = tiny_model(img_size=256, class_num=10), tiny_vae(), []
    config = {"model_name": "tokenbridge_large", "model": model.config.to_dict(), "vae": vae.config, "args": {}}
    config["vae_fingerprint"] = vae.latent_fingerprint()
    weights = {"model": model.state_dict(), "model_ema": dict(model.named_parameters()), "epoch": 799, "config": config}
    contents = {"large": weights, "vae": {"model": vae.state_dict(), "config": vae.config}, "stats": None}

    def fetch(names: list[str], *_: object) -> None:
        for name in names:
            fetched.append(name)
            target = Path(download.PUBLISHED[name].target)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch() if contents[name] is None else torch.save(contents[name], target)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "fetch_all", fetch)
    monkeypatch.setattr(evaluator, "InceptionFeatures", FewColours)
    monkeypatch.setattr(evaluator, "load_references", lambda *_, **__: small_reference())
    flags = shlex.split(
        "--model tokenbridge_large --eval_bsz 256 --num_images 10 --num_iter 1 --cfg 3.1 --quant_bits 4 "
        "--cfg_schedule linear --temperature 0.96 --output_dir OUT "
        "--resume pretrained_models/tokenbridge/tokenbridge_large --data_path DIR --evaluate --device cpu"
    )
    refusal = r"kl16\.ckpt \(--vae_path\), and --no_download is given: python -m tools.download vae fetches it"
    with pytest.raises(FileNotFoundError, match=refusal):
        main([*flags, "--no_download"])
    assert not fetched
    main(flags)
    assert fetched == ["vae", "large", "stats"] and records(tmp_path / "OUT")[0]["num_images"] == 10
    fetch_weights = lambda path, download: fetched.append(("inception", download))  # noqa: E731
    monkeypatch.setattr(evaluator, "fetch_inception_weights", fetch_weights)
    main([*flags, "--no_download"])
    assert fetched[3:] == [("inception", False)]


def in_a_process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """tests/processes/evaluate.py in a process of its own."""
    return run_processes([SCRIPT, *arguments], nproc=1, env=environment, timeout=240)


@pytest.mark.slow
def test_processes(files: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 of one process ends the job with an exit code; the same command makes what is left; then
    two processes have given what one gives, to 1e-6. A process that meets an error ends the job too."""
    batches, flags = 7, dict(num_images=26, cfg=2)

    arguments = [SCRIPT, *command(files, tmp_path / "two", **flags)]
    killed = torchrun(arguments, nproc=2, env={"DIE": "1"}, timeout=240)
    shards = list((tmp_path / "two").glob("eval/*/features/*.npz"))
    assert killed.returncode != 0 and 2 <= len(shards) < batches
    resumed = run_processes(arguments, nproc=2, timeout=240)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stdout.count("made a batch") == batches - len(shards)
    one = in_a_process(command(files, tmp_path / "one", **flags))
    assert one.returncode == 0 and one.stdout.count("made a batch") == batches, one.stderr[-2000:]
    alone, together = (records(tmp_path / name)[0] for name in ("one", "two"))
    for key in ("fid", "inception_score", "inception_score_std", "precision", "recall", "kid"):
        assert together[key] == pytest.approx(alone[key], rel=1e-6), key
    arguments = [SCRIPT, *command(files, tmp_path / "three", num_images=26)]
    failed = torchrun(arguments, nproc=2, env={"FAIL": "0"}, timeout=240)
    assert failed.returncode != 0 and "error: this process has failed" in failed.stderr
    assert not (tmp_path / "three" / "eval.jsonl").exists()


@pytest.mark.slow
def test_kill_and_continue_loses_one_batch(files: dict[str, Path], tmp_path: Path) -> None:
    run = [sys.executable, str(SCRIPT), *command(files, tmp_path / "out", num_images=20)]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    settings = dict(cwd=REPO, capture_output=True, text=True, timeout=200)
    killed = subprocess.run(run, env=environment | {"DIE": "0"}, **settings)
    assert killed.returncode == -signal.SIGKILL and killed.stdout.count("made a batch") == 2, killed.stderr[-2000:]
    again = subprocess.run(run, env=environment, **settings)
    assert again.returncode == 0 and again.stdout.count("made a batch") == 3, again.stderr[-2000:]
    assert records(tmp_path / "out")[0]["num_images"] == 20


@pytest.mark.slow
def test_the_whole_way_with_inception(files: dict[str, Path], tmp_path: Path) -> None:
    """Seeded weights in the real format: statistics by tools.fid_stats from a folder, --evaluate against them; FID, IS
    equal torch-fidelity's on the two folders of PNGs (1e-3 relative); sFID and precision are there too."""
    weights = write_random_inception(tmp_path / "inception.pth")
    real = write_folder(tmp_path / "real", crops(12, size=32))
    process = dict(device="cpu", num_workers=0, inception_weights=weights)
    fid_stats.main(flag_list(data_path=real, out=tmp_path / "stats.npz", img_size=32, crop="none", **process))
    stats = tmp_path / "stats.npz"
    main(command(files, tmp_path / "out", num_images=12, fid_stats=stats, inception_weights=weights, save_images="png"))
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
