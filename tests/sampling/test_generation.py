"""The library: `generation.load`, `Pipeline.generate`, `Pipeline.generate_steps`; editing and mixtures of classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generation
from dataset.images import to_uint8
from generation import Pipeline
from generation.editing import encode_init, picture_tensor, token_mask
from tests.helpers import photographs, tiny_model, tiny_vae

OPTIONS = dict(num_iter=3, cfg=2.0)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The golden tiny model, 4x4 tokens of 64 x 64 pixels."""
    return Pipeline(tiny_model(img_size=64).requires_grad_(False), tiny_vae().requires_grad_(False))


def photo(size: int = 64) -> Image.Image:
    return Image.fromarray(photographs()[0][:size, :size])


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_generate_gives_pictures(pipeline):
    images = pipeline.generate([1, None, {2: 0.5, 7: 0.5}], seed=3, **OPTIONS)
    assert [image.size for image in images] == [(64, 64)] * 3 and all(image.mode == "RGB" for image in images)
    assert len({image.tobytes() for image in images}) == 3


def test_images_do_not_depend_on_the_batch(pipeline):
    together = pixels(pipeline.generate(range(1, 6), seed=3, **OPTIONS))
    split = pixels(pipeline.generate(range(1, 6), seed=3, batch_size=2, **OPTIONS))
    assert np.abs(together.astype(int) - split).max() <= 1  # the VAE's rounding; tokens are equal
    assert not np.array_equal(together, pixels(pipeline.generate(range(1, 6), seed=4, **OPTIONS)))


def test_steps_are_yielded_as_they_come(pipeline):
    steps, states = [], []
    for step in pipeline.generate_steps([1, 2], seed=3, **OPTIONS):
        steps.append((step.step, step.num_iter, step.done, step.state.num_masked))
        states.append(step.state)
        grey = (pixels(step.images()) == 128).all(-1)
        assert grey[step.state.masked.repeat_interleave(16, 1).repeat_interleave(16, 2).numpy()].all()
    assert steps == [(0, 3, False, 13), (1, 3, False, 8), (2, 3, True, 0)]
    assert np.array_equal(pixels(step.images()), pixels(pipeline.generate([1, 2], seed=3, **OPTIONS)))
    for state in states:  # earlier states stay as they were
        assert ((state.latents != 0).any(1) == ~state.masked).all()
    known = ~states[0].masked.unsqueeze(1).expand(-1, 16, -1, -1)
    assert torch.equal(states[0].latents[known], states[2].latents[known])


def test_stopping_early_and_callbacks(pipeline):
    iterator = pipeline.generate_steps([1], **OPTIONS)
    next(iterator)
    iterator.close()
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    calls, options = [], dict(batch_size=2) | OPTIONS
    pipeline.generate([1, 2, 3], on_step=lambda s: calls.append((list(s.numbers), s.step, len(s.images()))), **options)
    assert calls == [([0, 1], i, 2) for i in range(3)] + [([2], i, 1) for i in range(3)]


def test_bf16_does_not_leak_into_the_caller(pipeline):
    def check(step):
        assert not torch.is_autocast_enabled("cpu")
        return step

    *_, last = map(check, pipeline.generate_steps([1], precision="bf16", **OPTIONS))
    assert last.done and torch.isfinite(last.state.latents).all()
    images = pipeline.generate([1], precision="bf16", on_step=check, **OPTIONS)
    assert np.array_equal(pixels(images), pixels(last.images()))
    assert not np.array_equal(pixels(images), pixels(pipeline.generate([1], **OPTIONS)))


def test_mixtures_are_sums_of_embeddings(pipeline):
    model = pipeline.model
    rows, table = model.class_embeddings([3, None, {3: 0.25, 7: 0.75}, {7: 1.0}]), model.class_emb.weight
    assert torch.equal(rows[[0, 1, 3]], torch.stack([table[3], model.fake_latent[0], table[7]]))
    assert torch.allclose(rows[2], 0.25 * table[3] + 0.75 * table[7])


@pytest.mark.parametrize("wrong", [10, -1, {}, {3: float("nan")}, {12: 1.0}, 2.5])
def test_classes_that_do_not_exist(pipeline, wrong):
    with pytest.raises(ValueError, match="classes"):
        pipeline.generate([1, wrong])


def test_tokens_outside_the_mask_are_kept_exactly(pipeline):
    """Whatever the order; the regenerated ones are new."""
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 20:40] = 255  # touches token columns 1 and 2, rows 1 and 2
    kept = pipeline.model.quantize(encode_init(pipeline.vae, [photo()], 64, torch.device("cpu")))[1]
    chosen = torch.zeros(4, 4, dtype=torch.bool)
    chosen[1:3, 1:3] = True
    for order in ("random", "confidence", "halton", "raster", "subsample"):
        *_, last = pipeline.generate_steps([1, 2], init=photo(), mask=Image.fromarray(mask), order=order, **OPTIONS)
        assert torch.equal(last.state.latents[:, :, ~chosen], kept[:, :, ~chosen].expand(2, -1, -1))
        assert (last.state.latents[:, :, chosen] != kept[:, :, chosen]).float().mean() > 0.5


def test_token_masks():
    image = np.zeros((64, 64), np.uint8)
    image[0, 17], image[63, 63], image[40, 2] = 255, 200, 100  # the last is dark: kept
    expected = torch.zeros(16, dtype=torch.bool)
    expected[[1, 15]] = True
    for mask in (Image.fromarray(image), image, image / np.float32(255), expected.view(4, 4)):
        assert torch.equal(token_mask(mask, 64, 4), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask=np.ones((32, 64), np.uint8)), "mask.*64 x 64"),
        (dict(mask=np.zeros((64, 64), np.uint8)), "chooses nothing"),
        (dict(init=photo(32)), "32 x 32 pixels.*64 x 64"),
        (dict(init=torch.full((3, 64, 64), 128.0)), r"values outside \[-1, 1\], and is not of type uint8"),
        (dict(mask=None), "both an image and a mask"),
        (dict(seed=-1), "negative"),
        (dict(batch_size=-1), "batch_size must be at least 1, got -1"),
        (dict(order="spiral"), "random, confidence, halton, raster, subsample"),
        (dict(mask_schedule="step"), "cosine, linear, square"),
        (dict(top_p=0.0), "top_p must be above 0, got 0.0"),
        (dict(top_p=1.5), "top_p must be at most 1, got 1.5"),
        (dict(precision="fp8"), "fp32, bf16, fp16"),
    ],
)
def test_bad_input(pipeline, change, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate([1], **(dict(init=photo(), mask=np.full((64, 64), 255, np.uint8), num_iter=2) | change))


def test_picture_tensors():
    array = photographs()[0][:64, :64]
    x = picture_tensor(array, 64)
    for same in (Image.fromarray(array), torch.from_numpy(array.transpose(2, 0, 1).copy()), x):
        assert torch.equal(x, picture_tensor(same, 64))
    assert np.array_equal(to_uint8(x).permute(1, 2, 0).numpy(), array)


@pytest.fixture
def folder(tmp_path, pipeline) -> Path:
    """A folder with the pipeline's vae.pth and checkpoint; the EMA is the model's weights plus 0.001."""
    model, vae = pipeline.model, pipeline.vae
    torch.save({"model": vae.state_dict(), "config": vae.config}, tmp_path / "vae.pth")
    config = {"model_name": "tiny", "model": model.config.to_dict(), "vae": vae.config, "args": {}}
    config["vae_fingerprint"] = vae.latent_fingerprint()
    ema = {name: p.detach() + 0.001 for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "config": config}, tmp_path / "checkpoint-last.pth")
    return tmp_path


def test_load_and_generate(folder, pipeline):
    loaded = generation.load(folder, weights="model")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert np.array_equal(pixels(loaded.generate([1, 2], **OPTIONS)), pixels(pipeline.generate([1, 2], **OPTIONS)))
    averaged = generation.load(folder / "checkpoint-last.pth", vae_path=folder / "vae.pth").model
    assert torch.allclose(averaged.mask_token, pipeline.model.mask_token + 0.001)


def test_load_says_what_is_wrong(folder):
    other = tiny_vae()
    torch.nn.init.normal_(other.quant_conv.weight)
    torch.save({"model": other.state_dict(), "config": other.config}, folder / "other.pth")
    for path, options, error, message in (
        (folder / "nowhere", {}, FileNotFoundError, "no checkpoint"),
        (folder / "vae.pth", {}, ValueError, "holds the weights of a VAE: give them as vae_path"),
        (folder, dict(weights="best"), ValueError, "ema, model"),
        (folder, dict(vae_path=folder / "other.pth"), ValueError, "not the VAE"),
    ):
        with pytest.raises(error, match=message):
            generation.load(path, **options)
    (folder / "vae.pth").unlink()
    with pytest.raises(FileNotFoundError, match="give vae_path"):
        generation.load(folder)
