"""Training from every kind of cache: the loss is that from images; quantizers in the checkpoint; other VAEs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import main_cache
from checkpoints.content import class_names
from checkpoints.load import load_model
from dataset.images import read_image
from main_tokenbridge import main
from models.quantizer_tables import lloyd_tables, uniform_tables
from models.vae import AutoencoderKL
from tests.helpers import argv_of, tiny_vae

SIZE = 32  # pixels, with a VAE of stride 8 and 6 channels: 4x4 tokens


def cached(root: Path, vae: Path, out: Path, **changes: object) -> Path:
    """A cache of the images under root, float32 unless said otherwise."""
    flags = dict(data_path=root, vae_path=vae, cached_path=out, img_size=SIZE, batch_size=4, dtype="float32")
    main_cache.main(argv_of(**(flags | dict(num_workers=0, device="cpu") | changes)))
    return out


def train(root: Path, vae: Path, out: Path, **changes: object) -> list[float]:
    """Losses of three steps on all 12 images."""
    flags = dict(model="tokenbridge_digits", img_size=SIZE, class_num=2, buffer_size=4, vae_path=vae, data_path=root)
    flags |= dict(batch_size=4, warmup_epochs=0, lr=1e-3, num_workers=0, device="cpu", max_steps=3, seed=3)
    main(argv_of(**(flags | dict(output_dir=out, ema_rate=0.5) | changes)))
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def train_from(cache: Path, root: Path, vae: Path, out: Path, **changes: object) -> list[float]:
    """The same from a cache."""
    return train(root, vae, out, use_cached=True, cached_path=cache, **changes)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("six_channels") / "vae.pth"
    net = tiny_vae(embed_dim=6, ch_mult=(1, 1, 2, 2), channel_order=[5, 0, 4, 1, 3, 2], scale_factor=2.0, shift=0.05)
    torch.save({"model": net.state_dict(), "config": net.config}, path)
    return path


@pytest.fixture(scope="module")
def from_images(image_root: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(image_root, vae, tmp_path_factory.mktemp("from_images"))


def test_the_loss_is_the_same_from_images_npz_and_shards(
    image_root: Path, vae: Path, from_images: list[float], tmp_path: Path
) -> None:
    """Float32 caches hold the same bits: equal losses. Images are encoded in other batches: equal up to rounding."""
    losses = {}
    for kind, dtype in (("shards", "float32"), ("npz", None)):
        cache = cached(image_root, vae, tmp_path / kind, format=kind, dtype=dtype)
        losses[kind] = train_from(cache, image_root, vae, tmp_path / f"run_{kind}")
    assert losses["shards"] == losses["npz"] and len(set(losses["npz"])) == 3
    # one index of 1,152 that rounding moves is worth 1e-3
    assert losses["shards"] == pytest.approx(from_images, abs=2e-3)
    half = cached(image_root, vae, tmp_path / "f16", dtype=None)
    assert train_from(half, image_root, vae, tmp_path / "half") == pytest.approx(losses["shards"], abs=0.02)


def test_mean_and_index_caches_train(image_root: Path, vae: Path, from_images: list[float], tmp_path: Path) -> None:
    for mode in ("mean", "indices"):
        cache = cached(image_root, vae, tmp_path / mode, mode=mode, dtype=None)
        losses = train_from(cache, image_root, vae, tmp_path / f"run_{mode}")
        assert losses == pytest.approx(from_images, abs=0.5) and losses != from_images
    other = Path(shutil.copy(vae, tmp_path / "other.pth"))  # the same weights, described otherwise
    other.with_suffix(".latents.json").write_text(json.dumps(dict(channels=6, stride=8, scale_factor=3.0)))
    for changes, words in (
        (dict(vae_path=other), r"indices of latents with scale_factor 2\.0, the VAE .--vae_path. has 3\.0"),
        (dict(quant_bits=5), r"holds indices of a gaussian quantizer with 64 levels .* the model has 32 on"),
        (dict(quant_min=-4), r"on \[-5\.0, 5\.0\]; the model has 64 on \[-4\.0, 5\.0\]"),
        (dict(quantizer="uniform"), "holds indices of a gaussian quantizer"),
    ):
        with pytest.raises(ValueError, match=words):
            train_from(tmp_path / "indices", image_root, vae, tmp_path / "run_x", **changes)


def test_caches_that_contradict_the_run(image_root: Path, vae: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other.pth", tmp_path / "run"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        net = AutoencoderKL(**torch.load(vae, weights_only=True)["config"])
    torch.save({"model": net.state_dict(), "config": net.config}, other)
    cache = cached(image_root, vae, tmp_path / "cache")
    for changes, words in (
        (dict(vae_path=other), "was made with another VAE"),
        (dict(img_size=64), "was made with img_size 32, this run has img_size 64"),
        (dict(class_num=1), "has 2 classes, more than 1 .--class_num"),
    ):
        with pytest.raises(ValueError, match=words):
            train_from(cache, image_root, vae, run, **changes)
    assert not list(run.glob("*.pth"))
    train_from(cache, image_root, vae, run)
    renamed = Path(shutil.copytree(image_root, tmp_path / "renamed"))
    (renamed / "train" / "flower").rename(renamed / "train" / "apple")  # now class 0: labels would shift
    cache, more = cached(renamed, vae, tmp_path / "cache2"), dict(max_steps=6, resume=run)
    counts = "has 2 classes, the checkpoint was trained with 2"
    with pytest.raises(ValueError, match=f"{counts}; first difference: class 0 is 'apple' here and 'china' there"):
        train_from(cache, renamed, vae, run, **more)
    with pytest.raises(ValueError, match=r"renamed \(--data_path\) has 2 classes"):
        train(renamed, vae, run, **more)


def test_a_checkpoint_carries_its_quantizer(image_root: Path, vae: Path, tmp_path: Path) -> None:
    """uniform, and lloyd from a file; resumed and sampled without the file."""
    train(image_root, vae, tmp_path / "uniform", quantizer="uniform", quant_bits=4)
    content = torch.load(tmp_path / "uniform" / "checkpoint-last.pth", weights_only=True)
    torch.testing.assert_close(
        content["model"]["reconstruction_values"].double(), torch.from_numpy(uniform_tables(4)[1]), rtol=0, atol=1e-6
    )
    boundaries, values = lloyd_tables(torch.randn(5000).numpy(), 4, -4.0, 4.0)
    tables, content = tmp_path / "tables.json", dict(kind="lloyd", bits=4, min=-4.0, max=4.0)
    content |= dict(boundaries=boundaries.tolist(), reconstruction_values=values.tolist())
    tables.write_text(json.dumps(content))
    says = r"tables\.json is lloyd, 4 bits on \[-4\.0, 4\.0\]; the arguments say lloyd, 6 bits.*\(--quantizer_tables\)"
    with pytest.raises(ValueError, match=says):
        train(image_root, vae, tmp_path / "lloyd", quantizer="lloyd", quantizer_tables=tables)
    four = dict(quantizer="lloyd", quant_bits=4, quant_min=-4, quant_max=4)
    with pytest.raises(ValueError, match=r"quantizer lloyd is fitted to latents: .*\(--quantizer_tables\)"):
        train(image_root, vae, tmp_path / "lloyd", **four)
    train(image_root, vae, tmp_path / "lloyd", quantizer_tables=tables, **four)
    tables.unlink()
    train(image_root, vae, tmp_path / "lloyd", max_steps=4, resume=tmp_path / "lloyd")
    with pytest.raises(
        ValueError, match="quantizer uniform contradicts .*which was trained with quantizer lloyd.*--quantizer"
    ):
        train(image_root, vae, tmp_path / "lloyd", max_steps=5, resume=tmp_path / "lloyd", quantizer="uniform")
    model, *_ = load_model(tmp_path / "lloyd", vae)
    torch.testing.assert_close(model.reconstruction_values.double(), torch.from_numpy(values), rtol=0, atol=1e-6)


def test_another_vae_end_to_end(image_root: Path, vae: Path, tmp_path: Path) -> None:
    """Six channels at stride 8, its own order, range and bits from its description: cache, train, sample."""
    own = shutil.copy(vae, tmp_path / "vae.pth")
    description = dict(channels=6, stride=8, scale_factor=[1.0, 2.0, 1.0, 2.0, 1.0, 3.0])
    description |= dict(quant_bits=5, quant_min=-4.0, quant_max=4.0, channel_order=[2, 0, 1, 5, 4, 3])
    (tmp_path / "vae.latents.json").write_text(json.dumps(description))
    cache = cached(image_root, own, tmp_path / "cache", dtype=None)
    train_from(cache, image_root, own, tmp_path / "run")
    config = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)["config"]["model"]
    expected = dict(vae_embed_dim=6, vae_stride=8, channel_order=[2, 0, 1, 5, 4, 3], quant_levels=32)
    expected |= dict(quant_min=-4.0, quant_max=4.0)
    assert {key: config[key] for key in expected} == expected
    sampling = dict(resume=tmp_path / "run", vae_path=own, classes="0,1", num_images=2, num_iter=2, device="cpu")
    main(argv_of(sample=True, output_dir=tmp_path / "pictures", **sampling))
    assert read_image(tmp_path / "pictures" / "000001.png").size == (SIZE, SIZE)


def test_a_vae_of_diffusers_end_to_end(image_root: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="an optional package, requirements-extra.txt")
    torch.manual_seed(0)
    diffusers.AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 8, 8, 16),
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        attention_head_dim=4,
    ).save_pretrained(tmp_path / "dc")
    with pytest.raises(ValueError, match="gives one latent and no posterior: store it with --mode mean"):
        cached(image_root, tmp_path / "dc", tmp_path / "cache")
    cache = cached(image_root, tmp_path / "dc", tmp_path / "cache", mode="mean")
    losses = train_from(cache, image_root, tmp_path / "dc", tmp_path / "run")
    assert losses == pytest.approx(train(image_root, tmp_path / "dc", tmp_path / "run_images"), abs=2e-3)
    model, vae, about = load_model(tmp_path / "run")
    assert (model.token_dim, vae.stride, vae.deterministic) == (8, 8, True)
    assert class_names(about) == ["china", "flower"]
