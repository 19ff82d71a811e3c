"""`main_tokenbridge.py --sample`: every option of the sampler from the command line, sweeps, mixtures, editing, the unmasking as pictures."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.images import center_crop_adm, read_image
from generation import pipeline as engine_sample
from generation.library import encode_init, generate
from generation.loading import load
from main_tokenbridge import main
from models import MODELS
from tests.helpers import photographs, tiny_vae
from util.log import run_cli

SIZE = 32  # pixels, with a VAE of stride 8: 4x4 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae.pth and the checkpoint of an untrained model whose head is no identity."""
    out = tmp_path_factory.mktemp("model")
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    torch.save({"model": vae.state_dict(), "config": vae.config}, out / "vae.pth")
    torch.manual_seed(0)
    model = MODELS["tokenbridge_digits"](img_size=SIZE, vae_stride=8, vae_embed_dim=4, class_num=3, buffer_size=4)
    for layer in model.modulation_layers:
        torch.nn.init.normal_(layer[1].weight, std=0.2)
    config = {
        "model_name": "tokenbridge_digits",
        "model": model.config.to_dict(),
        "vae": vae.config,
        "vae_fingerprint": vae.latent_fingerprint(),
        "args": {},
    }
    ema = {name: p.detach() for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "config": config}, out / "checkpoint-last.pth")
    return out


def command(folder: Path, out: Path, *more: object) -> list[str]:
    return [
        str(part)
        for part in (
            "--sample",
            "--resume",
            folder,
            "--vae_path",
            folder / "vae.pth",
            "--device",
            "cpu",
            "--output_dir",
            out,
            "--num_iter",
            3,
            "--seed",
            7,
            "--num_workers",
            0,
            *more,
        )
    ]


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(read_image(path)) for path in sorted(folder.glob("0*.png"))])


def sampled(folder: Path, out: Path, *more: object) -> np.ndarray:
    main(command(folder, out, "--classes", "0,2", "--num_images", 4, *more))
    return pictures(out)


def test_the_library_draws_the_same_images(folder, tmp_path):
    found = sampled(folder, tmp_path, "--cfg", 2, "--order", "halton")
    images = generate(load(folder)[0], load(folder)[1], [0, 0, 2, 2], seed=7, num_iter=3, cfg=2.0, order="halton")
    assert np.array_equal(found, np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize(
    "more",
    [
        ("--order", "confidence"),
        ("--order", "raster"),
        ("--mask_schedule", "linear"),
        ("--top_k", 2),
        ("--top_p", 0.3),
        ("--temperature_schedule", "linear"),
        ("--channel_temperature", 1, 0.1),
        ("--channel_temperature", 1, 0.5, 0.5, 0),
        ("--cfg_schedule", "cosine", "--cfg", 3),
        ("--cfg_schedule", "interval", "--cfg", 3, "--cfg_interval", 0, 0.5),
        ("--reuse_features", 2),
        ("--reuse_guidance", 3, "--cfg", 5),
        ("--order", "confidence", "--confidence_temperature", 0),
        ("--order", "confidence"),
    ],
)
def test_options_change_the_images_and_are_written_down(folder, tmp_path, more):
    plain, changed = sampled(folder, tmp_path / "plain"), sampled(folder, tmp_path / "changed", *more)
    assert changed.shape == plain.shape == (4, SIZE, SIZE, 3) and not np.array_equal(plain, changed)
    record = json.loads((tmp_path / "changed" / "samples.json").read_text())
    name, values = more[0].removeprefix("--"), [part for part in more[1:] if not str(part).startswith("--")]
    assert record[name] in (values[0], values) and record["labels"] == [0, 0, 2, 2]


def test_a_sweep_has_a_folder_per_scale(folder, tmp_path):
    main(command(folder, tmp_path / "sweep", "--classes", "0,2", "--num_images", 4, "--cfg_scale", 1, 3.5))
    assert not list((tmp_path / "sweep").glob("0*.png"))
    for cfg in ("1", "3.5"):
        assert np.array_equal(
            pictures(tmp_path / "sweep" / f"cfg_{cfg}"), sampled(folder, tmp_path / cfg, "--cfg", cfg)
        )
    assert read_image(tmp_path / "sweep" / "sweep.png").size == (4 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)


def test_mixtures_from_one_class_to_another(folder, tmp_path):
    main(command(folder, tmp_path, "--interpolate", "0,2", "--num_images", 5, "--temperature", 0.5))
    found = pictures(tmp_path)
    assert len(found) == 5 and len({image.tobytes() for image in found}) > 1
    ends = generate(load(folder)[0], load(folder)[1], [0], seed=7, num_iter=3, temperature=0.5)
    assert np.array_equal(found[0], np.asarray(ends[0]))


def test_unmasking_is_shown(folder, tmp_path):
    found = sampled(folder, tmp_path, "--show_steps", "2", "--eval_bsz", 3)
    for number in range(4):
        with Image.open(tmp_path / "steps" / f"{number:06d}.gif") as gif:
            assert gif.n_frames == 2 and gif.size == (SIZE, SIZE)
        strip = np.asarray(read_image(tmp_path / "steps" / f"{number:06d}.png"))
        assert strip.shape == (SIZE + 4, 2 * (SIZE + 2) + 2, 3)
        assert np.array_equal(strip[2 : SIZE + 2, SIZE + 4 : -2], found[number])
        assert (strip[2 : SIZE + 2, 2 : SIZE + 2] == 128).all(-1).sum() >= 8 * 8 * 3  # masked tokens are grey


def test_editing_keeps_what_it_must(folder, tmp_path, monkeypatch):
    Image.fromarray(photographs()[0][:80, :120]).save(tmp_path / "photo.png")
    mask = np.zeros((80, 120), np.uint8)
    mask[:, 60:] = 255  # the right half of the centre crop
    Image.fromarray(mask).save(tmp_path / "mask.png")
    states = []
    plain = engine_sample.decode
    monkeypatch.setattr(
        engine_sample, "decode", lambda vae, latents, numbers: (states.append(latents), plain(vae, latents, numbers))[1]
    )
    found = sampled(
        folder, tmp_path / "out", "--init", tmp_path / "photo.png", "--mask", tmp_path / "mask.png", "--show_steps"
    )
    model, vae = load(folder)
    kept = model.quantize(
        encode_init(vae, [center_crop_adm(read_image(tmp_path / "photo.png"), SIZE)], SIZE, torch.device("cpu"))
    )[1]
    assert torch.equal(states[0][..., :2], kept[..., :2].expand(4, -1, -1, -1))
    assert not torch.equal(states[0][..., 2:], kept[..., 2:].expand(4, -1, -1, -1))
    assert len(found) == 4


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--classes", "3"), r"--classes: \[3\] not in \[0, 3\)"),
        ((), "--sample needs --classes"),
        (("--classes", "0", "--interpolate", "0,2"), "instead"),
        (("--interpolate", "0,1,2"), "two classes"),
        (("--interpolate", "0,9"), "--interpolate"),
        (("--classes", "0", "--init", "x.png"), "go together"),
        (("--classes", "0", "--top_p", "0"), "top_p must be above 0"),
        (("--classes", "0", "--top_p", "1.1"), "top_p must be at most 1"),
        (("--classes", "0", "--seed", "-1"), "--seed must be at least 0"),
        (("--classes", "0", "--cfg_scale", "1", "nan"), "--cfg_scale must be finite"),
        (("--classes", "0", "--channel_temperature", "1", "1", "1"), "2 or 4 factors"),
        (("--classes", "0", "--top_k", "-1"), "top_k"),
        (("--classes", "0", "--cfg_interval", "0.8", "0.2"), "cfg_interval"),
        (("--classes", "0", "--reuse_features", "0"), "reuse_features"),
        (("--classes", "0", "--temperature_end", "-1"), "temperature_end"),
        (("--classes", "0", "--show_steps", "-1"), "--show_steps"),
    ],
)
def test_bad_input(folder, tmp_path, capsys, more, words):
    assert run_cli(lambda: main(command(folder, tmp_path / "out", *more))) == 2
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_a_mask_of_another_size(folder, tmp_path):
    for name, size in (("photo", (80, 60)), ("mask", (60, 80))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    with pytest.raises(
        ValueError, match=r"--mask.* is 60 x 80 pixels, .*--init.* 80 x 60; they must have the same size"
    ):
        main(
            command(
                folder,
                tmp_path / "out",
                "--classes",
                "0",
                "--init",
                tmp_path / "photo.png",
                "--mask",
                tmp_path / "mask.png",
            )
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "choices"),
    [
        ("--order", "confidence"),
        ("--mask_schedule", "square"),
        ("--cfg_schedule", "interval"),
        ("--temperature_schedule", "cosine"),
    ],
)
def test_unknown_choices_list_what_there_is(folder, tmp_path, capsys, flag, choices):
    with pytest.raises(SystemExit):
        main(command(folder, tmp_path, "--classes", "0", flag, "best"))
    assert choices in capsys.readouterr().err.split("error: ")[1]


def test_flags_of_sample_alone(folder, tmp_path):
    for flag in (("--cfg_scale", "2"), ("--interpolate", "0,1"), ("--show_steps",)):
        with pytest.raises(ValueError, match=f"{flag[0]} changes --sample only"):
            main(["--evaluate", "--resume", str(folder), *flag])
