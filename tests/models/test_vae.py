"""models/vae.py (docs/spec.md 2): golden arrays and manifest of KL-16, posterior, small layers, strict loading."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from models.latent_space import DiagonalGaussian, LatentSpace
from models.vae import AutoencoderKL, Downsample, SpatialAttention, Upsample, load_weights, read_vae_file
from models.vae_loading import load_vae
from tests.helpers import Explosive, assert_same, fill_golden, golden_arrays, golden_json, tiny_vae

BIT_OF_EVERYTHING = dict(embed_dim=4, ch_mult=(1, 2), ch=8, num_res_blocks=1, norm_groups=4)


@torch.no_grad()
def test_golden():
    kl16 = fill_golden(AutoencoderKL()).eval()
    golden = {name: torch.from_numpy(array) for name, array in golden_arrays("vae_kl16").items()}
    posterior = kl16.encode(golden["image"])
    for found, name in ((posterior.parameters, "moments"), (posterior.mean, "mean"), (posterior.std, "std")):
        torch.testing.assert_close(found, golden[name], rtol=0, atol=3e-5, msg=name)
    assert torch.equal(posterior.mode(), posterior.mean)
    torch.testing.assert_close(kl16.decode(golden["latent"]), golden["decoded"], rtol=0, atol=3e-5)


def test_manifest_and_size():
    """Keys, their order, shapes; 66.456 M parameters; GroupNorm(32, eps 1e-6) everywhere."""
    with torch.device("meta"):
        vae = AutoencoderKL(embed_dim=16, ch_mult=(1, 1, 2, 2, 4), ckpt_path=None)
    manifest = golden_json("manifest_vae_kl16")
    assert [(key, list(value.shape)) for key, value in vae.state_dict().items()] == list(manifest.items())
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 3) == 66.456
    norms = [m for m in vae.modules() if isinstance(m, nn.GroupNorm)]
    assert norms and all(m.eps == 1e-6 and m.num_groups == 32 for m in norms)
    assert vae.stride == 16 and vae.scale_factor == 0.2325
    assert vae.channel_order == [8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5]


def test_posterior_by_hand():
    moments = torch.tensor([1.0, -2.0, 0.0, math.log(9.0)]).view(1, 4, 1, 1)  # two channels: N(1, 1), N(-2, 9)
    posterior = DiagonalGaussian(moments)
    assert posterior.parameters is moments
    assert posterior.mean.flatten().tolist() == [1, -2] and posterior.mode().flatten().tolist() == [1, -2]
    assert posterior.std.flatten().tolist() == pytest.approx([1, 3])
    assert posterior.sample(noise=torch.full((1, 2, 1, 1), 0.5)).flatten().tolist() == pytest.approx([1.5, -0.5])
    assert posterior.kl().tolist() == pytest.approx([0.5 * (1 + 1 - 1 - 0) + 0.5 * (4 + 9 - 1 - math.log(9))])


def test_log_variance_is_clamped_but_the_parameters_are_not():
    moments = torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(moments)
    assert posterior.std.flatten().tolist() == pytest.approx([math.exp(-15), math.exp(10)])
    assert posterior.parameters.flatten().tolist() == [0, 0, -100, 100]


def test_sampling_has_the_posteriors_moments_and_follows_the_generator():
    posterior = DiagonalGaussian(torch.tensor([1.0, math.log(4.0)]).view(1, 2, 1, 1).expand(1, 2, 200, 200))
    sample = posterior.sample(torch.Generator().manual_seed(3))
    assert sample.mean().item() == pytest.approx(1, abs=0.05) and sample.std().item() == pytest.approx(2, abs=0.05)
    assert torch.equal(sample, posterior.sample(torch.Generator().manual_seed(3)))
    assert not torch.equal(sample, posterior.sample(torch.Generator().manual_seed(4)))
    torch.manual_seed(7)
    first = posterior.sample()
    assert not torch.equal(first, posterior.sample())


def test_kl_against_torch_distributions():
    moments = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, logvar = moments.chunk(2, 1)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(DiagonalGaussian(moments).kl(), expected.flatten(1).sum(1))


def with_tap(layer: nn.Module, row: int, column: int) -> nn.Module:
    """The layer, whose 3x3 convolution of one channel becomes a single 1."""
    nn.init.zeros_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    layer.conv.weight.data[0, 0, row, column] = 1
    return layer


@pytest.mark.parametrize(
    ("tap", "expected"), [((0, 0), [[1, 3], [9, 11]]), ((1, 1), [[6, 8], [14, 16]]), ((2, 2), [[11, 0], [0, 0]])]
)
def test_downsample_pads_right_and_bottom_only(tap, expected):
    """The tap picks x[2i + row, 2j + column]; beyond the right and bottom edge there are zeros."""
    assert with_tap(Downsample(1), *tap)(torch.arange(1.0, 17).view(1, 1, 4, 4))[0, 0].tolist() == expected


def test_upsample_repeats_each_pixel():
    found = with_tap(Upsample(1), 1, 1)(torch.tensor([[[[1.0, 2], [3, 4]]]]))[0, 0]
    assert found.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_attention_written_out():
    """x + proj(softmax(q k^T / sqrt(channels)) v) with an explicit attention matrix, float64."""
    layer = fill_golden(SpatialAttention(8, 2)).double()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 8, 3, 5)))
    h = nn.functional.group_norm(x, 2, layer.norm.weight, layer.norm.bias, 1e-6).flatten(2)  # (B, ch, HW)

    def conv(module: nn.Conv2d, t: torch.Tensor) -> torch.Tensor:
        return torch.einsum("oc,bcn->bon", module.weight[:, :, 0, 0], t) + module.bias[:, None]

    q, k, v = conv(layer.q, h), conv(layer.k, h), conv(layer.v, h)
    attention = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(8)).softmax(-1)
    expected = x + conv(layer.proj_out, torch.einsum("bij,bcj->bci", attention, v)).view_as(x)
    torch.testing.assert_close(layer(x), expected)


def test_small_vaes_are_the_same_class():
    vae = AutoencoderKL(**BIT_OF_EVERYTHING, attention=False)
    assert vae.stride == 2 and not any(".attn" in key for key in vae.state_dict())
    posterior = vae.encode(torch.zeros(2, 3, 8, 12))
    assert posterior.parameters.shape == (2, 8, 4, 6) and posterior.mean.shape == (2, 4, 4, 6)
    assert vae.decode(posterior.mean).shape == (2, 3, 8, 12)
    assert vae.channel_order is None


def test_every_parameter_gets_a_gradient():
    vae = fill_golden(tiny_vae())
    posterior = vae.encode(torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)))
    reconstruction = vae.decode(posterior.sample(torch.Generator().manual_seed(0)))
    (reconstruction.square().mean() + 1e-3 * posterior.kl().mean()).backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7]
    assert all(name.endswith(".k.bias") for name in without)  # softmax does not see what is added to every key alike


def test_scale_and_unscale_by_hand():
    z = torch.tensor([2.0, -4.0]).view(1, 2, 1, 1)
    vae = AutoencoderKL(**(BIT_OF_EVERYTHING | dict(embed_dim=2)), scale_factor=[0.5, 2.0], shift=[1.0, -1.0])
    assert vae.scale(z).flatten().tolist() == [0.5, -6]
    assert vae.unscale(vae.scale(z)).flatten().tolist() == [2, -4]
    plain = AutoencoderKL(**(BIT_OF_EVERYTHING | dict(embed_dim=2)))
    torch.testing.assert_close(plain.scale(z), z * 0.2325)
    torch.testing.assert_close(plain.unscale(z), z / 0.2325)


def test_config_rebuilds_the_vae():
    latents = dict(scale_factor=[1, 2, 3, 4], shift=0.25, channel_order=[3, 1, 0, 2])
    vae = AutoencoderKL(**BIT_OF_EVERYTHING, attention=False, **latents)
    again = AutoencoderKL(**json.loads(json.dumps(vae.config)))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in vae.state_dict().items()}
    assert again.latent_config == latents


def test_fingerprint_is_that_of_the_latent_space():
    """SHA-256 of all but the decoder, as checkpoints and caches hold it: sorted keys, each with its float32 numbers."""
    vae, digest = tiny_vae(), hashlib.sha256()
    for name, value in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + value.numpy().tobytes())
    before = vae.latent_fingerprint()
    assert before == tiny_vae().latent_fingerprint() == digest.hexdigest()
    with torch.no_grad():
        vae.decoder.conv_in.bias += 1
    assert vae.latent_fingerprint() == before
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e-3
    assert vae.latent_fingerprint() != before


def test_fingerprint_of_any_vae_class():
    """Whatever its encoder's keys are called; a VAE without any would look like every other one, and is refused."""

    class Other(nn.Module, LatentSpace):
        def __init__(self, name: str, value: float):
            super().__init__()
            self.add_module(name, nn.Linear(2, 2))
            nn.init.constant_(self.get_submodule(name).weight, value)
            nn.init.zeros_(self.get_submodule(name).bias)

    assert Other("net", 1.0).latent_fingerprint() == Other("net", 1.0).latent_fingerprint()
    assert Other("net", 1.0).latent_fingerprint() != Other("net", 2.0).latent_fingerprint()
    with pytest.raises(ValueError, match="no weights outside its decoder"):
        Other("decoder", 1.0).latent_fingerprint()


def save(path, content):
    torch.save(content, path)
    return path


def test_save_and_load_both_ways(tmp_path):
    vae = fill_golden(tiny_vae(embed_dim=4, channel_order=[1, 0, 3, 2], scale_factor=0.7))
    path = save(tmp_path / "vae.pth", {"model": vae.state_dict(), "config": vae.config})
    for contradiction in (dict(embed_dim=16), dict(stride=8)):
        with pytest.raises(ValueError, match=f"vae_{next(iter(contradiction))} .* contradicts"):
            load_vae(path, **contradiction)
    loaded = load_vae(path, embed_dim=4, stride=16)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.channel_order == [1, 0, 3, 2] and loaded.scale_factor == 0.7
    assert_same(dict(loaded.state_dict()), dict(vae.state_dict()))


def test_ckpt_path_loads_and_extra_keys_are_named(tmp_path, messages):
    vae = fill_golden(AutoencoderKL(**BIT_OF_EVERYTHING))
    path = save(tmp_path / "vae.ckpt", {"model": vae.state_dict() | {"loss.logvar": torch.zeros(1)}, "epoch": 7})
    loaded = AutoencoderKL(**BIT_OF_EVERYTHING, ckpt_path=str(path))
    assert len(messages) == 1 and "loss.logvar" in messages[0] and "epoch" in messages[0]
    assert torch.equal(loaded.quant_conv.weight, vae.quant_conv.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.conv_in.bias"), r"lacks 1 .*decoder\.conv_in\.bias"),
        (lambda w: w.update({"quant_conv.bias": torch.zeros(3)}), r"quant_conv\.bias: file \(3,\), here \(8,\)"),
        (lambda w: w.update({"quant_conv.bias": torch.full((8,), math.nan)}), r"NaN.*quant_conv\.bias"),
        (lambda w: w.update({"quant_conv.bias": torch.full((8,), math.inf)}), r"infinite.*quant_conv\.bias"),
        (lambda w: w.update({"quant_conv.bias": 5}), r"quant_conv\.bias: file no tensor but int"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    vae = AutoencoderKL(**BIT_OF_EVERYTHING)
    weights = dict(vae.state_dict())
    change(weights)
    path = save(tmp_path / "vae.pth", {"model": weights})
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(vae, path)
    assert str(path) in str(caught.value) and caught.value.argument == "vae_path"
    assert all(torch.equal(before[k], v) for k, v in vae.state_dict().items())  # nothing was half loaded


def test_weights_are_found_wherever_a_file_has_them(tmp_path):
    """Latent diffusion's state_dict, alone or in a whole checkpoint, a bare dict, DistributedDataParallel's keys."""
    weights = AutoencoderKL(**BIT_OF_EVERYTHING).state_dict()
    in_ldm = {f"first_stage_model.{key}": value for key, value in weights.items()}
    contents = ({"state_dict": weights, "epoch": 3}, {"state_dict": in_ldm | {"model.diffusion_model.x": weights}})
    for content in (*contents, weights, {"model": {f"module.{key}": value for key, value in weights.items()}}):
        found = read_vae_file(save(tmp_path / "vae.ckpt", content))["model"]
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"model": [1]}, [1, 2], torch.zeros(3), {}])
def test_files_without_weights_under_model(tmp_path, content):
    path = save(tmp_path / "vae.pth", content)
    with pytest.raises(ValueError, match='"model"') as caught:
        load_vae(path)
    assert str(path) in str(caught.value)


def test_truncated_absent_foreign_and_hostile_files(tmp_path):
    path = save(tmp_path / "vae.pth", {"model": AutoencoderKL(**BIT_OF_EVERYTHING).state_dict()})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "text.ckpt").write_text("not found\n")
    (tmp_path / "empty.ckpt").touch()
    save(tmp_path / "small.ckpt", {"model": AutoencoderKL(**BIT_OF_EVERYTHING).state_dict()})
    save(tmp_path / "code.pth", {"model": {"x": Explosive(tmp_path / "boom")}})
    for name, message in (
        ("vae.pth", "truncated"),
        ("text.ckpt", "text.ckpt"),
        ("empty.ckpt", "empty.ckpt"),
        ("small.ckpt", "lacks"),  # without a config it is KL-16
        ("code.pth", "code"),
        ("absent.ckpt", "no VAE weights at .*absent.ckpt"),
    ):
        with pytest.raises(FileNotFoundError if name == "absent.ckpt" else ValueError, match=message):
            load_vae(tmp_path / name)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("config", [{"depth": 3}, [1, 2], {"embed_dim": "four"}, {"embed_dim": 0}])
def test_a_config_that_describes_no_vae(tmp_path, config):
    path = save(tmp_path / "vae.pth", {"model": {}, "config": config})
    with pytest.raises(ValueError, match="config"):
        load_vae(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(embed_dim=0), "embed_dim"),
        (dict(ch_mult=()), "ch_mult"),
        (dict(ch_mult=(1, 0)), "ch_mult"),
        (dict(num_res_blocks=0), "num_res_blocks"),
        (dict(ch=100), "norm_groups"),
        (dict(embed_dim=4, channel_order=[0, 1, 2, 2]), "channel_order"),
        (dict(embed_dim=4, scale_factor=[1.0, 2.0]), "scale_factor"),
        (dict(embed_dim=4, shift=[1.0, 2.0]), "shift"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        AutoencoderKL(**arguments)


@pytest.mark.parametrize("size", [(63, 64), (64, 72)])
def test_images_must_be_a_multiple_of_the_stride(size):
    with pytest.raises(ValueError, match="stride 16"):
        tiny_vae().encode(torch.zeros(1, 3, *size))
