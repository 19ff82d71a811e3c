"""Where tensors are made (docs/spec.md 11): models build under `meta` and `cuda` contexts, and on a fake GPU nothing
strays to another device.

Fake tensors have shapes and devices but no numbers, so this runs without a GPU. Mixing devices, or asking a fake tensor
for its numbers (a hidden host sync), is an error there by itself. Backward passes on fake cuda tensors need a CUDA
build of torch and are left out.
"""

import contextlib

import pytest
import torch

from evaluation.store import image_flaws
from models import MODELS
from models.quantizer import GaussianQuantizer
from models.sampling.compiled import CompiledSampler
from models.sampling.loop import sample_steps
from models.sampling.options import SamplerOptions
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tests.helpers import RecordOps, fake_gpu, fill_golden, tiny_batch, tiny_config, tiny_vae
from training.step import batch_latents

SMALL_VAE = dict(embed_dim=16, ch_mult=(1, 1, 2, 2, 2), ch=8, num_res_blocks=1, norm_groups=4)
SMALL = dict(vae_embed_dim=4, channel_order=None, channel_depth=1, encoder_depth=1, decoder_depth=2)
AROUND = {"plain": contextlib.nullcontext, "device": lambda: torch.device("cuda")}  # within torch.device("cuda") too


def on_fake_gpu(build, **arguments: object) -> torch.nn.Module:
    with torch.device("cuda"):
        return build(**arguments)


def devices(module: torch.nn.Module) -> set[str]:
    """Of all parameters and buffers, those outside the state dict too."""
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


def strays(ops: RecordOps) -> set[str]:
    """Operations that made a tensor elsewhere than on the (fake) GPU."""
    return {name for name, device in ops.devices if device != "cuda"}


def record_passes(model: TokenBridge) -> tuple[RecordOps, list[int]]:
    """Records operations within it, and how many there were before each pass of the encoder."""
    ops, first = RecordOps(), []
    model.z_proj.register_forward_pre_hook(lambda *_: first.append(len(ops.devices)))
    return ops, first


@pytest.mark.parametrize("device", ["meta", "cpu", "cuda"])
@pytest.mark.parametrize(
    ("build", "arguments"),
    [(TokenBridge, tiny_config()), (AutoencoderKL, SMALL_VAE), (GaussianQuantizer, dict(bits=6))],
)
def test_building_under_a_device(device, build, arguments):
    with fake_gpu() if device == "cuda" else contextlib.nullcontext(), torch.device(device):
        assert devices(build(**arguments)) == {device}


@pytest.mark.parametrize("name", MODELS)
def test_full_models_build_on_a_gpu(name):
    with fake_gpu():
        model = on_fake_gpu(MODELS[name])
        assert devices(model) == {"cuda"} and model.boundaries.shape == (65,)


def test_quantizer_stays_on_the_gpu():
    with fake_gpu():
        quantizer = on_fake_gpu(GaussianQuantizer, bits=6)
        with RecordOps() as ops:
            quantizer(torch.zeros(2, 5, device="cuda"))
        assert ops.names and not strays(ops)


@pytest.mark.parametrize("build", [lambda: TokenBridge(**tiny_config()), lambda: GaussianQuantizer(4, -5, 5)])
def test_tables_do_not_depend_on_the_default_device_or_dtype(build):
    """They are computed in float64 on the CPU: a float64 default, or a cpu context, changes no bit."""
    plain = build()
    torch.set_default_dtype(torch.float64)
    try:
        double = build()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("boundaries", "reconstruction_values"):
        assert getattr(double, name).dtype == torch.float32
        assert torch.equal(getattr(plain, name), getattr(double, name))


def test_a_meta_model_becomes_real_by_loading():
    """The usual way for large checkpoints: build without memory, then assign the file's tensors."""
    real = fill_golden(TokenBridge(**tiny_config())).eval()
    with torch.device("meta"):
        shell = TokenBridge(**tiny_config())
    shell.load_state_dict(real.state_dict(), strict=True, assign=True)
    assert {t.device.type for t in shell.state_dict().values()} == {"cpu"}


def test_vae_stays_on_the_gpu():
    with fake_gpu():
        vae = on_fake_gpu(AutoencoderKL, **SMALL_VAE, scale_factor=[0.5] * 16, shift=0.1)
        image = torch.zeros(2, 3, 64, 64, device="cuda")
        with RecordOps() as ops:
            posterior = vae.encode(image)
            decoded = vae.decode(posterior.sample())
            posterior.kl()
        assert posterior.parameters.shape == (2, 32, 4, 4) and decoded.shape == (2, 3, 64, 64)
        assert ops.names and not strays(ops)
        assert vae.unscale(vae.scale(posterior.mean)).device.type == "cuda"
        full = on_fake_gpu(AutoencoderKL)
        mean = full.encode(torch.zeros(1, 3, 256, 256, device="cuda")).mode()
        assert mean.shape == (1, 16, 16, 16) and full.decode(mean).shape == (1, 3, 256, 256)


@pytest.mark.parametrize("context, checkpointing", [("plain", "none"), ("device", "selective"), ("plain", "full")])
def test_training_forward_stays_on_the_gpu(context, checkpointing):
    """Not one tensor elsewhere. Of a drawn mask the number of tokens, a shape, comes from the host."""
    with fake_gpu():
        rates = dict(label_drop_prob=0.1, attn_dropout=0.1)
        model = on_fake_gpu(TokenBridge, **tiny_config(**rates, grad_checkpointing=checkpointing)).train()
        latents, labels = torch.zeros(2, 16, 4, 4, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
        for mask in (None, (torch.arange(16, device="cuda") < 14).expand(2, -1)):
            with AROUND[context](), RecordOps() as ops:
                details = model(latents, labels, mask, num_masked=14, return_details=True)
            assert ops.names and not strays(ops)
            assert details.logits.shape == (28, 16, 16) and details.loss.dtype == torch.float32
            assert {t.device.type for t in (details.loss, details.tokens, details.z, details.logits)} == {"cuda"}


@pytest.mark.parametrize("context, labels", [("plain", "none"), ("device", "list"), ("plain", "tensor")])
def test_sampler_stays_on_the_gpu(context, labels):
    """Noise and orders are drawn by the host before the loop (a seed is one image on any device); from the first pass
    on all is on the GPU.

    That fake tensors get through at all shows that nothing waits for a number of theirs.
    """
    with fake_gpu():
        model = on_fake_gpu(TokenBridge, **tiny_config(**SMALL))
        given = {"none": None, "list": [1, 2], "tensor": torch.ones(2, dtype=torch.long, device="cuda")}[labels]
        ops, first = record_passes(model)
        with AROUND[context](), ops:
            latents = model.sample_tokens(2, num_iter=2, cfg=2.0, labels=given, seeds=[1, 2])
        assert latents.shape == (2, 4, 4, 4) and latents.device.type == "cuda"
        assert len(first) == 2 + 1 and {device for _, device in ops.devices[first[0] :]} == {"cuda"}
        moved = [name for name, device in ops.devices[: first[0]] if device != "cuda"]
        assert "normal_" not in moved and len(moved) < 30
        orders = torch.zeros(2, 16, dtype=torch.long, device="cuda")
        assert model.sample_tokens(2, 2, orders=orders, temperature=0).device.type == "cuda"


EDIT = dict(editing=True)


@pytest.mark.parametrize(
    "options",
    [
        dict(order="confidence", reuse_guidance=2),
        dict(order="halton", channel_temperature=(0.5, 1.5), temperature_schedule="linear")
        | dict(cfg_schedule="interval", cfg_interval=(0.3, 0.7)),
        dict(order="raster", temperature=0, reuse_features=2),
        dict(order="subsample", top_k=3, top_p=0.9, compile=True),
        dict(order="confidence", temperature=0.9, compile=True),
        EDIT | dict(order="confidence"),
        EDIT | dict(reuse_features=3, reuse_guidance=2),
        EDIT | dict(compile=True),
    ],
    ids=lambda options: " ".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_way_to_sample_stays_on_the_gpu(options, monkeypatch):
    """From the first pass on; the compiled path through the same functions uncompiled."""
    options = dict(num_iter=3, cfg=2.0) | options
    with fake_gpu():
        model = on_fake_gpu(TokenBridge, **tiny_config(**SMALL))
        given = {}
        if options.pop("editing", False):
            mask = torch.arange(16, device="cpu").view(1, 16) % 3 == 0
            given = dict(init=torch.zeros(1, 4, 4, 4, device="cuda"), regenerate=mask, num_regenerate=6)
        if options.get("compile"):
            own = dict(compile=lambda function, dynamic: function, capture=lambda function, _: function)
            CompiledSampler.of(model, **own)
            monkeypatch.setattr(CompiledSampler, "replays", lambda *_: True)  # it asks for addresses
        ops, first = record_passes(model)
        with ops:
            states = list(sample_steps(model, model.class_emb.weight[:2], SamplerOptions(**options), **given))
        latents = states[-1].latents
        assert len(states) == 3 and latents.shape == (2, 4, 4, 4) and latents.device.type == "cuda"
        assert first and {device for _, device in ops.devices[first[0] :]} == {"cuda"}


@pytest.mark.parametrize("kind", ["images", "moments", "mean", "indices"])
def test_cached_latents_become_latents_on_the_gpu(kind):
    """Whatever the cache holds: half-precision moments or means, or int16 indices."""
    with fake_gpu():
        model = on_fake_gpu(TokenBridge, **tiny_config())
        vae = on_fake_gpu(AutoencoderKL, **SMALL_VAE, scale_factor=[0.5] * 16)
        shape, dtype = {
            "images": ((2, 3, 64, 64), torch.float32),
            "moments": ((2, 32, 4, 4), torch.float16),
            "mean": ((2, 16, 4, 4), torch.bfloat16),
            "indices": ((2, 16, 4, 4), torch.int16),
        }[kind]
        batch, noise = torch.zeros(shape, dtype=dtype, device="cuda"), torch.zeros(2, 16, 4, 4, device="cuda")
        with RecordOps() as ops:
            latents = batch_latents(batch, vae, noise, model)
        assert latents.shape == (2, 16, 4, 4) and latents.dtype == torch.float32 and latents.device.type == "cuda"
        assert ops.names and strays(ops) <= {"lift_fresh"}  # the description's 16 scale factors come from the host


def test_mixed_devices_would_be_noticed():
    """The net holds: under the fake GPU a tensor left on the CPU is an error."""
    with fake_gpu():
        model = on_fake_gpu(TokenBridge, **tiny_config())
        labels, mask = torch.zeros(2, dtype=torch.long, device="cuda"), torch.ones(2, 16, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            model(torch.zeros(2, 16, 4, 4), labels, mask, num_masked=16)


def test_real_tensors_of_another_dtype():
    """float64 latents and half-precision masks come in from caches and scripts; the loss is the float32 one."""
    model = fill_golden(TokenBridge(**tiny_config())).eval()
    latents, labels = tiny_batch()
    mask = torch.ones(4, 16)
    assert torch.equal(model(latents.double(), labels.to(torch.int32), mask), model(latents, labels, mask))
    vae = tiny_vae()
    assert vae.decode(vae.unscale(latents)).shape == (4, 3, 64, 64)


def test_the_parallel_head_and_the_image_checks_stay_on_the_gpu() -> None:
    with fake_gpu(), torch.device("cuda"):
        model = TokenBridge(**tiny_config(head="parallel")).eval()
        with torch.no_grad(), RecordOps() as ops:
            model.channel_sample(torch.zeros(5, model.mask_token.shape[-1]), torch.zeros(5, 16), 1.0)
            image_flaws(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
        assert ops.names and not strays(ops)
