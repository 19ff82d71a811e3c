"""tools.reproduce: the published commands, bad input, stages and their records, figures, cost, bands; killed runs."""

import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import main_tokenbridge
import reconstruction
from models.tokenbridge import TokenBridge
from tests.helpers import REPO, argv_of, tiny_config, tiny_vae, write_image_folder
from tools.bench import __main__ as bench
from tools.bench.counting import count, fake_mode
from tools.bench.train import ASSUMED_MFU
from tools.reproduce import figures
from tools.reproduce.__main__ import main
from tools.reproduce.commands import PUBLISHED, PlannedStage
from tools.reproduce.cost import Work, sampling_flops
from tools.reproduce.figures import Figure, catalogue, read_evaluation, read_reconstruction, tolerance
from tools.reproduce.machine import Rates, full_disks
from tools.reproduce.options import Options
from tools.reproduce.plan import Plan
from tools.reproduce.report import as_markdown, build_report, figure_rows, problems
from tools.reproduce.training import read_training, training_figures
from training.flops import peak_tflops
from util import dist
from util.presets import load_preset

SPEC = (REPO / "docs" / "spec.md").read_text()
DOC = (REPO / "docs" / "reproduce.md").read_text()
VARIANTS = [{}, {"quick": True}, {"guidance": (1.0, 4.1234567)}, {"demo": True, "data_path": ""}, {"train": "large"}]
VARIANTS += [{"train": "huge", "gpus": 4}, {"train": "large", "demo": True, "steps": 20, "data_path": ""}]


def words_of_spec() -> list[str]:
    """The commands of docs/spec.md 10, in one line each."""
    section = SPEC.partition("\n## 10. Command lines\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```", section, flags=re.M | re.S)
    lines = [" ".join(line.split()) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith(("python ", "torchrun "))]


def test_the_published_commands_are_those_of_the_specification() -> None:
    assert len(PUBLISHED) == 5 and sorted(words_of_spec()) == sorted(PUBLISHED.values())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("reconstruction", "--output_dir OUT/reconstruction"),
        ("large", "--precision fp16 --pr_reference fid_stats/VIRTUAL_imagenet256_labeled.npz"),
        ("huge", "--precision fp16 --pr_reference fid_stats/VIRTUAL_imagenet256_labeled.npz"),
        ("cache", ""),
        (
            "train",
            "--use_cached --precision fp16 --cached_path OUT/cache --max_steps 2000 --save_every_steps 500 "
            "--accum_iter 4",
        ),
    ],
)
def test_dry_run_prints_the_published_commands(name: str, more: str, capsys: pytest.CaptureFixture) -> None:
    """Word by word from the script on; what is added stands at the end and is named in a comment."""
    flags = ["--train", "large"] if name in ("cache", "train") else []
    main(["--data_path", "DIR", "--output_dir", "OUT", "--dry_run", *flags])
    printed = capsys.readouterr().out.splitlines()
    script = re.search(r"\S+\.py .*", next(line for line in words_of_spec() if line == PUBLISHED[name]))[0]
    folder = "OUT/train-large-2000" if name == "train" else f"OUT/{name}"
    expected = script.replace(" OUT", f" {folder}").replace("cached_path DIR", "cached_path OUT/cache")
    expected = expected.replace("…", "pretrained_models/vae/kl16.ckpt")
    line = f"torchrun --nproc_per_node=8 --standalone {expected} {more}".strip()
    assert line in printed
    comments = printed[: printed.index(line)]
    assert f"#   published: {PUBLISHED[name]}" in comments
    named = [text for text in comments if text.startswith("#   added or changed:")][-1] if more else ""
    assert all(flag in named for flag in re.findall(r"--\w+", more))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_command_is_accepted_by_its_script(changes: dict, tmp_path: Path) -> None:
    places = dict(data_path="DIR", output_dir=str(tmp_path), demo_dir=str(tmp_path / "none"))
    options = Options(**places | changes)
    stages = Plan(options).stages()
    assert len({stage.name for stage in stages}) == len(stages)
    for words in (stage.command for stage in stages if stage.command):
        if words[:4] == ["python", "-m", "tools.bench", "gpu"]:
            bench.build_parser().parse_args(words[3:])
        elif "-m" not in words:
            assert words[:2] == ["torchrun", f"--nproc_per_node={options.gpus or (2 if options.demo else 8)}"]
            first = next(i for i, word in enumerate(words) if word.endswith(".py"))
            parser = importlib.import_module(words[first].removesuffix(".py")).build_parser()
            args = parser.parse_args(words[first + 1 :])
            read = next(stage.result for stage in stages if stage.command is words)
            if getattr(read, "func", None) is figures.read_guidance:  # looks for the scales that the command gets
                assert read.args[1] == args.cfg
    assert not any(tmp_path.iterdir())


def test_the_first_steps_have_the_published_learning_rate() -> None:
    """--max_steps ends within the warm-up, whose rate depends on --warmup_epochs alone."""
    stage = Plan(Options(data_path="DIR", train="large")).stages()[-1]
    words = stage.command
    assert int(words[words.index("--max_steps") + 1]) < 100 * 625 and "--lr" not in words


# ---- bad input


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1,000 empty class folders in train/ and val/, and incomplete variants of it."""
    root = tmp_path_factory.mktemp("imagenet")
    for part in ("train", "val"):
        for i in range(1000):
            (root / "good" / part / f"n{i:08d}").mkdir(parents=True)
    (root / "few" / "train" / "n0").mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("data", "flags", "gpus", "words"),
    [
        ("none", "", 8, r"no \S+none/train: data_path is the ImageNet folder .*\(--data_path\)"),
        ("few", "", 8, r"few/train has 1 class folders, ImageNet has 1000 \(--data_path\)"),
        ("good", "", 7, r"8 GPUs are wanted, this machine has 7; .*\(--gpus\)"),
        ("good", "--gpus 2", 0, r"2 GPUs are wanted, this machine has 0"),
        ("good", "", 8, r"not enough space: \S+ has 1.0 GB of free space, 2[78].\d GB are needed \(--output_dir\)"),
        ("good", "--train large", 8, r"not enough space: \S+ has 1.0 GB of free space, 59.\d GB are needed"),
        ("good", "--train large --cached_path nowhere", 8, r"no latent cache at nowhere; .*\(--cached_path\)"),
        ("good", "--train large --gpus 3", 8, r"gpus 3 x 64 images do not divide the published batch of 2048"),
        ("good", "--only reconstruction,larg", 8, r"only 'larg' is unknown; choose from reconstruction, large"),
        ("good", "--train huge --quick", 8, r"quick does not go with train"),
        ("good", "--demo --quick", 8, r"quick does not go with demo"),
        ("good", "--guidance -1", 8, r"guidance must be at least 0, got -1.0"),
        ("good", "--guidance 2 --only speed", 8, r"guidance goes with large and huge, only speed has neither"),
        ("good", "--demo", 8, r"data_path does not go with demo, which has its own images \(--data_path\)"),
        ("good", "--steps 100", 8, r"steps goes with train only \(--steps\)"),
        ("good", "--demo_dir x", 8, r"demo_dir goes with demo only \(--demo_dir\)"),
        (None, "", 8, r"data_path is needed: the ImageNet folder .*\(--data_path\)"),
    ],
)
def test_bad_input_ends_at_once(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, flags: str, gpus: int, words: str
) -> None:
    monkeypatch.setattr(dist, "device_count", lambda: gpus)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**9))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a command was started"))
    monkeypatch.setattr(os, "chdir", lambda path: None)
    where = ["--data_path", str(imagenet / data)] if data else []
    with pytest.raises(ValueError, match=words) as caught:
        main([*where, "--output_dir", str(tmp_path / "out"), *flags.split()])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_space_is_summed_over_the_paths_of_a_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert not full_disks([(tmp_path / "a" / "b", 1e3), (tmp_path, 1e3)])
    assert len(full_disks([(tmp_path / "a", 0.6 * free), (tmp_path, 0.6 * free)])) == 1


# ---- figures


@pytest.mark.parametrize(
    ("kind", "published", "measured", "within"),
    [
        ("FID", 1.76, 1.81, True),
        ("FID", 1.76, 1.83, False),
        ("FID", 1.55, 1.49, False),
        ("Inception Score", 294.8, 300.0, True),
        ("Inception Score", 313.3, 300.0, False),
        ("recall", 0.63, 0.65, True),
        ("recall", 0.63, 0.66, False),
        ("reconstruction FID", 1.11, 1.14, True),
        ("reconstruction FID", 1.33, 1.12, False),
        ("parameters, M", 486, 486.89, True),
        ("rFID", 0.53, None, None),
    ],
)
def test_tolerances(kind: str, published: float, measured: float | None, within: bool | None) -> None:
    assert Figure("x", published, measured, *tolerance(kind, published)).within is within


def test_neighbouring_rows_of_the_papers_table_are_told_apart() -> None:
    """Where the paper's figures differ by more than their rounding, a tolerance does not cover both."""
    assert tolerance("FID", 1.76)[0] < 1.76 - 1.55 and tolerance("reconstruction FID", 1.22)[0] < 1.22 - 1.13


def test_the_catalogue_has_every_published_figure() -> None:
    """The numbers of docs/spec.md 3 and 9."""
    published = {w.name: w.published for w in catalogue() if w.published is not None}
    bits, ranges = ({3: 3.69, 4: 1.33, 5: 1.12, 6: 1.11}, {2: 2.26, 3: 1.22, 4: 1.13})
    expected = {f"reconstruction, {b} bits, ±5: FID": value for b, value in bits.items()}
    expected |= {f"reconstruction, 6 bits, ±{r}: FID": value for r, value in ranges.items()}
    expected |= {"reconstruction, VAE alone: FID": 1.11, "reconstruction, 6 bits, ±5: IS": 305}
    expected |= {"validation images, VAE alone: rFID": 0.53, "large: parameters, M": 486, "huge: parameters, M": 910}
    for model, values in {"large": (1.76, 294.8, 0.8, 0.63), "huge": (1.55, 313.3, 0.8, 0.65)}.items():
        names = ("FID", "Inception Score", "precision", "recall")
        expected |= {f"{model}: {name}": value for name, value in zip(names, values, strict=True)}
    assert published == expected
    stages = {stage.name for stage in Plan(Options(data_path="DIR")).stages()}
    assert {w.stage for w in catalogue()} <= stages
    compared = [w.figure({w.key: w.published}, True) for w in catalogue() if w.published is not None]
    assert all(figure.within for figure in compared)
    assert all(w.figure({w.key: 1.0}, False).within is None for w in catalogue())
    assert "FID∞" in str(catalogue(fid_infinity=True)) and "52.42" in catalogue()[-1].note


def test_reading_a_reconstruction(tmp_path: Path, toy_vae: Path, image_root: Path) -> None:
    """results.json of the command itself, without Inception weights."""
    where = dict(vae_path=toy_vae, image_dir=image_root, output_dir=tmp_path, img_size=32, num_images=2)
    reconstruction.main(argv_of(**where, bits=[3, 6], range=5, no_rfid=True, device="cpu", num_workers=0))
    found = read_reconstruction(tmp_path)
    assert {"fid VAE alone", "fid 3 5", "fid 6 5", "rfid 6 5", "rfid", "is"} < found.keys() and found["fid 6 5"] is None
    differs = ["img_size 32 instead of 256", "pixels round instead of truncate", "num_images 2 instead of None"]
    assert found["differs"] == differs


def test_reading_what_the_stages_wrote(tmp_path: Path) -> None:
    rows = [dict(bits=None, range=None, fid=1.1, rfid=0.5, inception_score=1.0)]
    rows += [dict(bits=6, range=5.0, fid=1.12, rfid=0.55, inception_score=304.0)]
    settings = dict(images_per_class=50, img_size=256, mode=False, num_images=None)
    record = dict(rows=rows, settings=settings, pixels="round", fid_stats="fid_stats/adm_in256_stats.npz")
    (tmp_path / "results.json").write_text(json.dumps(record | {"inception_sha256": "6726825d00"}))
    found = read_reconstruction(tmp_path)
    assert found["fid VAE alone"] == 1.1 and found["fid 6 5"] == 1.12 and found["rfid"] == 0.5 and found["is"] == 304.0
    assert found["differs"] == ["pixels round instead of truncate"]
    base = dict(fid=1.8, inception_score=290.0, precision=0.8, recall=None, num_iter=256, folder="f", eval_bsz=1)
    base |= dict(inception_sha256="other", temperature=0.96, arithmetic="bf16")
    lines = [base | dict(cfg=3.1, images_per_s=5.0), base | dict(cfg=3.1, images_per_s=None), base | dict(cfg=1.0)]
    (tmp_path / "eval.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = read_evaluation(tmp_path, "large_eval", 3.1)
    assert found["fid"] == 1.8 and found["images_per_s"] == 5.0 and found["recall"] is None
    differs = ["precision bf16 instead of fp16", "inception_weights other than torch-fidelity's"]
    assert found["differs"] == differs
    with pytest.raises(ValueError, match="no record with cfg 2"):
        read_evaluation(tmp_path, "large_eval", 2.0)
    rows = [dict(name=figures.HEAD_ROW, value=7.5, unit="ms")]
    (tmp_path / "head.json").write_text(json.dumps(dict(rows=rows, skipped=[])))
    assert figures.read_head(tmp_path / "head.json") == {"ms": 7.5}
    (tmp_path / "head.json").write_text(json.dumps(dict(rows=[], skipped=[dict(name="head", reason="out of memory")])))
    with pytest.raises(ValueError, match="has no row 'head alone, 256 tokens, eager': .*out of memory"):
        figures.read_head(tmp_path / "head.json")


def records_of(options: Options, fid: float, failed: str = "") -> tuple[Plan, list[PlannedStage], list[dict]]:
    """Records as stages leave them, without running any."""
    plan = Plan(options)
    stages = plan.stages()
    machine = {"device": "card", "torch": "2"}
    records = [{"name": s.name, "inputs": [], "seconds": 1.0, "machine": machine} for s in stages]
    for record in records:
        record["result"] = {w.key: w.published for w in catalogue() if w.stage == record["name"]}
        if record["name"] == "large":
            record["result"] |= {"fid": fid, "differs": ["tf32 True instead of False"]}
            record["inputs"] = [dict(path="pretrained_models/x.pth", bytes=1234567, changed=1, sha256="ab" * 32)]
        if record["name"] == failed:
            del record["result"]
            record["error"] = "no memory"
    return plan, stages, records


def test_the_report() -> None:
    good, bad = (build_report(o, *records_of(o, fid)) for o, fid in ((Options(data_path="D"), f) for f in (1.77, 1.9)))
    assert problems(good) == [] and problems(bad) == ["out of tolerance: large: FID"]
    text = as_markdown(bad)
    assert "| large: FID | 1.76 | 1.9 | +0.14 | ±0.0578 [3] | **no** |" in text
    assert "| huge: FID | 1.55 | 1.55 | +0 | ±0.0515 [3] | yes |" in text and "\n[3] another seed moves FID" in text
    for words in ("1,234,567", "ab" * 32, "tf32 True instead of False", "device card", "52.42", "--precision fp16"):
        assert words in text, words
    assert PUBLISHED["large"].split("main_")[1].replace(" OUT", " reproduction/large").replace("DIR", "D") in text
    failed = build_report(Options(data_path="D"), *records_of(Options(data_path="D"), 1.77, failed="huge"))
    missing = "not measured: huge: FID, huge: Inception Score, huge: precision, huge: recall"
    assert problems(failed) == ["huge failed (no memory)", missing] and "**huge**, failed" in as_markdown(failed)
    assert json.loads(json.dumps(failed))["figures"] == failed["figures"]
    for options, words in ((Options(data_path="D", quick=True), "Quick run"), (Options(demo=True), "Stand-in: ")):
        report = build_report(options, *records_of(options, 99.0))
        assert problems(report) == [] and words in as_markdown(report)
        assert all(figure["within"] is None for figure in report["figures"])


def test_reasons_are_numbered_once() -> None:
    lines = [Figure(n, 1.0, 1.0, 0.1, reason).to_dict() for n, reason in (("a", "r"), ("b", "s"), ("c", "r"))]
    rows = figure_rows(lines)
    assert [row.count("[1]") for row in rows] == [0, 0, 1, 0, 1, 0, 1, 0] and rows[-1].startswith("[2] s")


# ---- cost


@pytest.mark.slow
def test_sampling_flops_are_what_torch_counts() -> None:
    images, steps = 32, 3
    with fake_mode(), torch.no_grad():
        model = TokenBridge(**tiny_config()).eval()
        labels = torch.zeros(images, dtype=torch.long)
        counted = count(partial(model.sample_tokens, images, steps, 3.0, "linear", labels, 0.0)).flops / images
    assert sampling_flops(model.config, steps) == pytest.approx(counted, rel=0.03)


def test_sampling_flops_of_large() -> None:
    """docs/spec.md 12: 107.5 TFLOP an image, counted."""
    plan = Plan(Options(data_path="DIR"))
    assert sampling_flops(plan.config("large"), 256) / 1e12 == pytest.approx(107.5, rel=0.005)


def test_the_documents_gpu_hours_are_computed() -> None:
    """The table of docs/reproduce.md: GPU-hours of each stage at the peak of A100 and H100 times the assumed share."""
    work = {stage.name: stage.cost for stage in Plan(Options(data_path="DIR")).stages()}
    work["everything"] = Work(*(sum(getattr(w, kind) for w in work.values()) for kind in ("half", "single")))
    for model in ("large", "huge"):
        work[f"train-{model}"] = Plan(Options(data_path="DIR", train=model)).stages()[-1].cost
    work["cache"] = Plan(Options(data_path="DIR", train="large")).stages()[1].cost
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", DOC, flags=re.M)
    assert {row[0] for row in rows} == {name for name, w in work.items() if w.half + w.single}
    for name, pflop, *hours in rows:
        assert pflop == f"{(work[name].half + work[name].single) / 1e15:,.0f}", name
        for card, written in zip(("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"), hours, strict=True):
            rates = Rates(card, *(peak_tflops(card, precision) * 1e12 * ASSUMED_MFU for precision in ("fp16", "fp32")))
            assert written == f"{work[name].seconds(rates.half, rates.single) / 3600:.1f}", (name, card)


# ---- training


def write_run(folder: Path, losses: np.ndarray) -> None:
    """log.jsonl and a checkpoint with the arguments of a run, as training writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = dict(lr=1e-4, grad_norm=1.0, images_per_s=10.0, mfu=0.4)
    lines = [json.dumps(dict(step=i + 1, loss=float(x), **rest)) for i, x in enumerate(losses)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    args = load_preset("large").flags | dict(accum_iter=4, max_steps=len(losses), precision="fp16", seed=1)
    torch.save({"config": {"args": args}}, folder / "checkpoint-last.pth")


def test_the_first_run_records_a_band_and_the_next_is_compared(tmp_path: Path) -> None:
    losses = 4 + 0.6 * np.exp(-np.arange(400) / 80) + np.random.default_rng(0).normal(0, 0.01, 400)
    where = tmp_path / "cache", tmp_path / "bands", load_preset("large"), 8, "cpu"
    write_run(tmp_path / "a", losses)
    first = read_training(tmp_path / "a", *where)
    assert first["recorded"] and len(list((tmp_path / "bands").iterdir())) == 1
    assert all(figure.within is None for figure in training_figures("large", first))
    assert read_training(tmp_path / "a", *where) == first  # a repetition is not compared with itself
    assert first["images_per_s"] == 10.0 and first["mfu"] == pytest.approx(0.4)
    differs = ["max_steps 400 instead of None", "device cpu instead of cuda", "processes 8 instead of 32"]
    assert first["differs"] == [*differs, "accum_iter 4 instead of 1"]
    for name, shift, within in (("b", 0.015, True), ("c", 0.05, False)):
        write_run(tmp_path / name, losses + shift)
        found = training_figures("large", read_training(tmp_path / name, *where))
        assert {figure.within for figure in found if not figure.clock} == {within} and len(found) == 8
    assert math.isclose(found[0].difference, 0.05, abs_tol=1e-3) and "four standard errors" in found[0].reason
    next((tmp_path / "bands").iterdir()).write_text("{}")
    with pytest.raises(ValueError, match=r"bands/tokenbridge_large-\S+\.json \(--bands\) must hold steps, loss"):
        read_training(tmp_path / "a", *where)


# ---- the whole, killed and continued


def same(report: dict, out: Path) -> dict:
    """A report without what depends on the clock, its folder called OUT."""
    report = json.loads(json.dumps(report).replace(str(out), "OUT"))
    report["figures"] = [figure for figure in report["figures"] if not figure["clock"]]
    for stage in report["stages"]:
        del stage["seconds"]
    return report


@pytest.mark.slow
def test_a_killed_run_that_is_continued_gives_the_same_report(tmp_path: Path) -> None:
    """Killed with its processes in the first stage, alone at the start of the second, and within it."""
    root = tmp_path / "demo"
    for part in ("train", "val"):
        write_image_folder(root / "digits", per_class=7, size=(40, 36), split=part)
    (root / "vae").mkdir()
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    torch.save({"model": vae.state_dict(), "config": vae.config}, root / "vae" / "vae.pth")
    model = dict(model="tokenbridge_digits", img_size=32, class_num=2, buffer_size=4, vae_path=root / "vae" / "vae.pth")
    training = dict(batch_size=4, max_steps=1, warmup_epochs=0, ema_rate=0.1, num_workers=0, device="cpu")
    places = dict(data_path=root / "digits", output_dir=root / "model")
    main_tokenbridge.main(argv_of(**model, **training, **places))
    reports, points = [], ("stand_in/inception.pth", "logs/large.log", "large/eval/*/features/*.npz")
    for out in (tmp_path / "whole", tmp_path / "killed"):
        flags = ["--demo_dir", str(root), "--output_dir", str(out), "--only", "large,speed", "--gpus", "1"]
        command = [sys.executable, "-m", "tools.reproduce", "--demo", *flags]
        for number, point in enumerate(points if out.name == "killed" else ()):
            with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, start_new_session=True) as process:
                while process.poll() is None and not list(out.glob(point)):
                    time.sleep(0.02)
                if process.poll() is None:  # else it was quicker, and is finished
                    (os.kill if number == 1 else os.killpg)(process.pid, signal.SIGKILL)
        result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        reports.append(same(json.loads((out / "reproduction.json").read_text()), out))
    assert reports[0] == reports[1]
    measured = {figure["name"]: figure["measured"] for figure in reports[0]["figures"]}
    assert measured["large: FID"] > 0 and all(value is not None for value in measured.values())
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert again.stdout.count("finished before") == len(reports[0]["stages"])
