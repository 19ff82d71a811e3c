"""What depends on the VAE: its description, built in or in files, and VAEs that diffusers wrote."""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import generation
from models.latent_space import KL16, VaeDescription, description_path, find_description, read_description
from models.vae import AutoencoderKL
from models.vae_loading import load_vae
from tests.helpers import tiny_model, tiny_vae
from tools import export, inspect

TINY = dict(embed_dim=4, ch_mult=(1, 2), ch=8, num_res_blocks=1, norm_groups=4)


def save(path: Path, **extra: object) -> Path:
    vae = tiny_vae(**TINY)
    torch.save({"model": vae.state_dict(), "config": vae.config} | extra, path)
    return path


def test_kl16_is_built_in() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL()
    assert (vae.embed_dim, vae.stride, vae.scale_factor, vae.shift) == (16, 16, 0.2325, 0.0)
    assert vae.channel_order == KL16.channel_order
    assert (KL16.quant_bits, KL16.quant_min, KL16.quant_max) == (6, -5.0, 5.0)


def test_the_file_beside_the_weights_takes_precedence(tmp_path: Path) -> None:
    inside = dict(channels=4, stride=2, scale_factor=3.0, quant_bits=5, quant_min=-2.0, quant_max=2.0)
    path = save(tmp_path / "vae.pth", description=inside)
    vae = load_vae(path)
    assert (vae.scale_factor, vae.channel_order) == (3.0, None)
    assert (vae.quant_bits, vae.quant_min, vae.quant_max) == (5, -2.0, 2.0)
    found = VaeDescription(4, 2, [1.0, 2.0, 4.0, 8.0], [0.0, 1.0, 2.0, 3.0], [3, 1, 0, 2], 7, -4.0, 4.0)
    assert description_path(path) == tmp_path / "vae.latents.json" and find_description(path) is None
    description_path(path).write_text(json.dumps(asdict(found)))
    vae = load_vae(path)
    assert vae.description == found and vae.config["channel_order"] == [3, 1, 0, 2]
    z = torch.randn(2, 4, 3, 3)
    expected = (z - torch.tensor([0.0, 1, 2, 3]).view(4, 1, 1)) * torch.tensor([1.0, 2, 4, 8]).view(4, 1, 1)
    torch.testing.assert_close(vae.scale(z), expected)
    torch.testing.assert_close(vae.unscale(vae.scale(z)), z)
    AutoencoderKL(**vae.config)  # the config of a checkpoint of ours builds the same scale


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "vae.latents.json does not describe a VAE"),
        ("[1]", "it is \\[1\\], expected an object"),
        ('{"channels": 4}', "stride"),
        ('{"channels": 4, "stride": 2, "scale": 1}', r"unknown keys \['scale'\]"),
        ('{"channels": 8, "stride": 2}', "says 8 channels at stride 2, the VAE has 4 at 2"),
        ('{"channels": 4, "stride": 2, "scale_factor": [1, 2]}', "scale_factor has 2 values but the VAE has 4"),
        ('{"channels": 4, "stride": 2, "scale_factor": 0}', "none of them 0"),
        ('{"channels": 4, "stride": 2, "shift": NaN}', "shift must be finite"),
        ('{"channels": 4, "stride": 2, "shift": 1' + 400 * "0" + "}", "the number 100000000000... has 401 digits"),
        ("[" * 200_000, "it is nested too deep"),
        ("[" * 200 + "]" * 200, "it is nested too deep"),
        ('{"channels": 4, "stride": 2, "channel_order": [0, 0, 1, 2]}', "channel_order must be a permutation"),
        ('{"channels": 4, "stride": 2, "quant_bits": 13}', "quant_bits must be a whole number from 1 to 12"),
        ('{"channels": 4, "stride": 2, "quant_min": 1, "quant_max": 1}', "quant_min must be less"),
        ('{"channels": 4, "stride": 2, "quant_min": 1}', "quant_min"),
    ],
)
def test_descriptions_that_are_refused(tmp_path: Path, content: str, words: str) -> None:
    path = save(tmp_path / "vae.pth")
    description_path(path).write_text(content)
    with pytest.raises(ValueError, match=words):
        load_vae(path)


def test_what_is_known_of_the_quantizer() -> None:
    vae = tiny_vae(**TINY)
    assert vae.quantizer_settings() == {}
    vae.set_description(VaeDescription(4, 2, quant_min=-3.5, quant_max=3.5))
    assert vae.quantizer_settings() == dict(quant_min=-3.5, quant_max=3.5)
    vae.set_description(VaeDescription(4, 2, quant_bits=7))
    assert vae.quantizer_settings() == dict(quant_bits=7, quant_min=-3.5, quant_max=3.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """AutoencoderKL (stride 4, 4 channels) and AutoencoderDC (stride 2, 8 channels), random, saved by diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="an optional package, requirements-extra.txt")
    root = tmp_path_factory.mktemp("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kl = diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.18215,
            shift_factor=0.1,
        )
        dc = diffusers.AutoencoderDC(
            latent_channels=8,
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            attention_head_dim=4,
            scaling_factor=0.5,
        )
    kl.save_pretrained(root / "kl")
    kl.save_pretrained(root / "pipeline" / "vae")
    dc.save_pretrained(root / "dc")
    return {"kl": root / "kl", "dc": root / "dc", "pipeline": root / "pipeline"}


@torch.no_grad()
def test_a_kl_vae_of_diffusers(folders: dict[str, Path]) -> None:
    from diffusers import AutoencoderKL as Theirs

    vae, theirs, x = load_vae(folders["kl"]), Theirs.from_pretrained(folders["kl"]), torch.randn(2, 3, 16, 16)
    assert (vae.embed_dim, vae.stride, vae.scale_factor, vae.shift, vae.deterministic) == (4, 4, 0.18215, 0.1, False)
    posterior, expected = vae.encode(x), theirs.encode(x).latent_dist
    assert torch.equal(posterior.mean, expected.mean) and torch.equal(posterior.std, expected.std)
    assert torch.equal(posterior.parameters, expected.parameters)
    assert torch.equal(vae.decode(posterior.mean), theirs.decode(expected.mean).sample)
    torch.testing.assert_close(vae.scale(posterior.mean), (expected.mean - 0.1) * 0.18215)
    assert json.loads(json.dumps(vae.config)) == vae.config and not any(p.requires_grad for p in vae.parameters())
    again = load_vae(folders["pipeline"])
    assert again.latent_fingerprint() == vae.latent_fingerprint() and again.config == vae.config
    with pytest.raises(ValueError, match="not a multiple of the VAE's stride 4"):
        vae.encode(torch.zeros(1, 3, 18, 16))


@torch.no_grad()
def test_a_deterministic_vae_of_diffusers(folders: dict[str, Path]) -> None:
    from diffusers import AutoencoderDC as Theirs

    vae, theirs, x = load_vae(folders["dc"]), Theirs.from_pretrained(folders["dc"]), torch.randn(2, 3, 16, 16)
    assert (vae.embed_dim, vae.stride, vae.scale_factor, vae.deterministic) == (8, 2, 0.5, True)
    posterior, latent = vae.encode(x), theirs.encode(x).latent
    assert torch.equal(posterior.mean, latent) and torch.equal(posterior.sample(), latent)
    assert posterior.parameters.shape == (2, 16, 8, 8)
    assert torch.equal(vae.decode(latent), theirs.decode(latent).sample)


def test_folders_that_are_no_vae(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, message: str, error: type = ValueError, **more: object) -> None:
        with pytest.raises(error, match=message):
            load_vae(folder, **more)

    refused(tmp_path, "is a folder without config.json", FileNotFoundError)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    refused(tmp_path, "holds a UNet2DModel; of diffusers' classes AutoencoderKL and AutoencoderDC")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "is no config of diffusers")
    folder = Path(shutil.copytree(folders["kl"], tmp_path / "kl"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, "cannot be loaded by diffusers")
    weights.unlink()
    refused(folder, "has no .safetensors weights", FileNotFoundError)
    refused(folders["kl"], "vae_embed_dim 16 contradicts", embed_dim=16)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused(folders["kl"], "which is not installed: pip install -r requirements-extra.txt")


def test_a_diffusers_folder_has_its_description_inside(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["kl"], tmp_path / "kl"))
    description = VaeDescription(channels=4, stride=4, scale_factor=2.0, channel_order=[1, 0, 3, 2])
    (folder / "tokenbridge.json").write_text(json.dumps(asdict(description)))
    assert load_vae(folder).description == description == read_description(folder / "tokenbridge.json")


@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_an_export_with_a_vae_of_diffusers_loads_again(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """As a folder of safetensors, and as a checkpoint made of that."""
    vae = load_vae(folders[kind])
    model = tiny_model(img_size=4 * vae.stride, vae_stride=vae.stride, vae_embed_dim=vae.embed_dim)
    config = {"model_name": "tokenbridge_tiny", "model": model.config.to_dict(), "vae": vae.config}
    config |= {"vae_fingerprint": vae.latent_fingerprint(), "args": {"vae_path": str(folders[kind])}}
    ema = {name: value.detach() for name, value in model.named_parameters()}
    torch.save({"model": model.state_dict(), "model_ema": ema, "step": 3, "config": config}, tmp_path / "x.pth")
    export.main([str(tmp_path / "x.pth"), "--output_dir", str(tmp_path / "export")])
    export.main([str(tmp_path / "export"), "--output_dir", str(tmp_path / "again")])
    images = generation.load(tmp_path / "x.pth").generate([1], num_iter=2)
    for path, file in (("export", "vae.safetensors"), ("again", "vae.pth")):
        again = load_vae(tmp_path / path / file)
        inspect.main([str(tmp_path / path / file)])
        assert again.config == vae.config and again.latent_fingerprint() == vae.latent_fingerprint()
        assert generation.load(tmp_path / path).generate([1], num_iter=2) == images
