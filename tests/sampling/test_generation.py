"""The library's way in: `load`, `model.generate`, `model.generate_steps`; editing and mixtures of classes."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.images import to_uint8
from generation.library import encode_init, generate, generate_steps, picture_tensor, to_bytes, token_mask
from generation.loading import load
from models.tokenbridge import TokenBridge
from tests.helpers import photographs, tiny_model, tiny_vae
from util.seeds import mixed_seed

OPTIONS = dict(num_iter=3, cfg=2.0)


@pytest.fixture(scope="module")
def model() -> TokenBridge:
    return tiny_model(img_size=64).requires_grad_(False)


@pytest.fixture(scope="module")
def vae():  # noqa: ANN201
    return tiny_vae().requires_grad_(False)


def photo(size: int = 64) -> Image.Image:
    return Image.fromarray(photographs()[0][:size, :size])


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


# ------------------------------------------------------------------------------------------------------- generate


def test_generate_gives_pictures(model, vae):
    images = generate(model, vae, [1, None, {2: 0.5, 7: 0.5}], seed=3, **OPTIONS)
    assert [image.size for image in images] == [(64, 64)] * 3 and all(image.mode == "RGB" for image in images)
    assert len({image.tobytes() for image in images}) == 3


def test_images_do_not_depend_on_the_batch(model, vae):
    together = pixels(generate(model, vae, [1, 2, 3, 4, 5], seed=3, **OPTIONS))
    split = pixels(generate(model, vae, [1, 2, 3, 4, 5], seed=3, batch_size=2, **OPTIONS))
    assert np.abs(together.astype(int) - split).max() <= 1  # the VAE's rounding; tokens are equal
    assert not np.array_equal(together, pixels(generate(model, vae, [1, 2, 3, 4, 5], seed=4, **OPTIONS)))


def test_steps_are_yielded_as_they_come(model, vae):
    seen = []
    for step in generate_steps(model, vae, [1, 2], seed=3, **OPTIONS):
        grey = (pixels(step.images()) == 128).all(-1)
        seen.append((step.step, step.num_iter, step.done, step.state.num_masked))
        blocks = step.state.masked.repeat_interleave(16, 1).repeat_interleave(16, 2).numpy()
        assert grey[blocks].all()
    assert seen == [(0, 3, False, 13), (1, 3, False, 8), (2, 3, True, 0)]
    assert np.array_equal(pixels(step.images()), pixels(generate(model, vae, [1, 2], seed=3, **OPTIONS)))


def test_earlier_states_stay_as_they_were(model, vae):
    states = [step.state for step in generate_steps(model, vae, [1, 2], seed=3, **OPTIONS)]
    for state in states:
        assert ((state.latents != 0).any(1) == ~state.masked).all()
    assert torch.equal(
        states[0].latents[~states[0].masked.unsqueeze(1).expand(-1, 16, -1, -1)],
        states[2].latents[~states[0].masked.unsqueeze(1).expand(-1, 16, -1, -1)],
    )


def test_stopping_early_and_callbacks(model, vae):
    iterator = generate_steps(model, vae, [1], **OPTIONS)
    next(iterator)
    iterator.close()
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    heard = []
    generate(
        model,
        vae,
        [1, 2, 3],
        batch_size=2,
        on_step=lambda step: heard.append((len(step.state.values), step.step)),
        **OPTIONS,
    )
    assert heard == [(2, 0), (2, 1), (2, 2), (1, 0), (1, 1), (1, 2)]


def test_bf16_does_not_leak_into_the_caller(model, vae):
    steps = []
    for step in generate_steps(model, vae, [1], precision="bf16", **OPTIONS):
        assert not torch.is_autocast_enabled("cpu")
        steps.append(step)
    assert steps[-1].done and torch.isfinite(steps[-1].state.latents).all()


# ------------------------------------------------------------------------------------------------------- mixtures of classes


def test_mixtures_are_sums_of_embeddings(model):
    rows = model.class_embeddings([3, None, {3: 0.25, 7: 0.75}, {7: 1.0}])
    table = model.class_emb.weight
    assert (
        torch.equal(rows[0], table[3]) and torch.equal(rows[1], model.fake_latent[0]) and torch.equal(rows[3], table[7])
    )
    assert torch.allclose(rows[2], 0.25 * table[3] + 0.75 * table[7])


@pytest.mark.parametrize("wrong", [10, -1, {}, {3: float("nan")}, {12: 1.0}, 2.5])
def test_classes_that_do_not_exist(model, vae, wrong):
    with pytest.raises(ValueError, match="classes"):
        generate(model, vae, [1, wrong])


# ------------------------------------------------------------------------------------------------------- editing


def test_tokens_outside_the_mask_are_kept_exactly(model, vae):
    """Whatever the order; the regenerated ones are new."""
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 20:40] = 255  # touches token columns 1 and 2, rows 1 and 2
    init = encode_init(vae, [photo()], 64, torch.device("cpu"))
    kept = model.quantize(init)[1]
    chosen = torch.zeros(4, 4, dtype=torch.bool)
    chosen[1:3, 1:3] = True
    for order in ("random", "confidence", "halton", "raster", "subsample"):
        *_, last = generate_steps(model, vae, [1, 2], init=photo(), mask=Image.fromarray(mask), order=order, **OPTIONS)
        assert torch.equal(last.state.latents[:, :, ~chosen], kept[:, :, ~chosen].expand(2, -1, -1))
        assert (last.state.latents[:, :, chosen] != kept[:, :, chosen]).float().mean() > 0.5


def test_token_masks():
    image = np.zeros((64, 64), np.uint8)
    image[0, 17], image[63, 63], image[40, 2] = 255, 200, 100  # the last is dark: kept
    expected = torch.zeros(16, dtype=torch.bool)
    expected[[1, 15]] = True
    assert torch.equal(token_mask(Image.fromarray(image), 64, 4), expected) and torch.equal(
        token_mask(image, 64, 4), expected
    )
    assert torch.equal(token_mask(expected.view(4, 4), 64, 4), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mask=np.ones((32, 64), np.uint8)), "mask.*64 x 64"),
        (dict(mask=np.zeros((64, 64), np.uint8)), "chooses nothing"),
        (dict(init=photo(32)), "32 x 32 pixels.*64 x 64"),
        (dict(mask=None), "both an image and a mask"),
        (dict(seed=-1), "negative"),
        (dict(order="spiral"), "random, confidence, halton, raster, subsample"),
        (dict(mask_schedule="step"), "cosine, linear, square"),
        (dict(top_p=0.0), "top_p must be above 0, got 0.0"),
        (dict(top_p=1.5), "top_p must be at most 1, got 1.5"),
        (dict(precision="fp8"), "fp32, bf16, fp16"),
    ],
)
def test_bad_input(model, vae, change, message):
    with pytest.raises(ValueError, match=message):
        generate(model, vae, [1], **(dict(init=photo(), mask=np.full((64, 64), 255, np.uint8), num_iter=2) | change))


def test_pictures_and_bytes():
    array = photographs()[0][:64, :64]
    assert torch.equal(picture_tensor(array, 64), picture_tensor(Image.fromarray(array), 64))
    assert np.array_equal(to_bytes(picture_tensor(array, 64)).permute(1, 2, 0).numpy(), array)
    x = torch.linspace(-1.5, 1.5, 1001)
    assert torch.equal(to_bytes(x), to_uint8(x))


def test_image_seeds():
    assert len({mixed_seed(s, i) for s in range(20) for i in range(50)}) == 1000 and 0 <= mixed_seed(0, 0) < 2**63
    with pytest.raises(ValueError, match="must not be negative"):
        mixed_seed(-1, 0)


# ------------------------------------------------------------------------------------------------------- load


def write_checkpoint(folder, model, vae, config: bool = True):  # noqa: ANN001, ANN201
    torch.save({"model": vae.state_dict(), "config": vae.config}, folder / "vae.pth")
    ema = {name: p.detach() + 0.001 for name, p in model.named_parameters()}
    content = {"model": model.state_dict(), "model_ema": ema}
    if config:
        content["config"] = {
            "model_name": "tiny",
            "model": model.config.to_dict(),
            "vae": vae.config,
            "vae_fingerprint": vae.latent_fingerprint(),
            "args": {},
        }
    torch.save(content, folder / "checkpoint-last.pth")
    return folder


def test_load_and_generate(tmp_path, model, vae):
    folder = write_checkpoint(tmp_path, model, vae)
    found, found_vae = load(folder, weights="model")
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert np.array_equal(
        pixels(generate(found, found_vae, [1, 2], **OPTIONS)), pixels(generate(model, vae, [1, 2], **OPTIONS))
    )
    averaged, _ = load(folder / "checkpoint-last.pth", vae_path=tmp_path / "vae.pth")
    assert torch.allclose(averaged.mask_token, model.mask_token + 0.001)


def test_load_says_what_is_wrong(tmp_path, model, vae):
    folder = write_checkpoint(tmp_path, model, vae)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is the file a VAE"):
        load(tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="ema, model"):
        load(folder, weights="best")
    other = tiny_vae()
    torch.nn.init.normal_(other.quant_conv.weight)
    torch.save({"model": other.state_dict(), "config": other.config}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not the VAE"):
        load(folder, vae_path=tmp_path / "other.pth")
    (tmp_path / "vae.pth").unlink()
    with pytest.raises(FileNotFoundError, match="give vae_path"):
        load(folder)
