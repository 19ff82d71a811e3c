"""The golden arrays on the GPU in float32, with the CPU's tolerances; errors against float64 beside the CPU's."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import MODELS
from models.quantizer import GaussianQuantizer
from models.tokenbridge import TokenBridge, TrainingDetails
from models.vae import AutoencoderKL
from tests.gpu.checks import CPU, in_float64, largest, on
from tests.helpers import fill_golden, golden_arrays, golden_json, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact")]
Z, LOGITS, LOSS = 2e-4, 5e-4, 1e-4  # absolute, absolute, relative: the CPU's
GRADIENTS = 1e-3
PIXELS = 3e-5


def golden_pass(model: TokenBridge, golden: dict, device: torch.device) -> TrainingDetails:
    inputs = (torch.from_numpy(golden[key]).to(device) for key in ("latents", "labels", "mask"))
    return model.train().to(device)(*inputs, return_details=True)


def compare(report: Callable, what: str, found: Tensor, golden: Tensor, tolerance: float, reference: Callable) -> None:
    """The error against the golden array is within tolerance; reference(): (on the CPU, in float64) for the report."""
    error = largest(found, golden)
    text = f"{what}: {error:.2e} from the golden array, tolerance {tolerance:.0e}"
    cpu, double = reference()
    text += f"; against float64: {largest(found, double):.2e} on {found.device}, {largest(cpu, double):.2e} on the cpu"
    report(text)
    assert error <= tolerance, text


def test_tiny(device: torch.device, report: Callable) -> None:
    golden = golden_arrays("train_tiny")
    model = tiny_model()
    details = golden_pass(model, golden, device)
    details.loss.backward()
    cpu, double = golden_pass(tiny_model(), golden, CPU), golden_pass(in_float64(tiny_model()), golden, CPU)
    assert torch.equal(details.tokens.cpu(), torch.from_numpy(golden["tokens"]))
    for name, tolerance in (("z", Z), ("logits", LOGITS)):
        parts = [getattr(x, name).detach() for x in (details, cpu, double)]
        expected = torch.from_numpy(golden[name])
        compare(report, f"tiny, {name}", parts[0], expected, tolerance, lambda parts=parts: parts[1:])
    assert details.loss.item() == pytest.approx(float(golden["loss"]), rel=LOSS)
    norms = golden_json("train_tiny")["grad_norms"]
    found = {name: 0.0 if p.grad is None else p.grad.double().norm().item() for name, p in model.named_parameters()}
    off = {
        name: abs(norm - (norms[name] or 0)) / (GRADIENTS * (norms[name] or 0) + 1e-6) for name, norm in found.items()
    }
    report(f"tiny, gradient norms: largest error {max(off.values()):.1%} of the tolerance")
    assert max(off.values()) <= 1, max(off, key=off.get)


@pytest.mark.parametrize("name", ["base", pytest.param("large", marks=pytest.mark.slow)])
@torch.no_grad()
def test_full_size(device: torch.device, report: Callable, name: str) -> None:
    golden = golden_arrays(f"train_tokenbridge_{name}")

    def model() -> TokenBridge:
        return fill_golden(MODELS[f"tokenbridge_{name}"](attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0))

    details = golden_pass(model(), golden, device)
    for what, found, tolerance in (("z", details.z[0, :8], Z), ("logits", details.logits[:8], LOGITS)):
        error = largest(found, torch.from_numpy(golden[f"{what}_first8"]))
        report(f"{name}, {what}: {error:.2e} from the golden array, tolerance {tolerance:.0e}")
        assert error <= tolerance
    assert details.loss.item() == pytest.approx(float(golden["loss"]), rel=LOSS)


@pytest.mark.parametrize("number", range(5))
def test_sampling(device: torch.device, number: int) -> None:
    """Temperature 0: all tokens equal."""
    case, golden = golden_json(f"sample_tiny_{number}"), golden_arrays(f"sample_tiny_{number}")
    model = on(device, lambda: tiny_model(head_start="official", **case["config"]))
    options = {name: case[name] for name in ("num_iter", "cfg", "cfg_schedule", "temperature")}
    labels = torch.from_numpy(golden["labels"]) if case["labels"] else None
    orders = torch.from_numpy(golden["orders"])
    latents = model.sample_tokens(len(orders), labels=labels, orders=orders, **options)
    assert torch.equal(model.quantize(model.patchify(latents))[0].cpu(), torch.from_numpy(golden["tokens"]))
    assert largest(latents, torch.from_numpy(golden["latents"])) <= 1e-6 * 16


@torch.no_grad()
def test_vae(device: torch.device, report: Callable) -> None:
    """KL-16: encoder and decoder, with cuDNN's choice of kernels."""
    golden = {name: torch.from_numpy(array) for name, array in golden_arrays("vae_kl16").items()}
    with torch.device(device):
        empty = AutoencoderKL()
    vae = fill_golden(empty).eval()
    posterior = vae.encode(golden["image"].to(device))
    found = {"moments": posterior.parameters, "mean": posterior.mean, "std": posterior.std}
    found["decoded"] = vae.decode(golden["latent"].to(device))
    for name, value in found.items():
        report(f"VAE, {name}: {largest(value, golden[name]):.2e} from the golden array, tolerance {PIXELS:.0e}")
    assert max(largest(value, golden[name]) for name, value in found.items()) <= PIXELS


def test_quantizer(device: torch.device) -> None:
    """Indices equal the CPU's, bit for bit, also where they are no golden's."""
    x = torch.from_numpy(golden_arrays("quantizer")["x"])
    for bits in (1, 4, 6, 9, 12):
        quantizer = GaussianQuantizer(bits)
        expected = quantizer.quantize(x)
        quantizer.to(device)
        found = quantizer.quantize(x.to(device))
        differ = float((found.cpu() != expected).double().mean())
        assert differ < 1e-4 and (found.cpu() - expected).abs().max() <= 1
