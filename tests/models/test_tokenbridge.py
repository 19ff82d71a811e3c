"""models/tokenbridge.py, models/__init__.py (docs/spec.md 4, 5, 11): golden training passes, manifests, masking,
labels, gradients, errors.
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest, truncnorm
from torch import nn

from models import MODELS
from models.layers import take
from models.sampling.loop import guided_z
from models.sampling.orders import random_orders
from models.tokenbridge import TokenBridge, TrainingDetails, draw_mask_ratio, mask_from_orders, num_masked_tokens
from tests.helpers import fill_golden, golden_arrays, golden_json, tiny_batch, tiny_config, tiny_model

# million parameters, docs/spec.md 4; blocks of encoder and decoder each, of the head
SIZES = {"tokenbridge_base": (218.02, 12, 4), "tokenbridge_large": (486.89, 16, 4), "tokenbridge_huge": (910.04, 20, 6)}
SMALL = dict(vae_embed_dim=2, channel_order=[0, 1], channel_depth=1)  # where the head plays no part
KL16_ORDER = [8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5]


def on_meta(name: str, **changes: object) -> TokenBridge:
    with torch.device("meta"):
        return MODELS[name](**changes)


def half_mask(batch: int = 4, num_tokens: int = 16, hidden: int = 9) -> torch.Tensor:
    """Mask (B, L), bool, another set of `hidden` tokens in each row."""
    rng = np.random.default_rng(11)
    mask = np.zeros((batch, num_tokens), dtype=bool)
    for row in mask:
        row[rng.permutation(num_tokens)[:hidden]] = True
    return torch.from_numpy(mask)


def golden_batch(name: str) -> list[torch.Tensor]:
    """Latents, labels, mask."""
    arrays = golden_arrays(name)
    return [torch.from_numpy(arrays[key]) for key in ("latents", "labels", "mask")]


@pytest.fixture(scope="module")
def golden_tiny() -> tuple[TokenBridge, TrainingDetails]:
    """The tiny model in training mode after one forward and backward pass over the golden batch."""
    model = tiny_model().train()
    details = model(*golden_batch("train_tiny"), return_details=True)
    details.loss.backward()
    return model, details


def test_golden_tiny(golden_tiny):
    model, details = golden_tiny
    golden = golden_arrays("train_tiny")
    np.testing.assert_array_equal(details.tokens.numpy(), golden["tokens"])
    _, values = model.quantize(torch.from_numpy(golden["latents"]).flatten(2).transpose(1, 2))
    np.testing.assert_allclose(values.numpy(), golden["dequantized"], rtol=0, atol=1e-6 * 16)
    np.testing.assert_allclose(details.z.detach().numpy(), golden["z"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(details.logits.detach().numpy(), golden["logits"], rtol=0, atol=5e-4)
    assert details.loss.item() == pytest.approx(float(golden["loss"]), rel=1e-4)
    assert details.loss.item() == pytest.approx(golden_json("train_tiny")["loss"], rel=1e-4)
    assert details.loss.dtype == torch.float32 and details.loss.shape == ()


def test_golden_gradient_norms(golden_tiny):
    """Every parameter's; those that the file says have none must have none here (or zero)."""
    expected = golden_json("train_tiny")["grad_norms"]
    named = dict(golden_tiny[0].named_parameters())
    assert set(named) == set(expected) and len(named) == 167
    for name, p in named.items():
        norm = 0.0 if p.grad is None else p.grad.double().norm().item()
        assert norm == pytest.approx(expected[name] or 0, rel=1e-3, abs=1e-6), name


def test_golden_orders_give_the_golden_mask():
    golden = golden_arrays("train_tiny")
    mask = mask_from_orders(torch.from_numpy(golden["orders"]), golden_json("train_tiny")["num_masked"])
    np.testing.assert_array_equal(mask.numpy(), golden["mask"].astype(bool))


@pytest.mark.parametrize("name", ["tokenbridge_base", pytest.param("tokenbridge_large", marks=pytest.mark.slow)])
@torch.no_grad()
def test_golden_full_size(name):
    """256 px, 200 masked tokens; z of the first 8 positions, logits of the first 8 masked tokens, the loss."""
    golden = golden_arrays(f"train_{name}")
    # no initial weights are drawn, which takes long; the buffers are those of a small model with as many levels
    model = on_meta(name, attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0).to_empty(device="cpu")
    for key, buffer in tiny_model(quant_levels=64).named_buffers():
        setattr(model, key, buffer)
    fill_golden(model)
    details = model.train()(*golden_batch(f"train_{name}"), return_details=True)
    np.testing.assert_allclose(details.z[0, :8].numpy(), golden["z_first8"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(details.logits[:8].numpy(), golden["logits_first8"], rtol=0, atol=5e-4)
    assert details.loss.item() == pytest.approx(float(golden["loss"]), rel=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_manifest_and_size(name):
    """Keys and shapes of the published checkpoints, in their order (optimizer states refer to positions)."""
    model, (millions, depth, head_depth) = on_meta(name), SIZES[name]
    manifest = golden_json(f"manifest_{name}")
    assert [(key, list(value.shape)) for key, value in model.state_dict().items()] == list(manifest.items())
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    config = model.config
    assert (config.quant_levels, list(config.channel_order), config.head_start) == (64, KL16_ORDER, "trained")
    # a wrong eps would hide under the tolerance of the logits
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    # backbone blocks; z_proj_ln and two ends; head blocks; channel_norm and final
    assert len(norms) == 2 * 2 * depth + 3 + 4 * head_depth + 2
    assert {module.eps for module in norms} == {1e-6}


def test_the_defaults_are_large():
    with torch.device("meta"):
        model = TokenBridge()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == golden_json("manifest_tokenbridge_large")
    with pytest.raises(TypeError):
        TokenBridge(256)  # keyword-only


def test_there_is_a_small_model_for_the_demo():
    assert set(SIZES) < set(MODELS)
    small = on_meta("tokenbridge_digits", img_size=32, vae_stride=8, vae_embed_dim=4, buffer_size=8, class_num=10)
    assert sum(p.numel() for p in small.parameters()) < 3e6 and small.num_tokens == 16


def test_tables_in_a_checkpoint_are_used():
    """Published checkpoints bring their own tables: a loaded buffer replaces the one computed here."""
    model = tiny_model()
    state = model.state_dict() | {"reconstruction_values": torch.linspace(-3, 3, 16)}
    model.load_state_dict(state, strict=True)
    assert model.dequantize(torch.tensor([0, 15])).tolist() == pytest.approx([-5, 5])
    assert model.quantize(torch.linspace(-5, 5, 16))[0].tolist() == list(range(16))


def test_config_rebuilds_the_model():
    model = tiny_model(vae_embed_dim=4, channel_order=(2, 0, 1, 3), head_start="official", quant_min=-4.0)
    kept = model.config.to_dict()
    assert json.loads(json.dumps(kept)) == kept and kept["channel_order"] == [2, 0, 1, 3]
    again = TokenBridge(**kept)
    assert again.config == model.config == TokenBridge(model.config).config
    assert TokenBridge(model.config, quant_min=-3.0).config == model.config.changed(quant_min=-3.0)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_channel_mask_buffer():
    mask = tiny_model(vae_embed_dim=3).channel_mask
    assert mask.dtype == torch.float32 and mask.tolist() == [[0, -math.inf, -math.inf], [0, 0, -math.inf], [0, 0, 0]]


def test_initialisation():
    """docs/spec.md 5: by the spread of what was drawn and the exact zeros and ones."""
    torch.manual_seed(0)
    widths = dict.fromkeys(("encoder_embed_dim", "decoder_embed_dim", "channel_embed_dim"), 128)
    model = TokenBridge(**tiny_config(**widths, class_num=300, buffer_size=64))
    for name, p in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if "adaLN_modulation" in name:
            assert not p.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        elif isinstance(module, nn.Linear) and name.endswith("bias"):
            assert not p.any(), name
        elif isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(p.shape))  # xavier-uniform
            assert p.abs().max() <= bound and p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        elif name.startswith("token_embeddings"):
            assert p.std().item() == pytest.approx(1, rel=0.1), name
        elif p.numel() > 500:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            assert 0 < p.abs().max() < 0.1, name


def test_a_fresh_model_predicts_about_chance():
    """The blocks are the identity; a random linear head over a unit-norm input costs ln K plus half its variance."""
    torch.manual_seed(0)
    loss = TokenBridge(**tiny_config())(*tiny_batch(32)).item()
    assert math.log(16) < loss < math.log(16) + 1.2


def test_masks_of_any_dtype():
    """All give the loss of the bool mask, whatever stands for 1."""
    model, (latents, labels), mask = tiny_model(), tiny_batch(), half_mask()
    expected = model(latents, labels, mask)
    for dtype in ("uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"):
        assert torch.equal(model(latents, labels, mask.to(getattr(torch, dtype))), expected), dtype
    assert torch.equal(model(latents, labels, mask, num_masked=9), expected)


def test_only_masked_tokens_are_predicted_and_hidden_ones_do_not_leak():
    """z and the logits may not depend on the values of masked tokens (apart from the head's own teacher forcing)."""
    model, (latents, labels), mask = tiny_model(), tiny_batch(), half_mask()
    hidden = mask.view(4, 1, 4, 4)
    changed = torch.where(hidden, -latents, latents)
    before, after = (model(x, labels, mask, return_details=True) for x in (latents, changed))
    assert torch.equal(before.z, after.z)
    assert torch.equal(before.logits[:, 0], after.logits[:, 0])
    assert not torch.equal(before.logits[:, 1], after.logits[:, 1])
    visible_changed = model(torch.where(hidden, latents, -latents), labels, mask, return_details=True)
    assert not torch.allclose(before.z, visible_changed.z)
    assert before.logits.shape == (4 * 9, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3])
def test_decoding_target_tokens_only_changes_none_of_them(depth):
    """The last block computes the targets alone, in any order and more than once."""
    model, (latents, labels) = tiny_model(decoder_depth=depth), tiny_batch()
    visible, masked = torch.arange(16).expand(4, 16).split([7, 9], dim=1)
    encoded = model.run_encoder(model.patchify(latents)[:, :7], visible, model.class_emb(labels))
    z = model.run_decoder(encoded, visible)  # (4, 16, D)
    for targets in (masked, masked.flip(1)[:, :3], visible[:, [6, 6, 0]]):
        assert torch.allclose(model.run_decoder(encoded, visible, targets), take(z, targets), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("known", [0, 3])
def test_guided_z_is_that_of_two_whole_passes(known):
    """Also where nothing is visible and one unconditional row serves all images, each with its own targets."""
    model = tiny_model()
    orders = random_orders(3, 16, torch.Generator().manual_seed(3))
    values = torch.randn(3, known, 16, generator=torch.Generator().manual_seed(4))
    visible, targets, classes = orders[:, 16 - known :], orders[:, 5:9], model.class_emb(torch.tensor([3, 7, 1]))
    passes = [model.run_encoder(values, visible, rows) for rows in (classes, model.fake_latent.expand(3, -1))]
    z, z_u = (take(model.run_decoder(x, visible), targets) for x in passes)
    assert not torch.allclose(z, z_u, atol=1e-2)
    assert torch.allclose(guided_z(model, values, visible, targets, classes, 2.5), z_u + 2.5 * (z - z_u), atol=1e-5)


def test_loss_and_rows_by_hand():
    """Mean of -log softmax at the true index, rows batch-major in grid order; logits[:, c] is dimension order[c]."""
    model, (latents, labels), mask = tiny_model(), tiny_batch(), half_mask()
    details = model(latents, labels, mask, return_details=True)
    rows, terms = iter(details.logits.double()), []
    for b in range(4):
        for position in range(16):
            if mask[b, position]:
                logits = next(rows)
                for c, dimension in enumerate(KL16_ORDER):
                    index = details.tokens[b, position, dimension]
                    terms.append((logits[c].exp().sum().log() - logits[c, index]).item())
    assert next(rows, None) is None and len(terms) == 4 * 9 * 16
    assert details.loss.item() == pytest.approx(np.mean(terms), rel=1e-5)


def test_everything_masked():
    model, (latents, labels) = tiny_model(), tiny_batch()
    ones = torch.ones(4, 16)
    first = model(latents, labels, ones, return_details=True)
    assert first.logits.shape == (64, 16, 16) and first.loss.isfinite()
    assert torch.equal(first.z, model(-latents, labels, ones, return_details=True).z)


def test_mask_ratio_is_a_truncated_normal():
    """Its quantile function against scipy's, and the distribution that uniform numbers get by the Kolmogorov-Smirnov
    test.

    On [0.7, 1] the mean is 1 - 0.25 (phi(0) - phi(1.2)) / (1/2 - Phi(-1.2)) = 1 - 0.25 * 0.2047563 / 0.3849303."""
    for lowest in (0.7, 0.5, 0.05):
        reference = truncnorm((lowest - 1) / 0.25, 0, loc=1, scale=0.25)
        for u in (0.0, 1e-3, 0.1, 0.5, 0.9, 1.0):
            assert draw_mask_ratio(lowest, u) == pytest.approx(reference.ppf(u), abs=1e-9)
        draws = [draw_mask_ratio(lowest, u) for u in np.random.default_rng(0).random(4000)]
        assert np.mean(draws) == pytest.approx(reference.mean(), abs=4 * reference.std() / math.sqrt(4000))
        assert kstest(draws, reference.cdf).pvalue > 1e-3
    assert draw_mask_ratio(1.0, 0.3) == 1.0
    middles = [draw_mask_ratio(0.7, u) for u in (np.arange(2000) + 0.5) / 2000]
    assert np.mean(middles) == pytest.approx(0.867017, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "num_tokens", "expected"),
    [(0.7, 256, 180), (0.75, 256, 192), (0.7501, 256, 193), (1.0, 256, 256), (0.01, 16, 1)],
)
def test_number_of_masked_tokens_is_rounded_up(ratio, num_tokens, expected):
    assert num_masked_tokens(ratio, num_tokens) == expected


def test_drawn_masks_in_the_forward_pass():
    """One count per step, between ceil(0.7 L) = 12 and 16, distributed like the ratio."""
    model, (latents, labels) = tiny_model(**SMALL), tiny_batch(2, channels=2)
    generator, counts = torch.Generator().manual_seed(0), []
    for _ in range(150):
        counts.append(len(model(latents, labels, generator=generator, return_details=True).logits) // 2)
    ratio = truncnorm(-1.2, 0, loc=1, scale=0.25)
    expected = {m: ratio.cdf(m / 16) - ratio.cdf((m - 1) / 16) for m in range(12, 17)}
    assert set(counts) == set(expected)
    for m, share in expected.items():
        assert counts.count(m) / 150 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 150))


def test_random_orders_are_uniform_permutations():
    orders = random_orders(3000, 8, torch.Generator().manual_seed(0))
    assert torch.equal(orders.sort(1).values, torch.arange(8).expand(3000, 8))
    counts = F.one_hot(orders, 8).double().mean(0)  # (place, token): 1/8 each, standard error 0.006
    assert (counts - 1 / 8).abs().max() < 0.03
    assert mask_from_orders(orders, 3).sum(1).tolist() == [3] * 3000
    assert torch.equal(orders, random_orders(3000, 8, torch.Generator().manual_seed(0)))


def test_dropped_labels_do_not_matter():
    """Images whose label is dropped see fake_latent: their z is the same for any label, the others' is not."""
    model, (latents, labels), mask = tiny_model(), tiny_batch(), half_mask()
    drop = torch.tensor([True, False, True, False])
    others = (labels + 1) % 10
    first, second = (model(latents, y, mask, label_drop=drop, return_details=True).z for y in (labels, others))
    assert torch.equal(first[drop], second[drop])
    assert ((first - second)[~drop].abs().amax((1, 2)) > 1e-3).all()
    first, second = (model(latents, y, mask, label_drop=torch.ones(4, dtype=torch.bool)) for y in (labels, others))
    assert torch.equal(first, second)


def test_fake_latent_is_a_class_embedding():
    model, (latents, labels), mask = tiny_model(), tiny_batch(), half_mask()
    dropped = model(latents, labels, mask, label_drop=torch.ones(4, dtype=torch.bool))
    with torch.no_grad():
        model.class_emb.weight.copy_(model.fake_latent.expand(10, -1))
    assert torch.equal(model(latents, labels, mask), dropped)


def test_label_drop_probability():
    """In training a share of the images, in eval none."""
    latents, labels = tiny_batch(400, channels=2)
    mask = F.one_hot(torch.zeros(400, dtype=torch.long), 16)  # one token each, as the head is what takes time

    def dropped(model: TokenBridge) -> torch.Tensor:
        """Images (400,) whose z is the same for another label."""
        first, second = (
            model(latents, y, mask, return_details=True, generator=torch.Generator().manual_seed(0)).z
            for y in (labels, (labels + 1) % 10)
        )
        return (first == second).flatten(1).all(1)

    model = tiny_model(label_drop_prob=0.25, **SMALL).train()
    assert dropped(model).double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 400))
    assert not dropped(model.eval()).any()
    assert dropped(tiny_model(label_drop_prob=1.0, **SMALL).train()).all()


def test_every_parameter_gets_a_gradient():
    """But the key norms' biases, which softmax does not see."""
    model = tiny_model(label_drop_prob=0.5).train()
    latents, labels = tiny_batch(8)
    model(latents, labels, half_mask(8), label_drop=torch.arange(8) % 2 == 0).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-8}
    assert without == {f"channel_blocks.{i}.attn.k_norm.bias" for i in range(2)}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_grad_checkpointing_changes_no_number(dropout):
    results = []
    for kept in ("none", "selective", "full", True):
        model = tiny_model(grad_checkpointing=kept, attn_dropout=dropout, proj_dropout=dropout, head_chunk=0).train()
        torch.manual_seed(0)
        loss = model(*tiny_batch(), half_mask())
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    plain, *recomputed = results
    for others in recomputed:
        for a, b in zip(plain, others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("head_chunk", [None, 0])
def test_grad_checkpointing_recomputes(head_chunk):
    """Else the flag would do nothing: the blocks run twice, and only in training; the head's if not in groups."""
    model, calls = tiny_model(grad_checkpointing="full", head_chunk=head_chunk), []
    for block in (*model.encoder_blocks, *model.decoder_blocks, *model.channel_blocks):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()(*tiny_batch(), half_mask()).backward()
    assert len(calls) == 2 * (2 + 3) + (2 if head_chunk is None else 2 * 2)
    calls.clear()
    model.eval()(*tiny_batch(), half_mask()).backward()
    assert len(calls) == 2 + 3 + 2


def test_dropout_acts_in_training_only():
    model, batch = tiny_model(attn_dropout=0.3, proj_dropout=0.3), (*tiny_batch(), half_mask())
    assert torch.equal(model(*batch), tiny_model()(*batch))
    model.train()
    torch.manual_seed(0)
    first, second = model(*batch), model(*batch)
    assert not torch.equal(first, second)
    rates = {(type(m).__name__, m.p) for m in model.encoder_blocks.modules() if isinstance(m, nn.Dropout) and m.p}
    assert rates == {("Dropout", 0.3)}


def test_a_few_steps_fit_one_batch():
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = (*tiny_batch(), half_mask())
    first = model(*batch).item()
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first


def test_other_channel_counts_and_orders(messages):
    assert tiny_model(vae_embed_dim=4).channel_order == [0, 1, 2, 3]
    assert len(messages) == 1 and "natural order" in messages[0]
    model = tiny_model(vae_embed_dim=4, channel_order=[2, 0, 3, 1])
    assert tiny_model().channel_order == KL16_ORDER
    assert len(messages) == 1
    latents, labels = tiny_batch(channels=4)
    details = model(latents, labels, torch.ones(4, 16), return_details=True)
    targets = details.tokens.flatten(0, 1)[:, [2, 0, 3, 1]]
    expected = F.cross_entropy(details.logits.flatten(0, 1), targets.flatten())
    assert details.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_tokens_are_row_major():
    model = tiny_model()
    latents = torch.zeros(1, 16, 4, 4)
    latents[0, 3, 1, 2] = 5.0  # dimension 3 at row 1, column 2: token 6
    tokens = model(latents, torch.tensor([0]), torch.ones(1, 16), return_details=True).tokens
    middle = model.quantize(torch.zeros(1))[0].item()
    assert (tokens != middle).nonzero().tolist() == [[0, 6, 3]] and tokens[0, 6, 3] == 15
    assert torch.equal(model.unpatchify(model.patchify(latents)), latents)


def test_nan_latents_show_in_the_loss():
    """Also where they are masked: they have no index, so they must not be learnt as one."""
    model, (latents, labels) = tiny_model(), tiny_batch()
    latents[2, 5, 1, 1] = math.nan
    for mask in (torch.ones(4, 16), half_mask()):
        assert model(latents, labels, mask).isnan()


def test_bf16_autocast_is_close():
    model, batch = tiny_model(), (*tiny_batch(), half_mask())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*batch)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(*batch).item(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(patch_size=2), "patch_size 2.*head is defined for one"),
        (dict(img_size=100), "img_size 100.*multiple of.* 16"),
        (dict(img_size=0), "img_size must be at least 1, got 0"),
        (dict(quant_levels=63), "power of two.*63"),
        (dict(quant_levels=1), "power of two"),
        (dict(quant_levels=8192), "power of two"),
        (dict(mask_ratio_min=0.0), "mask_ratio_min"),
        (dict(mask_ratio_min=1.2), "mask_ratio_min"),
        (dict(label_drop_prob=1.5), "label_drop_prob"),
        (dict(attn_dropout=-0.1), "attn_dropout"),
        (dict(proj_dropout=2.0), "proj_dropout"),
        (dict(class_num=0), "class_num must be at least 1, got 0"),
        (dict(buffer_size=0), "buffer_size"),
        (dict(encoder_num_heads=5), "encoder_embed_dim 64 is not a multiple"),
        (dict(decoder_depth=0), "decoder_depth must be at least 1, got 0"),
        (dict(decoder_num_heads=5), "decoder_embed_dim 96 is not a multiple"),
        (dict(quant_min=5.0, quant_max=-5.0), "quant_min < quant_max"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        TokenBridge(**tiny_config(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latents=torch.zeros(4, 16, 8, 8)), r"\(16, 8, 8\) do not fit the model, which takes \(16, 4, 4\)"),
        (dict(latents=torch.zeros(4, 4, 4, 4)), r"which takes \(16, 4, 4\)"),
        (dict(labels=torch.tensor([0, 1, 2, 10])), r"labels must be in \[0, 10\)"),
        (dict(labels=torch.tensor([0, 1, -1, 2])), r"labels must be in \[0, 10\)"),
        (dict(labels=torch.tensor([0, 1, 2])), r"labels has shape \(3,\), expected \(4,\)"),
        (dict(mask=torch.ones(4, 15)), r"mask has shape \(4, 15\), expected \(4, 16\)"),
        (dict(mask=torch.ones(16, 4)), r"mask has shape \(16, 4\), expected \(4, 16\)"),
        (dict(mask=torch.ones(1, 16)), r"mask has shape \(1, 16\), expected \(4, 16\)"),
        (dict(mask=torch.zeros(4, 16)), "at least one"),
        (dict(mask=torch.ones(4, 16).tril()), "same number of tokens"),
    ],
)
def test_batches_that_do_not_fit(change, message):
    latents, labels = tiny_batch()
    with pytest.raises(ValueError, match=message):
        tiny_model()(**(dict(latents=latents, labels=labels, mask=half_mask()) | change))
