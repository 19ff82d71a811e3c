"""The sampler on the GPU: the CPU's random numbers and tokens, no host sync, compiled as eager."""

from collections.abc import Callable

import pytest
import torch

from models.sampling import compiled
from models.sampling.loop import Sampler, sampling_noise
from models.sampling.options import SamplerOptions
from models.tokenbridge import TokenBridge
from tests.gpu.checks import Borders, no_host_sync, on, sampled
from tests.helpers import DIGITS_MODEL, tiny_model
from util import dist

pytestmark = pytest.mark.gpu


def small() -> TokenBridge:
    """256 tokens of 16 dimensions, random weights."""
    torch.manual_seed(0)
    model = DIGITS_MODEL(buffer_size=8, class_num=10)
    for layer in model.modulation_layers:
        torch.nn.init.xavier_uniform_(layer[1].weight)
    return model


def test_random_numbers_of_a_seed(device: torch.device) -> None:
    """Bit for bit the CPU's, alone or in a batch."""
    model = on(device, tiny_model)
    options, seeds = SamplerOptions(order="confidence"), [5, 0, 123456789]
    whole = sampling_noise(3, 16, 16, seeds, None, True)
    sampler = Sampler(model, model.class_emb.weight[:3].detach(), options, whole)
    alone = [sampling_noise(1, 16, 16, [seed], None, True) for seed in seeds]
    assert torch.equal(whole.orders, torch.cat([noise.orders for noise in alone]))
    uniforms = torch.cat([noise.uniforms for noise in alone])[:, :, list(model.channel_order)]
    assert sampler.uniforms.device.type == device.type and torch.equal(sampler.uniforms.cpu(), uniforms)
    assert torch.equal(sampler.confidence.cpu(), torch.cat([noise.confidence for noise in alone]))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("build", [tiny_model, small])
@pytest.mark.parametrize("options", [dict(cfg=3.0), dict(temperature=0.8, order="halton")], ids=str)
def test_tokens_are_the_cpus_up_to_a_border(device, report: Callable, build: Callable, options: dict) -> None:
    options = dict(num_iter=8) | options
    borders = Borders(build().eval(), **options)
    share = borders.check(sampled(on(device, build), **options))
    report(f"tokens, {build.__name__} {options}: {share:.2%} are the CPU's")
    assert share > 0.5


def test_a_wrong_token_is_noticed(device: torch.device) -> None:
    """The check above: other random numbers, or one other level far from a border, fail it."""
    borders = Borders(on(device, tiny_model), num_iter=4)
    assert borders.check(borders.tokens) == 1
    targets, distances = borders.steps[1]
    token, dimension = divmod(int(distances[2].argmax()), 16)
    wrong = borders.tokens.clone()
    wrong[2, targets[2, token], borders.model.channel_order[dimension]] ^= 1
    for tokens in (wrong, borders.tokens.flip(0)):
        with pytest.raises(AssertionError, match="from a border"):
            borders.check(tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(order="confidence"),
        dict(reuse_features=2, reuse_guidance=2),
        dict(top_k=3, top_p=0.9, temperature_schedule="linear"),
    ],
    ids=str,
)
def test_the_host_never_waits(device: torch.device, report: Callable, precision: str, options: dict) -> None:
    """From the first random number to the last step; half precision changes tokens, and makes no NaN."""
    model, arguments = on(device, tiny_model), dict(num_iter=6, cfg=2.0) | options
    labels = torch.arange(4, device=device)
    with dist.autocast(device, precision):
        model.sample_tokens(4, labels=labels, seeds=[0, 1, 2, 3], **arguments)  # libraries start
        with no_host_sync(device):
            latents = model.sample_tokens(4, labels=labels, seeds=[0, 1, 2, 3], **arguments)
    assert latents.isfinite().all() and latents.device.type == device.type


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("large_batch", [False, True])
def test_compiled_is_eager(device, report: Callable, monkeypatch: pytest.MonkeyPatch, large_batch: bool) -> None:
    """CUDA graphs, and blocks of any shape for large batches: twice, the second time with the graphs of the first."""
    if large_batch:
        monkeypatch.setattr(compiled, "MOST_REPLAYED_SLOTS", 0)
    options = dict(num_iter=8, cfg=3.0)
    borders = Borders(on(device, tiny_model), **options)
    model = on(device, tiny_model)
    shares = [borders.check(sampled(model, compile=True, **options)) for _ in range(3)]
    report(f"compiled sampler, {'blocks' if large_batch else 'graphs'}: {min(shares):.2%} of the tokens are eager's")
    assert min(shares) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("large_batch", [False, True])
def test_compiled_in_half_precision(device: torch.device, report: Callable, monkeypatch, large_batch: bool) -> None:
    """Close to eager's loss of equal tokens; another batch and other weights reuse the graphs."""
    if large_batch:
        monkeypatch.setattr(compiled, "MOST_REPLAYED_SLOTS", 0)
    model = on(device, tiny_model)
    with dist.autocast(device, "bf16"):
        tokens = [sampled(model, compile=True, num_iter=1, temperature=0) for _ in range(2)]
        expected = sampled(model, num_iter=1, temperature=0)
    assert torch.equal(*tokens)
    share = float((tokens[0] == expected).double().mean())
    report(f"compiled sampler in bf16, {'blocks' if large_batch else 'graphs'}: {share:.2%} of the tokens are eager's")
    assert share > 0.8
