"""models/channel_ar.py, models/layers.py (docs/spec.md 5): against a head written out in float64, caches, draws."""

import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from models import channel_ar
from models.channel_ar import is_valid, sample_levels
from models.layers import AdaLNBlock, CausalAttention
from models.tokenbridge import TokenBridge
from tests.helpers import tiny_batch, tiny_config, tiny_model

N = 7  # tokens
HEADS = 4  # of the tiny model's head


def random_inputs(model: TokenBridge, seed: int = 0) -> tuple[Tensor, Tensor]:
    """z (N, D) and indices (N, C) in head order."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.standard_normal((N, model.mask_token.shape[-1])).astype(np.float32))
    return z, torch.from_numpy(rng.integers(model.num_levels, size=(N, model.num_channels)))


def plain_head(model: TokenBridge, z: Tensor, indices: Tensor, start: str) -> Tensor:
    """docs/spec.md 5 word by word, float64, one explicit attention matrix, no cache: logits (N, C, K) in head order."""
    w = {key: value.double() for key, value in model.state_dict().items()}
    z = z.double()
    num_channels, width = indices.shape[1], w["condition_proj.bias"].shape[0]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str | None) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x if name is None else x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    h = linear("condition_proj", z)
    x = torch.empty(len(z), num_channels, width, dtype=torch.float64)
    x[:, 0] = h + w["timesteps_embeddings"][0, 0] if start == "official" else h
    for c in range(1, num_channels):
        x[:, c] = w[f"token_embeddings.{c - 1}.weight"][indices[:, c - 1]]
    x = x + w["channel_embed"]
    conditioning = silu(h[:, None] + w["timesteps_embeddings"])
    for i in range(len(model.channel_blocks)):
        at = f"channel_blocks.{i}"
        terms = linear(f"{at}.adaLN_modulation.1", conditioning).split(width, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = terms
        qkv = linear(f"{at}.attn.qkv", norm(x, f"{at}.norm1") * (1 + scale_a) + shift_a)
        out = []
        for head in range(HEADS):
            size = width // HEADS
            q, k, v = (qkv[..., part * width + head * size : part * width + (head + 1) * size] for part in range(3))
            scores = norm(q, f"{at}.attn.q_norm") @ norm(k, f"{at}.attn.k_norm").transpose(1, 2) / math.sqrt(size)
            scores = scores + w["channel_mask"]  # 0 on and below the diagonal, -inf above
            out.append(scores.softmax(-1) @ v)
        x = x + gate_a * linear(f"{at}.attn.proj", torch.cat(out, -1))
        hidden = linear(f"{at}.mlp.fc1", norm(x, f"{at}.norm2") * (1 + scale_m) + shift_m)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + gate_m * linear(f"{at}.mlp.fc2", hidden)
    scale, shift = linear("channel_final.adaLN_modulation.1", conditioning).split(width, -1)
    x = norm(norm(x, "channel_norm"), None) * (1 + scale) + shift
    return torch.stack([linear(f"channel_heads.{c}", x[:, c]) for c in range(num_channels)], 1)


def plain_sample(model: TokenBridge, z: Tensor, start: str) -> Tensor:
    """Greedy indices (N, C), without a cache: the whole sequence is computed for every position."""
    indices = torch.zeros(len(z), model.num_channels, dtype=torch.long)
    for c in range(model.num_channels):
        indices[:, c] = plain_head(model, z, indices, start)[:, c].argmax(-1)
    return indices


@pytest.mark.parametrize("start", ["trained", "official"])
@pytest.mark.parametrize("channels", [16, 4, 2, 1])
@torch.no_grad()
def test_the_head_is_the_plain_one(channels, start):
    """Training logits, which ignore head_start; greedy indices, which do not."""
    model = tiny_model(vae_embed_dim=channels, head_start=start)
    z, indices = random_inputs(model)
    expected = plain_head(model, z, indices, "trained")
    torch.testing.assert_close(model.channel_logits(z, indices).double(), expected, rtol=0, atol=2e-5)
    sampled, valid = model.channel_sample(z, torch.rand(N, channels), 0)
    assert torch.equal(sampled, plain_sample(model, z, start))
    assert valid.shape == (N,) and valid.dtype == torch.bool and valid.all()


@torch.no_grad()
def test_causal():
    """Changing the index at position c leaves the logits up to c as they are and changes every later one."""
    model = tiny_model()
    z, indices = random_inputs(model)
    before = model.channel_logits(z, indices)
    for c in range(16):
        changed = indices.clone()
        changed[:, c] = (changed[:, c] + 1) % 16
        differs = (model.channel_logits(z, changed) - before).abs().amax((0, 2)) > 1e-5
        assert differs.tolist() == [False] * (c + 1) + [True] * (15 - c)


@pytest.mark.parametrize("head", ["autoregressive", "parallel"])
@pytest.mark.parametrize("rates", [(0.3, 0.0), (0.0, 0.3), (0.2, 0.3)])
@torch.no_grad()
def test_dropout_acts_in_training_mode_only(head: str, rates: tuple[float, float]) -> None:
    """In every block, at its rate; the state dict does not change."""
    plain, model = tiny_model(head=head), tiny_model(head=head, attn_dropout=rates[0], proj_dropout=rates[1])
    inputs = random_inputs(model)
    expected = plain.channel_logits(*inputs)
    assert torch.equal(plain.train().channel_logits(*inputs), expected)
    assert torch.equal(model.channel_logits(*inputs), expected)
    model.train()
    first, second = model.channel_logits(*inputs), model.channel_logits(*inputs)
    assert not torch.equal(first, second) and not torch.equal(first, expected)
    assert [block.attn.attn_dropout for block in model.channel_blocks] == [rates[0]] * 2
    assert model.state_dict().keys() == plain.state_dict().keys()


def assert_share(zeros: Tensor, rate: float) -> None:
    """The share of True entries is `rate`, within four standard deviations of a binomial share."""
    assert abs(float(zeros.float().mean()) - rate) < 4 * math.sqrt(rate * (1 - rate) / zeros.numel())


@pytest.mark.parametrize("rate", [0.1, 0.4])
@torch.no_grad()
def test_share_of_dropped_activations_is_the_rate(rate: float) -> None:
    """After the projection, the MLP's activation and its second Linear; what is left is scaled by 1 / (1 - rate)."""
    model, found = tiny_model(proj_dropout=rate).train(), []
    for block in model.channel_blocks:
        for layer in (block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2):
            layer.register_forward_hook(lambda _, inputs, output: found.append((inputs[0], output)))
    torch.manual_seed(0)
    z, indices = random_inputs(model)
    model.channel_logits(z.repeat(20, 1), indices.repeat(20, 1))
    assert len(found) == 3 * len(model.channel_blocks)
    for before, after in found:
        assert_share(after[before != 0] == 0, rate)
        torch.testing.assert_close(after[after != 0], before[after != 0] / (1 - rate))


@pytest.mark.parametrize("rate", [0.1, 0.4])
@torch.no_grad()
def test_share_of_dropped_attention_weights_is_the_rate(rate: float) -> None:
    """With equal scores, one-hot values and an identity for `proj`, the output is the attention weights themselves."""
    width = 16
    attention = CausalAttention(width, 1, attn_dropout=rate)
    for layer in (attention.qkv, attention.proj):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    attention.qkv.weight[2 * width :] = attention.proj.weight[:] = torch.eye(width)
    x, lower = torch.eye(width).expand(400, -1, -1), torch.ones(width, width).tril() > 0
    uniform = torch.ones(width, width).tril() / torch.arange(1, width + 1).unsqueeze(1)
    torch.testing.assert_close(attention.eval()(x), uniform.expand(400, -1, -1))
    torch.manual_seed(0)
    weights = attention.train()(x)
    assert (weights[:, ~lower] == 0).all()
    assert_share(weights[:, lower] == 0, rate)
    kept = weights != 0
    torch.testing.assert_close(weights[kept], (uniform / (1 - rate)).expand(400, -1, -1)[kept])


def cached_logits(model: TokenBridge, z: Tensor, indices: Tensor) -> Tensor:
    """Logits (N, C, K) that `channel_sample` computes, position by position, when its draws are forced to `indices`."""
    seen = []

    def forced(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        seen.append(logits.clone())
        return indices[:, len(seen) - 1], logits[:, 0]

    original, channel_ar.sample_levels = channel_ar.sample_levels, forced
    try:
        model.channel_sample(z, torch.zeros(len(z), model.num_channels), 1.0)
    finally:
        channel_ar.sample_levels = original
    return torch.stack(seen, 1)


@pytest.mark.parametrize("start", ["trained", "official"])
@torch.no_grad()
def test_cached_logits_step_by_step(start):
    model = tiny_model(head_start=start)
    z, indices = random_inputs(model)
    found = cached_logits(model, z, indices)
    torch.testing.assert_close(found.double(), plain_head(model, z, indices, start), rtol=0, atol=2e-5)
    if start == "trained":  # then decoding continues exactly what training learnt
        torch.testing.assert_close(found, model.channel_logits(z, indices), rtol=0, atol=1e-5)
    else:
        assert (found - model.channel_logits(z, indices)).abs().max() > 1e-2


@torch.no_grad()
def test_sixteen_positions_per_token_not_136():
    model = tiny_model()
    z, _ = random_inputs(model)
    rows = []
    model.channel_blocks[0].attn.qkv.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel()))
    model.channel_sample(z, torch.rand(N, 16), 1.0)
    assert sum(rows) == N * 16


@pytest.mark.parametrize("temperature", [0, 1.0])
@torch.no_grad()
def test_decoding_in_chunks_changes_nothing(monkeypatch, temperature):
    model = tiny_model()
    z, _ = random_inputs(model)
    uniform = torch.rand(N, 16, generator=torch.Generator().manual_seed(0))
    whole = model.channel_sample(z, uniform, temperature)[0]
    # two tokens of the tiny model at a time
    monkeypatch.setattr(channel_ar, "DECODE_CHUNK_BYTES", 16 * 48 * 14 * 4 * 2)
    sizes = []
    model.channel_heads[0].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    assert torch.equal(model.channel_sample(z, uniform, temperature)[0], whole)
    assert sizes == [2, 2, 2, 1]


@torch.no_grad()
def test_tokens_of_broken_weights_are_not_valid():
    model = tiny_model()
    model.channel_heads[3].bias[5] = math.nan
    z, _ = random_inputs(model)
    for temperature in (0, 1.0):
        assert not model.channel_sample(z, torch.rand(N, 16), temperature)[1].any()


@pytest.mark.parametrize(
    ("probabilities", "uniform", "temperature", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0.0, 0.05, 0.15, 0.29, 0.31, 0.59, 0.61, 1 - 2**-24], 1.0, [0, 0, 1, 1, 2, 2, 3, 3]),
        ([1 / 3, 2 / 3], [0.19, 0.21, 0.32, 0.34], 1.0, [0, 0, 0, 1]),
        ([1 / 3, 2 / 3], [0.19, 0.21, 0.32, 0.34], 0.5, [0, 1, 1, 1]),  # 1/5 and 4/5
        ([1 / 3, 2 / 3], [0.49, 0.51, 0.0, 0.99], 1e6, [0, 1, 0, 1]),  # 1/2 each
        ([0.3, 0.4, 0.3], [0.0, 0.99], 0, [1, 1]),
        ([0.4, 0.4, 0.2], [0.0, 0.99], 0, [0, 0]),  # the lowest index of equal ones
    ],
)
def test_levels_by_hand(probabilities, uniform, temperature, expected):
    """The cumulative distribution of softmax(log p / T) is inverted; temperature 0 takes the argmax."""
    logits = torch.tensor(probabilities).log().expand(len(uniform), -1)
    assert sample_levels(logits, torch.tensor(uniform), temperature)[0].tolist() == expected


@pytest.mark.parametrize("temperature", [0.5, 0.96, 2.0])
def test_frequencies(temperature):
    """200,000 draws fit softmax(logits / T) by the chi-square test; of random seeds one in a thousand would fail."""
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(sample_levels(logits.expand(200_000, 8), uniform, temperature)[0], minlength=8).numpy()
    weights = np.exp(logits.double().numpy() / temperature)
    assert chisquare(counts, 200_000 * weights / weights.sum()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(0, 1.0, 8), (3, 1.0, 3), (0, 0.7, 4), (2, 0.7, 2), (1, 1.0, 1), (0, 1e-300, 1)]
)
def test_frequencies_of_what_top_k_and_top_p_leave(top_k, top_p, kept):
    """Probabilities 0.28, 0.2, 0.16, 0.12, ...: the `kept` largest, renormalised, by the chi-square test."""
    p = np.array([0.04, 0.28, 0.06, 0.2, 0.08, 0.16, 0.06, 0.12])
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(3))
    drawn = sample_levels(torch.from_numpy(p).log().expand(100_000, 8), uniform, 1.0, top_k, top_p)[0]
    counts = torch.bincount(drawn, minlength=8).numpy()
    left = np.argsort(-p, kind="stable")[:kept]
    assert counts[left].sum() == 100_000
    if kept > 1:
        assert chisquare(counts[left], 100_000 * p[left] / p[left].sum()).pvalue > 1e-3


def test_top_k_1_is_the_argmax():
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(5))
    logits = torch.randn(500, 64, generator=torch.Generator().manual_seed(4))
    for temperature in (0.1, 1.0, 50.0):
        assert torch.equal(sample_levels(logits, uniform, temperature, top_k=1)[0], logits.argmax(-1))


def test_the_head_draws_from_its_joint_distribution():
    """2 dimensions, 4 levels: all 16 outcomes, against p(first) p(second | first) from the teacher-forced logits."""
    model = tiny_model(channel_depth=1, vae_embed_dim=2, quant_levels=4, channel_order=[1, 0])
    z = torch.randn(1, model.mask_token.shape[-1], generator=torch.Generator().manual_seed(6))
    outcomes = torch.cartesian_prod(torch.arange(4), torch.arange(4))  # (16, 2) head order
    with torch.no_grad():
        first, second = model.channel_logits(z.expand(16, -1), outcomes).double().mul(1 / 0.7).log_softmax(-1).unbind(1)
        expected = (first.gather(1, outcomes[:, :1]) + second.gather(1, outcomes[:, 1:])).exp()[:, 0].numpy()
        uniforms = torch.rand(40_000, 2, generator=torch.Generator().manual_seed(7))
        drawn, _ = model.channel_sample(z.expand(40_000, -1), uniforms, 0.7)
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).numpy()
    assert expected.sum() == pytest.approx(1) and chisquare(counts, 40_000 * expected).pvalue > 1e-3


def test_impossible_levels_are_never_drawn():
    logits = torch.full((4096, 64), -math.inf)
    logits[:, 20:40] = torch.randn(4096, 20, generator=torch.Generator().manual_seed(0))
    for uniform in (torch.zeros(4096), torch.full((4096,), 1 - 2**-24)):
        drawn, numbers = sample_levels(logits, uniform, 1.0)
        assert drawn.min() >= 20 and drawn.max() < 40 and is_valid(numbers).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_without_a_distribution_are_not_valid(bad):
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    for temperature in (0, 1.0):
        assert is_valid(sample_levels(logits, torch.tensor([0.5, 0.5]), temperature)[1]).tolist() == [True, False]


def test_half_precision_logits_are_drawn_in_float32():
    logits = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    uniform = torch.rand(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample_levels(logits, uniform, 1.0)[0], sample_levels(logits.float(), uniform, 1.0)[0])


def test_channel_order_and_its_inverse():
    order = [2, 0, 3, 1]
    model = tiny_model(vae_embed_dim=4, channel_order=order)
    x = torch.tensor([[10, 11, 12, 13]])
    assert x[:, model.to_head_order].tolist() == [[12, 10, 13, 11]]
    assert x[:, model.to_head_order][:, model.to_natural_order].tolist() == x.tolist()
    assert {"to_head_order", "to_natural_order"}.isdisjoint(model.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head_start="first"), "head_start 'first' is unknown; choose from official, trained"),
        (dict(channel_order=list(range(15))), "permutation of 0..15"),
        (dict(channel_order=[0, *range(15)]), "permutation of 0..15"),
        (dict(vae_embed_dim=4, channel_order=[1, 2, 3, 4]), "permutation of 0..3"),
        (dict(channel_heads=5), "channel_embed_dim 48 is not a multiple of channel_heads 5"),
        (dict(head="mlp"), "head 'mlp' is unknown; choose from autoregressive, parallel"),
        (dict(head="parallel", head_start="official"), "belongs to the published autoregressive head"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenBridge(**tiny_config(**change))


def test_the_parallel_head_predicts_each_dimension_from_z_alone():
    """Its logits do not depend on the indices; it has every parameter but the token embeddings."""
    model, other = tiny_model(head="parallel"), tiny_model()
    z, indices = random_inputs(model)
    changed = (indices + 1) % model.num_levels
    assert torch.equal(model.channel_logits(z, indices), model.channel_logits(z, changed))
    assert not torch.equal(other.channel_logits(z, indices), other.channel_logits(z, changed))
    keys, other_keys = model.state_dict().keys(), other.state_dict().keys()
    assert keys < other_keys and other_keys - keys == {f"token_embeddings.{c}.weight" for c in range(15)}


@torch.no_grad()
def test_the_parallel_head_samples_from_its_logits():
    """At temperature 0 each dimension's argmax; otherwise draws from each softmax, independent of the others."""
    model = tiny_model(head="parallel")
    z, _ = random_inputs(model)
    logits = model.channel_logits(z, None)
    indices, valid = model.channel_sample(z, torch.zeros(N, 16), 0.0)
    assert torch.equal(indices, logits.argmax(-1)) and valid.all()
    torch.testing.assert_close(model.leading_logits(z), logits[:, 0], rtol=1e-4, atol=1e-4)
    draws, noise = 4000, torch.rand(4000, 16, generator=torch.Generator().manual_seed(1))
    drawn, _ = model.channel_sample(z[:1].expand(draws, -1), noise, 1.0)
    for c in (0, 7, 15):
        expected = draws * logits[0, c].double().softmax(-1)
        observed = torch.bincount(drawn[:, c], minlength=16).double()
        likely = expected >= 5  # the others together
        pairs = ((*x[likely], x[~likely].sum() + rest) for x, rest in ((observed, 0), (expected, 1e-9)))
        assert chisquare(*pairs).pvalue > 1e-4


def test_the_parallel_head_learns():
    """A few steps on one batch lower the loss, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = TokenBridge(**tiny_config(head="parallel"))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = model(*tiny_batch(), torch.ones(4, 16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert not [name for name, p in model.named_parameters() if p.grad is None and name != "fake_latent"]


def test_a_compiled_block_is_one_graph():
    """Also under autocast, and with a symbol for the number of tokens: a break would end fusion at the attention."""
    block = AdaLNBlock(16, 2, 2.0)
    compiled = torch.compile(lambda x, c: block(x, block.modulation(c)), backend="eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        x, conditioning = torch.randn(2, tokens, 4, 16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(x, conditioning), block(x, block.modulation(conditioning)))
