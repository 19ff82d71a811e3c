"""models/sampling/reuse.py: exact where nothing changed, whole steps exact, less work."""

import pytest
import torch
from torch import Tensor, nn

from models.layers import take
from models.sampling.loop import feature_source, guided_z
from models.sampling.options import SamplerOptions
from models.sampling.orders import random_orders
from models.sampling.reuse import ReusedFeatures
from models.sampling.schedules import unmasking_plan
from models.tokenbridge import TokenBridge
from tests.helpers import tiny_model
from tools.bench.counting import count

LABELS = torch.tensor([3, 7])


def state(model: TokenBridge) -> tuple[Tensor, Tensor, Tensor]:
    """values (2, 16, 16) with 5 tokens known, orders (2, 16), class embedding (2, D)."""
    orders = random_orders(2, 16, torch.Generator().manual_seed(1))
    values = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(2))
    masked = torch.zeros(2, 16, dtype=torch.bool).scatter(1, orders[:, :11], True)
    return values.masked_fill(masked.unsqueeze(-1), 0), orders, model.class_emb.weight.detach()[LABELS]


def source(model: TokenBridge, embedding: Tensor, features: int, guidance: int = 1) -> ReusedFeatures:
    return feature_source(model, embedding, SamplerOptions(reuse_features=features, reuse_guidance=guidance))


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_whole_pass_is_the_exact_one_and_keeps_what_the_next_needs(scale):
    """Called again with nothing new, only the targets run and get the same z: every cache entry is in its place."""
    model = tiny_model()
    values, orders, embedding = state(model)
    reused, visible = source(model, embedding, 2), orders[:, 11:]
    for calls, targets in ((0, orders[:, :11]), (1, orders[:, 8:11]), (1, orders[:, :2])):
        reused.calls = calls
        exact = guided_z(model, take(values, visible), visible, targets, embedding, scale)
        assert torch.allclose(reused(values, orders, 11, targets, scale), exact, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("features", [1, 2])
def test_the_guidance_of_the_last_whole_step_is_reused(features):
    """z_c is new, z_c - z_u is kept: with nothing changed that is the exact guided z, at the scale of the moment."""
    model = tiny_model()
    values, orders, embedding = state(model)
    reused = source(model, embedding, features, guidance=3)
    visible, targets = orders[:, 11:], orders[:, 8:11]
    for scale in (2.0, 3.0, 1.0, 1.5):  # step 0 whole, 1 reuses, 2 needs no guidance, 3 whole
        exact = guided_z(model, take(values, visible), visible, targets, embedding, scale)
        assert torch.allclose(reused(values, orders, 11, targets, scale), exact, atol=1e-5)


def seeing(block: nn.Module, x: Tensor, sees: Tensor) -> Tensor:
    """A timm block x (N, P, D) whose positions attend where `sees` (P, P): timm 1.0.9's own takes no mask."""
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
    weights = (attn.scale * q @ k.transpose(-2, -1)).masked_fill(~sees, float("-inf")).softmax(-1)
    x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


@torch.no_grad()
def test_between_whole_steps_old_tokens_do_not_see_new_ones():
    """That is all that the encoder leaves out: it equals one with an attention mask.

    In a decoder of one block nothing is left out.
    """
    model = tiny_model(decoder_depth=1)
    values, orders, embedding = state(model)
    reused = source(model, embedding, 2)
    reused(values, orders, 11, orders[:, 9:11], 1.0)
    values = values.scatter(1, orders[:, 9:11, None].expand(-1, -1, 16), torch.ones(2, 2, 16))
    visible, targets, slots = orders[:, 9:], orders[:, 6:9], model.buffer_size
    sees = torch.ones(slots + 7, slots + 7, dtype=torch.bool)
    sees[:, slots : slots + 2] = False  # the two new tokens lead `visible`
    sees[slots : slots + 2] = True
    x = model.encoder_inputs(take(values, visible), visible, embedding)
    for block in model.encoder_blocks:
        x = seeing(block, x, sees)
    expected = model.run_decoder(model.encoder_norm(x), visible, targets)
    assert torch.allclose(reused(values, orders, 9, targets, 1.0), expected, atol=1e-5)


def sample(model: TokenBridge, num_iter: int = 8, **options: object) -> Tensor:
    return model.sample_tokens(2, num_iter, 3.0, labels=LABELS, temperature=0, seeds=[1, 2], **options)


def test_first_step_exact_and_every_step_with_one():
    model = tiny_model()
    assert torch.equal(sample(model), sample(model, reuse_features=1, reuse_guidance=1))
    exact, reused = (
        next(model.sample_steps(2, labels=LABELS, seeds=[1, 2], num_iter=8, cfg=3.0, **more)).values
        for more in ({}, dict(reuse_features=4, reuse_guidance=4))
    )
    assert torch.equal(exact, reused)


@pytest.mark.parametrize(
    "options",
    [
        dict(reuse_features=3),
        dict(reuse_guidance=2),
        dict(reuse_features=2, reuse_guidance=4),
        dict(reuse_features=3, order="confidence"),
        dict(reuse_features=3, reuse_guidance=2, cfg_schedule="interval", cfg_interval=(0.3, 0.7)),
    ],
)
def test_every_combination_fills_the_image(options):
    """All tokens are levels of the quantizer, the same whatever the batch."""
    model = tiny_model()
    arguments = dict(num_iter=8, cfg=3.0, temperature=1.0, cfg_schedule="linear") | options
    both = model.sample_tokens(2, labels=LABELS, seeds=[1, 2], **arguments)
    assert torch.isin(both, model.dequantize(torch.arange(16))).all()
    assert torch.equal(model.sample_tokens(1, labels=LABELS[1:], seeds=[2], **arguments)[0], both[1])


def test_less_work():
    """FLOPs of 8 steps: reusing guidance saves up to half of the backbone, features nearly all between whole steps."""
    model = tiny_model(vae_embed_dim=1, channel_depth=1)  # the head plays no part

    def flops(**options: object) -> int:
        return count(lambda: sample(model, 8, **options)).flops

    exact = flops()
    assert flops(reuse_features=4, reuse_guidance=4) < flops(reuse_features=4) < flops(reuse_features=2) < exact
    assert flops(reuse_guidance=4) < flops(reuse_guidance=2) < exact


def test_plan_and_steps_agree():
    """A step that predicts nothing runs nothing, and counts for no interval."""
    model, calls = tiny_model(), []
    model.z_proj.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    sample(model, 20, reuse_features=4)
    working = [(b, a) for b, a, _ in unmasking_plan(20, 16) if b > a]
    assert len(calls) == len(working) and calls[0] == 0
    for i, ((before, _), (last, _)) in enumerate(zip(working[1:], working, strict=False), start=1):
        assert calls[i] == (16 - before if i % 4 == 0 else last - before)
