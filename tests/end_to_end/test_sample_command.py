"""`main_tokenbridge.py --sample`: the sampler's options, sweeps, mixtures, editing, the unmasking as pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generation
from dataset.images import center_crop_adm, read_image
from generation import Pipeline
from generation.sample import scale_folder
from main_tokenbridge import main
from models import MODELS
from tests.helpers import photographs, tiny_vae

SIZE = 32  # pixels, with a VAE of stride 8: 4x4 tokens
CLASSES = ("--classes", "0,2", "--num_images", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vae.pth and the checkpoint of an untrained model whose head is not the identity."""
    out = tmp_path_factory.mktemp("model")
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    torch.save({"model": vae.state_dict(), "config": vae.config}, out / "vae.pth")
    torch.manual_seed(0)
    model = MODELS["tokenbridge_digits"](img_size=SIZE, vae_stride=8, vae_embed_dim=4, class_num=3, buffer_size=4)
    for layer in model.modulation_layers:
        torch.nn.init.normal_(layer[1].weight, std=0.2)
    config = {"model_name": "tokenbridge_digits", "model": model.config.to_dict(), "vae": vae.config, "args": {}}
    config |= {"vae_fingerprint": vae.latent_fingerprint(), "classes": ["0", "two, 2", "1"]}
    ema = {name: p.detach() for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "config": config}, out / "checkpoint-last.pth")
    return out


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return generation.load(folder)


def sample(folder: Path, out: Path, *more: object) -> np.ndarray:
    """The images that --sample writes to `out`."""
    flags = ["--resume", folder, "--vae_path", folder / "vae.pth", "--output_dir", out, "--device", "cpu"]
    main([str(x) for x in ("--sample", *flags, "--num_iter", 3, "--seed", 7, "--num_workers", 0, *more)])
    return pictures(out)


def pictures(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("0*.png"))
    return np.stack([np.asarray(read_image(file)) for file in files]) if files else np.empty(0)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_the_library_generates_the_same_images(folder, pipeline, tmp_path, messages):
    """Classes by number or by name; the log and samples.json say which they are."""
    written = sample(folder, tmp_path, *CLASSES, "--cfg", 2, "--order", "halton")
    assert "class 0 = '0', class 2 = '1'" in messages and any("class 2 = '1'; classes takes" in m for m in messages)
    assert json.loads((tmp_path / "samples.json").read_text())["class_names"] == {"0": "0", "2": "1"}
    assert pipeline.class_names == ["0", "two, 2", "1"]
    named = sample(folder, tmp_path / "named", "--classes", "two, 2", "--num_images", 1)
    assert np.array_equal(named, pixels(pipeline.generate([1], seed=7, num_iter=3)))
    assert np.array_equal(written, pixels(pipeline.generate([0, 0, 2, 2], seed=7, num_iter=3, cfg=2.0, order="halton")))


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> np.ndarray:
    return sample(folder, tmp_path_factory.mktemp("plain"), *CLASSES)


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
    ],
)
def test_options_change_the_images_and_are_written_down(folder, plain, tmp_path, more):
    changed = sample(folder, tmp_path, *CLASSES, *more)
    assert changed.shape == plain.shape == (4, SIZE, SIZE, 3) and not np.array_equal(plain, changed)
    record = json.loads((tmp_path / "samples.json").read_text())
    name, values = more[0].removeprefix("--"), [part for part in more[1:] if not str(part).startswith("--")]
    assert record[name] in (values[0], values) and record["labels"] == [0, 0, 2, 2]
    assert record["checkpoint"] == str(folder / "checkpoint-last.pth") and record["weights"] == "ema"


@pytest.mark.parametrize("name", ["000007.png", "1000000.png", "grid.png", "samples.json", "steps", "cfg_2"])
def test_images_of_an_earlier_run_are_not_mixed_in(folder, tmp_path, name):
    (tmp_path / "checkpoint-last.pth").touch()  # files of other kinds may be there
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"holds images of another run \({name}\): .*\(--output_dir\)"):
        sample(folder, tmp_path, *CLASSES)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_command_may_be_repeated_after_a_kill(folder, plain, tmp_path):
    sample(folder, tmp_path, *CLASSES)
    record = json.loads((tmp_path / "samples.json").read_text())
    (tmp_path / "samples.json").write_text(json.dumps(record | {"complete": False}))
    (tmp_path / "000003.png").unlink()
    assert np.array_equal(sample(folder, tmp_path, *CLASSES), plain)
    assert json.loads((tmp_path / "samples.json").read_text()) == record and record["complete"]
    with pytest.raises(ValueError, match=r"holds images of another run \(000000.png, 000001.png, 000002.png, ...\)"):
        sample(folder, tmp_path, "--classes", "0,2", "--num_images", 2)


def test_a_sweep_has_a_folder_per_scale(folder, plain, tmp_path):
    assert not sample(folder, tmp_path / "sweep", *CLASSES, "--cfg", 1, 3.5).size
    assert [scale_folder(cfg) for cfg in (2.0, 2.0000001, 2.0000004)] == ["cfg_2", "cfg_2.0000001", "cfg_2.0000004"]
    assert np.array_equal(pictures(tmp_path / "sweep" / "cfg_1"), plain)
    guided = sample(folder, tmp_path / "one", *CLASSES, "--cfg", 3.5)
    assert np.array_equal(pictures(tmp_path / "sweep" / "cfg_3.5"), guided)
    assert json.loads((tmp_path / "sweep" / "cfg_3.5" / "samples.json").read_text())["cfg"] == 3.5
    assert read_image(tmp_path / "sweep" / "sweep.png").size == (4 * (SIZE + 2) + 2, 2 * (SIZE + 2) + 2)


def test_mixtures_from_one_class_to_another(folder, pipeline, tmp_path):
    written = sample(folder, tmp_path, "--interpolate", "0,2", "--num_images", 5, "--temperature", 0.5)
    assert len(written) == 5 and len({image.tobytes() for image in written}) > 1
    assert np.array_equal(written[:1], pixels(pipeline.generate([0], seed=7, num_iter=3, temperature=0.5)))


def test_unmasking_is_shown(folder, tmp_path):
    written = sample(folder, tmp_path, *CLASSES, "--show_steps", "2", "--eval_bsz", 3)
    for number in range(4):
        with Image.open(tmp_path / "steps" / f"{number:06d}.gif") as gif:
            assert gif.n_frames == 2 and gif.size == (SIZE, SIZE)
        strip = np.asarray(read_image(tmp_path / "steps" / f"{number:06d}.png"))
        assert strip.shape == (SIZE + 4, 2 * (SIZE + 2) + 2, 3)
        assert np.array_equal(strip[2 : SIZE + 2, SIZE + 4 : -2], written[number])
        assert (strip[2 : SIZE + 2, 2 : SIZE + 2] == 128).all(-1).sum() >= 8 * 8 * 3  # masked tokens are grey
    grid = np.asarray(read_image(tmp_path / "steps" / "grid.png"))  # strip 3 is the last row
    assert np.array_equal(grid[-2 - strip.shape[0] : -2, 2:-2], strip)


def test_editing_keeps_what_it_must(folder, pipeline, tmp_path):
    """The image and the mask are cropped alike; tests/sampling/test_generation.py checks that the other tokens stay.

    Both are taken as a viewer shows them: the image is stored turned (EXIF), the mask is white with a transparent half.
    """
    photo, mask = photographs()[0][:80, :120], np.zeros((80, 120, 3), np.uint8)
    mask[:, 60:] = 255  # the right half of the centre crop
    crops = {}
    for name, array in (("init", photo), ("mask", mask)):
        crops[name] = center_crop_adm(Image.fromarray(array), SIZE)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.fromarray(photo).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "init.png", exif=exif)
    Image.fromarray(np.concatenate([np.full_like(mask, 255), mask[..., :1]], -1)).save(tmp_path / "mask.png")
    flags = ["--init", tmp_path / "init.png", "--mask", tmp_path / "mask.png", "--show_steps"]
    written = sample(folder, tmp_path / "out", *CLASSES, *flags)
    *_, last = pipeline.generate_steps([0, 0, 2, 2], seed=7, num_iter=3, **crops)
    assert np.array_equal(written, pixels(last.images()))
    x = torch.from_numpy(np.array(crops["init"])).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
    kept = pipeline.model.quantize(pipeline.vae.scale(pipeline.vae.encode(x).mode()))[1]  # (1, C, H, W)
    changed = (last.state.latents != kept).any(1)  # (B, H, W)
    assert not changed[..., :2].any() and changed[..., 2:].any()
