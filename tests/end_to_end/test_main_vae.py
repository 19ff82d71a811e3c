"""main_vae.py: what it writes, that resuming changes nothing, that it stops on NaN, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.image_folder import ImageFolderDataset
from dataset.images import read_image, to_uint8
from evaluation.image_metrics import psnr
from main_vae import main
from models.latent_space import DiagonalGaussian
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from tests.helpers import argv_of, assert_same, contents, log_of, write_image_folder
from tests.processes.forked import run_processes
from training.vae import Objective, VaeSettings, edge_distance
from training.vae_run import measure
from util.cli import run_cli

SIZE, STEPS = 16, 10  # 16-pixel images; two classes of 8 at batch 4 make epochs of 4 steps


def arguments(data: Path, out: Path, **changes: object) -> list[str]:
    """A command line for a tiny VAE: 32 wide, two levels (stride 2), 4 latent channels; `changes` replace flags."""
    shape = dict(img_size=SIZE, vae_embed_dim=4, width=32, ch_mult="1,1", num_res_blocks=1, no_attention=True)
    training = dict(kl_weight=1e-5, batch_size=4, lr=1e-3, max_steps=STEPS, log_freq=4, save_freq=5)
    return argv_of(**(shape | training | dict(data_path=data, output_dir=out, num_workers=0, device="cpu") | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_image_folder(tmp_path_factory.mktemp("vae_data"), per_class=8, size=(20, 18))
    return write_image_folder(root, per_class=3, size=(24, 24), split="val")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run never stopped. Read only."""
    out = tmp_path_factory.mktemp("finished")
    main(arguments(data, out))
    return out


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def train_images(data: Path, split: str = "train") -> Tensor:
    """All images of a split (N, 3, S, S) in [-1, 1], in folder order, never mirrored."""
    dataset = ImageFolderDataset(data / split, SIZE, flip=False)
    return torch.stack([dataset.load(i) for i in range(len(dataset))])


# ---- what it writes


def test_result_loads_and_says_what_it_is(finished: Path, data: Path) -> None:
    content, vae = load(finished / "vae.pth"), load_vae(finished / "vae.pth", embed_dim=4, stride=2)
    assert content.keys() == {"model", "config", "psnr", "step"} and content["step"] == STEPS
    assert vae.config == content["config"] == AutoencoderKL(**content["config"]).config
    assert {
        k: vae.config[k] for k in ("embed_dim", "ch", "ch_mult", "num_res_blocks", "attention", "norm_groups", "shift")
    } == dict(embed_dim=4, ch=32, ch_mult=[1, 1], num_res_blocks=1, attention=False, norm_groups=32, shift=0.0)
    assert_same(content["model"], load(finished / "vae_state.pth")["model"])
    # nothing temporary is left
    assert sorted(p.name for p in finished.iterdir()) == ["vae.pth", "vae_log.jsonl", "vae_state.pth"]
    images = train_images(data, "val")
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).mean)
    error = (to_uint8(images).double() - to_uint8(decoded).double()).numpy()
    expected = np.mean([10 * np.log10(255**2 / np.mean(e**2)) for e in error])
    assert content["psnr"] == pytest.approx(expected, abs=1e-3)


def test_scale_is_one_over_the_std_of_posterior_samples(finished: Path, data: Path) -> None:
    vae = load_vae(finished / "vae.pth")
    with torch.no_grad():
        posterior = vae.encode(train_images(data))
    mean, std = posterior.mean.double(), posterior.std.double()
    expected = float((mean.var(correction=0) + std.square().mean()).rsqrt())
    assert vae.scale_factor == pytest.approx(expected, rel=0.03)  # 4,096 samples: their std is known to about 1 %
    assert float(1 / mean.std()) > 1.2 * expected  # so the test would notice means in place of samples
    latents = vae.scale(mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)))
    assert float(latents.std()) == pytest.approx(1, rel=0.05)


class RiggedVae(AutoencoderKL):
    """Its latents are known: channel 0 alternates from place to place, channel 1 varies slowly, channel 2 lies between;
    no noise.
    """

    def encode(self, x: Tensor) -> DiagonalGaussian:
        wave = torch.arange(x.shape[-1] // self.stride) * torch.pi
        # (3, h, w)
        patterns = torch.stack([(wave * f).cos()[None, :].expand(len(wave), -1) for f in (1.0, 0.125, 0.6)])
        mean = 2 * x.mean((1, 2, 3)).view(-1, 1, 1, 1).sign() * patterns  # (B, 3, h, w)
        return DiagonalGaussian(torch.cat([mean, torch.full_like(mean, -30.0)], 1))


def test_measure_on_known_latents(data: Path, tmp_path: Path) -> None:
    vae = RiggedVae(embed_dim=3, ch_mult=(1, 1), ch=8, num_res_blocks=1, attention=False, norm_groups=4)
    dataset = ImageFolderDataset(data / "train", SIZE)
    with torch.no_grad():
        latents = vae.encode(train_images(data)).mean
    assert measure(vae, dataset, None, VaeSettings(batch_size=4, img_size=SIZE), psnr) is None
    assert vae.channel_order == [1, 2, 0]
    assert vae.scale_factor == pytest.approx(1 / latents.numpy().astype(np.float64).std(ddof=1), rel=1e-5)


def test_log_has_every_step(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "vae_log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1)) and [r["epoch"] for r in records] == [0] * 4 + [
        1
    ] * 4 + [2] * 2
    for r in records:
        assert (
            r["loss"] == pytest.approx(r["l1"] + 1e-5 * r["kl"], rel=1e-5) and r["edges"] == 0 and r["images_per_s"] > 0
        )
    lrs = [r["lr"] for r in records]
    assert (
        lrs[0] == 1e-3
        and lrs == sorted(lrs, reverse=True)
        and lrs[-1] == pytest.approx(2e-5 + 9.8e-4 * 0.5 * (1 + np.cos(np.pi * 0.9)))
    )


def test_training_improves_the_reconstruction(data: Path, tmp_path: Path, finished: Path) -> None:
    main(arguments(data, tmp_path, max_steps=80))
    assert load(tmp_path / "vae.pth")["psnr"] > load(finished / "vae.pth")["psnr"] + 3  # dB


def test_without_val_there_is_no_psnr(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "train", tmp_path / "data" / "train")
    main(arguments(tmp_path / "data", tmp_path / "out", max_steps=1))
    assert load(tmp_path / "out" / "vae.pth")["psnr"] is None


def test_no_flip_mirrors_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    forward = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, images, noise: seen.extend(images) or forward(self, images, noise)
    )
    plain = {image.numpy().tobytes() for image in train_images(data)}
    mirrored = {image.flip(-1).numpy().tobytes() for image in train_images(data)}
    for name, flag in (("flip", None), ("no_flip", True)):
        seen.clear()
        main(arguments(data, tmp_path / name, no_flip=flag, max_steps=8))
        found = [image.numpy().tobytes() for image in seen]
        assert len(found) == 32 and set(found) <= plain | mirrored
        assert sum(image in plain for image in found) == (32 if flag else pytest.approx(16, abs=12))
        assert len(set(found) & plain) == len(plain) or not flag  # an epoch shows every image


# ---- loss


def test_objective_is_the_documented_sum() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=2, ch_mult=(1, 1), ch=8, num_res_blocks=1, attention=False, norm_groups=4)
    images, noise = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 2, 4, 4)
    with torch.no_grad():
        loss, l1, kl, edges = Objective(vae, 0.25, 2.0)(images, noise).tolist()
        p = vae.encode(images)
        decoded = vae.decode(p.mean + p.std * noise)
    mean, std = p.mean.double().numpy(), p.std.double().numpy()
    assert l1 == pytest.approx(np.abs(images.numpy() - decoded.numpy()).mean(), rel=1e-5)
    assert kl == pytest.approx((-np.log(std) + (std**2 + mean**2 - 1) / 2).sum((1, 2, 3)).mean(), rel=1e-4)
    assert edges == pytest.approx(float(edge_distance(images, decoded)), rel=1e-6) and edges > 0
    assert loss == pytest.approx(l1 + 0.25 * kl + 2 * edges, rel=1e-5)


def test_edge_distance_of_known_pictures() -> None:
    flat, ramp = torch.zeros(1, 3, 8, 8), torch.arange(8.0).expand(1, 3, 8, 8)
    assert edge_distance(flat + 0.5, flat) == 0  # a shade is no edge
    assert edge_distance(ramp, flat, scales=1) == 1  # horizontal differences 1, vertical 0
    assert edge_distance(ramp, flat) == pytest.approx((1 + 2 + 4) / 3)  # each halving doubles the ramp's steepness
    assert torch.isfinite(edge_distance(torch.randn(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)))


# ---- resume


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def test_resume_equals_never_stopped_bit_for_bit(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    forward, calls = Objective.forward, []

    def die_at_step_8(self: Objective, images: Tensor, noise: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 8:  # in the middle of an epoch, three steps after a save
            raise Killed
        return forward(self, images, noise)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "forward", die_at_step_8)
        with pytest.raises(Killed):
            main(arguments(data, tmp_path, log_freq=1, resume=tmp_path))
    assert any("starts from random weights" in line for line in messages)
    assert load(tmp_path / "vae_state.pth")["step"] == 5 and not (tmp_path / "vae.pth").exists()
    torch.manual_seed(99)  # the global generator must not matter
    main(arguments(data, tmp_path, resume=tmp_path))
    assert any("resumed" in line and "step 5" in line for line in messages)
    resumed, straight = (load(folder / "vae_state.pth") for folder in (tmp_path, finished))
    assert resumed["step"] == STEPS
    for key in ("model", "optimizer", "step", "steps_per_epoch"):
        assert_same(resumed[key], straight[key])
    assert_same(load(tmp_path / "vae.pth"), load(finished / "vae.pth"))

    assert log_of(tmp_path, "vae_log.jsonl") == log_of(finished, "vae_log.jsonl")


def test_running_a_finished_run_again(finished: Path, data: Path, tmp_path: Path, messages: list[str]) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    main(arguments(data, out, resume=out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and any(
        "already there" in line for line in messages
    )
    (out / "vae.pth").unlink()  # as after a kill between the two files
    main(arguments(data, out, resume=out))
    assert_same(load(out / "vae.pth"), load(finished / "vae.pth"))


def test_resume_takes_the_shape_from_the_state(finished: Path, data: Path, tmp_path: Path, messages: list[str]) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    shape = dict.fromkeys(("vae_embed_dim", "width", "ch_mult", "num_res_blocks", "no_attention"))
    main(arguments(data, out, resume=out, max_steps=12, lr=5e-4, **shape))
    assert load_vae(out / "vae.pth").config["ch"] == 32 and load(out / "vae.pth")["step"] == 12
    assert any(line.startswith("settings that differ") and "lr 0.0005, was 0.001" in line for line in messages)
    assert load(out / "vae_state.pth")["config"]["args"]["width"] == 32


# ---- NaN


def test_nan_stops_names_step_and_lr_and_keeps_the_last_good_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Objective.forward, []

    def broken_from_step_3(self: Objective, images: Tensor, noise: Tensor) -> Tensor:
        calls.append(1)
        return forward(self, images, noise) * (1 if len(calls) < 3 else float("nan"))

    monkeypatch.setattr(Objective, "forward", broken_from_step_3)
    with pytest.raises(
        ValueError, match=r"4 steps in a row .* stopped at step 6 with lr \d.*files written so far"
    ) as stop:
        main(arguments(data, tmp_path, save_freq=1, max_bad_steps=4))
    lr = float(re.search(r"with lr ([\d.e-]+),", str(stop.value)).group(1))
    assert lr == pytest.approx(2e-5 + 9.8e-4 * 0.5 * (1 + np.cos(np.pi * 0.5)), rel=1e-2)
    state = load(tmp_path / "vae_state.pth")
    assert state["step"] == 2 and all(torch.isfinite(value).all() for value in state["model"].values())
    assert not (tmp_path / "vae.pth").exists()
    records = [json.loads(line) for line in (tmp_path / "vae_log.jsonl").read_text().splitlines()]
    assert [r.get("skipped", False) for r in records] == [False] * 2 + [True] * 4


def test_one_bad_step_is_skipped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls, weights = Objective.forward, [], []

    def broken_at_step_3(self: Objective, images: Tensor, noise: Tensor) -> Tensor:
        calls.append(1)
        weights.append(self.vae.decoder.conv_out.weight.detach().clone())  # before step 1, 2, ...
        return forward(self, images, noise) * (float("inf") if len(calls) == 3 else 1)

    monkeypatch.setattr(Objective, "forward", broken_at_step_3)
    main(arguments(data, tmp_path))
    assert (
        torch.equal(weights[2], weights[3])
        and not torch.equal(weights[3], weights[4])
        and not torch.equal(weights[1], weights[2])
    )
    assert load(tmp_path / "vae.pth")["step"] == STEPS


def test_absurd_lr_stops_without_a_file(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at step \d+ with lr 1e\+09"):
        main(arguments(data, tmp_path, lr=1e9, min_lr_ratio=1, save_freq=100))
    assert not (tmp_path / "vae.pth").exists() and not (tmp_path / "vae_state.pth").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(img_size=15), r"img_size 15 is not a multiple of the stride 2 .*ch_mult.*--img_size"),
        (dict(img_size=0), r"img_size must be at least 2.*\(--img_size\)"),
        (dict(ch_mult="1,x"), "ch_mult takes positive whole numbers .*'1,x'.*--ch_mult"),
        (dict(ch_mult="1,0"), "ch_mult takes positive whole numbers"),
        (dict(width=48), "norm_groups 32 does not divide .* 48.*--norm_groups"),
        (dict(norm_groups=5), "norm_groups 5 does not divide"),
        (dict(kl_weight=-1), "kl_weight must be at least 0.*--kl_weight"),
        (dict(kl_weight="nan"), "kl_weight must be finite.*--kl_weight"),
        (dict(lr="inf"), "lr must be finite.*--lr"),
        (dict(min_lr_ratio=1.5), "min_lr_ratio .* 1.5.*--min_lr_ratio"),
        (dict(batch_size=0), "batch_size must be at least 1.*--batch_size"),
        (dict(max_bad_steps=0), "max_bad_steps must be at least 1.*--max_bad_steps"),
        (dict(batch_size=17), "16 samples, fewer than one global batch .*--batch_size"),
        (dict(class_num=1), "2 class folders, more than 1 .--class_num"),
        (dict(data_path="no_such_folder"), r"no_such_folder.train \(--data_path\)"),
        (dict(num_workers=-1), r"num_workers must be at least 0.*\(--num_workers\)"),
        (dict(device="cuda"), "--device cuda .* no CUDA device"),
        (dict(device="tpu"), "--device 'tpu' is not one of"),
        (dict(resume="state.pth"), r"no checkpoint at state.pth.*\(--resume\)"),
    ],
)
def test_bad_flags_are_refused_before_any_work(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError), match=words):
        main(arguments(data, tmp_path / "out", **changes))
    assert not contents(tmp_path)


@pytest.mark.parametrize("changes", [dict(on_bad_image="ignore"), dict(precision="fp8"), dict(widht=32)])
def test_unknown_choices_and_flags_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments(data, tmp_path / "out", **changes))
    assert stop.value.code == 2 and f"--{next(iter(changes))}" in capsys.readouterr().err and not contents(tmp_path)


def test_bad_input_ends_the_program_with_2(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run_cli(lambda: main(arguments(data, tmp_path, img_size=15))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: img_size 15")


def test_empty_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data" / "train" / "a").mkdir(parents=True)
    with pytest.raises(OSError, match=r"--data_path\) holds class folders but no"):
        main(arguments(tmp_path / "data", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_corrupt_image(data: Path, tmp_path: Path, messages: list[str]) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    bad = root / "train" / "china" / "03.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"china.03\.png cannot be read .*skip such images .--on_bad_image"):
        main(arguments(root, tmp_path / "out"))
    assert not (tmp_path / "out" / "vae.pth").exists()
    main(arguments(root, tmp_path / "skipped", on_bad_image="skip"))
    assert load(tmp_path / "skipped" / "vae.pth")["step"] == STEPS
    assert sum("03.png" in line and "skipped bad image 1" in line for line in messages) == 1
    with pytest.raises(ValueError, match=r"03\.png cannot be read"):
        read_image(bad)


def test_corrupt_image_met_by_a_loader_process_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    (root / "train" / "flower" / "05.png").write_bytes(b"not a picture")
    assert run_cli(lambda: main(arguments(root, tmp_path / "out", num_workers=1))) == 2
    error = capsys.readouterr().err
    assert (
        re.search(r"^error: image .*05\.png cannot be read .*--on_bad_image.$", error, re.MULTILINE)
        and "Traceback" not in error
    )


def test_output_dir_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write to .*file.out \(--output_dir\)"):
        main(arguments(data, tmp_path / "file" / "out"))


def test_other_runs_files_are_not_overwritten(data: Path, finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    before = contents(out)
    with pytest.raises(
        ValueError, match=r"\(--output_dir\) already holds vae\.pth and vae_state\.pth: continue it with --resume"
    ):
        main(arguments(data, out))
    with pytest.raises(ValueError, match="already holds"):
        main(arguments(data, out, resume=tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"width contradicts .*vae_state\.pth, whose VAE has ch = 32.*--width"):
        main(arguments(data, out, resume=out, width=64))
    with pytest.raises(ValueError, match="img_size 15"):
        main(arguments(data, out, resume=out, img_size=15))
    assert contents(out) == before
    (out / "vae_state.pth").unlink()
    with pytest.raises(ValueError, match=r"already holds vae\.pth: choose another folder"):
        main(arguments(data, out, resume=out))


def test_resume_from_a_file_that_is_no_training_state(data: Path, finished: Path, tmp_path: Path) -> None:
    whole = (finished / "vae_state.pth").read_bytes()
    (tmp_path / "vae_state.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"vae_state\.pth cannot be read as a checkpoint.*\(--resume\)"):
        main(arguments(data, tmp_path, resume=tmp_path))
    with pytest.raises(ValueError, match=r"vae\.pth is not a training state .* lacks optimizer.*\(--resume\)"):
        main(arguments(data, tmp_path / "out", resume=finished / "vae.pth"))
    broken = load(finished / "vae_state.pth")
    broken["model"]["quant_conv.weight"] = broken["model"]["quant_conv.weight"][:1]
    torch.save(broken, tmp_path / "vae_state.pth")
    with pytest.raises(ValueError, match=r"vae_state\.pth .*another shape \(quant_conv\.weight"):
        main(arguments(data, tmp_path, resume=tmp_path))
    assert sorted(contents(tmp_path)) == ["vae_state.pth"]


# ---- processes


def test_two_processes_equal_one_with_twice_the_batch(data: Path, tmp_path: Path) -> None:
    main(arguments(data, tmp_path / "one", batch_size=8, max_steps=3))
    done = run_processes(["main_vae.py", *arguments(data, tmp_path / "two", batch_size=4, max_steps=3)], nproc=2)
    assert done.returncode == 0, done.stderr
    one, two = (load(tmp_path / name / "vae.pth") for name in ("one", "two"))
    for key, value in one["model"].items():
        # Adam's sign of a gradient near 0 may flip: at most 3 lr
        torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-3)
    close = torch.cat([(two["model"][key] - value).flatten() for key, value in one["model"].items()]).abs() < 1e-5
    assert close.float().mean() > 0.99
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "vae_log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 3
    assert two["config"]["scale_factor"] == pytest.approx(one["config"]["scale_factor"], rel=1e-3)


@pytest.mark.slow
def test_two_processes_stop_together_on_nan(data: Path, tmp_path: Path) -> None:
    done = run_processes(
        ["main_vae.py", *arguments(data, tmp_path, lr=1e9, min_lr_ratio=1, max_bad_steps=3)], nproc=2, timeout=90
    )
    assert done.returncode != 0 and len(re.findall(r"error: 3 steps in a row .* lr 1e\+09", done.stderr)) >= 1, (
        done.stderr
    )
    assert not (tmp_path / "vae.pth").exists() and not (tmp_path / "vae_state.pth").exists()
