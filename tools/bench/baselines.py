"""Sampling and training without optimizations, kept as references: the operations as docs/spec.md 4 to 6 state them.

Sampling runs the guidance passes one after the other, decodes all tokens, and has no cache in the head. Training draws
masks on the host, does not fuse attention, and runs AdamW and EMA parameter by parameter.

Letters: B batch, L tokens, C dimensions of a token, K levels, S buffer slots, D width, H width of the head, h and w
latent grid, M tokens predicted at a step, N tokens of a batch that pass the head.
"""

import contextlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.latent_space import DiagonalGaussian
from models.sampling.schedules import guidance_scale, unmasking_plan
from models.tokenbridge import TokenBridge, draw_mask_ratio, num_masked_tokens
from models.vae import AutoencoderKL
from tools.bench.counting import OpCounter
from tools.bench.quantizer import quantize_by_distance
from training.state import weight_decay_groups
from util import dist


def select_tokens(x: Tensor, selected: Tensor, each: int) -> Tensor:
    """x (B, T, D) where selected (B, T) is True, `each` in every row: (B, each, D). A boolean index: the host waits."""
    tokens = x[selected]
    torch._check(tokens.shape[0] == len(x) * each)  # what fake tensors cannot know
    return tokens.view(len(x), each, x.shape[-1])


def baseline_features(
    model: TokenBridge, values: Tensor, masked: Tensor, num_masked: int, class_embedding: Tensor
) -> Tensor:
    """The backbone: values (B, L, C), masked (B, L) bool, class_embedding (B, D) -> z (B, L, D) of *every* token."""
    s, batch = model.buffer_size, len(values)
    x = torch.cat([class_embedding.unsqueeze(1).expand(-1, s, -1), model.z_proj(values)], dim=1)  # (B, S+L, D)
    x = model.z_proj_ln(x + model.encoder_pos_embed_learned)
    visible = torch.cat([masked.new_zeros(batch, s), masked], dim=1).logical_not()  # (B, S+L)
    x = select_tokens(x, visible, x.shape[1] - num_masked)
    for block in model.encoder_blocks:
        x = block(x)
    x = model.decoder_embed(model.encoder_norm(x))
    grid = model.mask_token.to(x.dtype).expand(batch, visible.shape[1], -1).clone()  # (B, S+L, D)
    grid[visible] = x.flatten(0, 1)
    x = grid + model.decoder_pos_embed_learned
    for block in model.decoder_blocks:
        x = block(x)
    return model.decoder_norm(x)[:, s:] + model.output_pos_embed


def baseline_head(model: TokenBridge, z: Tensor) -> Tensor:
    """The head at temperature 0: z (N, D) -> indices (N, C) in head order; dimension c recomputes positions 0..c."""
    h = model.condition_proj(z)  # (N, H)
    inputs, indices = [h + model.timesteps_embeddings[:, 0] if model.head_start == "official" else h], []
    for c in range(model.num_channels):
        x = torch.stack(inputs, dim=1) + model.channel_embed[:, : c + 1]  # (N, c+1, H)
        conditioning = h.unsqueeze(1) + model.timesteps_embeddings[:, : c + 1]
        features = model.head_forward(x, model.modulations(conditioning))
        indices.append(model.channel_heads[c](features[:, -1]).argmax(-1))
        if c < model.num_channels - 1:
            inputs.append(model.token_embeddings[c](indices[-1]))
    return torch.stack(indices, dim=1)


def baseline_sampling_step(
    model: TokenBridge,
    values: Tensor,
    masked: Tensor,
    orders: Tensor,
    plan: tuple[int, int],
    class_embedding: Tensor,
    scale: float,
) -> Tensor:
    """Reveal orders[:, after:before] in values (B, L, C), in place; returns the new mask (B, L).

    plan: tokens masked before and after.
    """
    before, after = plan
    z = baseline_features(model, values, masked, before, class_embedding)  # (B, L, D)
    if scale != 1:
        z_u = baseline_features(model, values, masked, before, model.fake_latent.expand_as(class_embedding))
        z = z_u + scale * (z - z_u)
    revealed = torch.zeros_like(masked).scatter_(1, orders[:, after:before], True)
    indices = baseline_head(model, select_tokens(z, revealed, before - after).flatten(0, 1))  # (N, C)
    values[revealed] = model.dequantize(indices[:, model.to_natural_order])
    return masked & ~revealed


@torch.no_grad()
def sample_baseline(
    model: TokenBridge, orders: Tensor, labels: Tensor, num_iter: int, cfg: float, cfg_schedule: str
) -> Tensor:
    """Latents (B, C, H, W) at temperature 0, as TokenBridge.sample_tokens gives them (docs/spec.md 6)."""
    model.eval()
    batch, num_tokens = orders.shape
    class_embedding = model.class_emb(labels)  # (B, D)
    values = torch.zeros(batch, num_tokens, model.token_dim, device=orders.device)
    masked = torch.ones_like(orders, dtype=torch.bool)
    for before, after, keep in unmasking_plan(num_iter, num_tokens):
        if before > after:
            scale = guidance_scale(cfg, cfg_schedule, num_tokens, keep)
            masked = baseline_sampling_step(model, values, masked, orders, (before, after), class_embedding, scale)
    return model.unpatchify(values)


def baseline_attention(model: TokenBridge, attn: nn.Module, x: Tensor) -> Tensor:
    """Attention of the head with an additive mask, not fused: x (N, C, H) -> (N, C, H)."""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, C, head_dim) each
    scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.head_dim**-0.5 + model.channel_mask
    weights = F.dropout(scores.softmax(-1).to(v.dtype), attn.attn_dropout, model.training)
    return attn.proj_drop(attn.proj((weights @ v).transpose(1, 2).flatten(2)))


def baseline_logits(model: TokenBridge, z: Tensor, targets: Tensor) -> list[Tensor]:
    """The head op by op: z (N, D), targets (N, C) in head order -> logits (N, K) of each dimension."""
    h = model.condition_proj(z)  # (N, H)
    embedded = [table(targets[:, c]) for c, table in enumerate(model.token_embeddings)]
    x = torch.stack([h, *embedded], dim=1) + model.channel_embed  # (N, C, H)
    conditioning = h.unsqueeze(1) + model.timesteps_embeddings  # (N, C, H)
    for block in model.channel_blocks:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(conditioning).chunk(6, dim=-1)
        x = x + gate_a * baseline_attention(model, block.attn, block.norm1(x) * (1 + scale_a) + shift_a)
        x = x + gate_m * block.mlp(block.norm2(x) * (1 + scale_m) + shift_m)
    scale, shift = model.channel_final.adaLN_modulation(conditioning).chunk(2, dim=-1)
    x = model.channel_final.norm(model.channel_norm(x)) * (1 + scale) + shift
    return [head(x[:, c]) for c, head in enumerate(model.channel_heads)]


def baseline_loss(model: TokenBridge, latents: Tensor, labels: Tensor, mask: Tensor, label_drop: Tensor) -> Tensor:
    """The loss of TokenBridge.forward: latents (B, C, h, w), labels (B,), mask (B, L) bool, label_drop (B,) bool."""
    tables = model.reconstruction_values, model.quant_min, model.quant_max
    indices = quantize_by_distance(model.patchify(latents), *tables)  # (B, L, C)
    class_embedding = torch.where(label_drop.unsqueeze(1), model.fake_latent, model.class_emb(labels))
    z = baseline_features(model, model.dequantize(indices), mask, int(mask[0].sum()), class_embedding)
    targets = indices[mask][:, model.to_head_order]  # (N, C)
    logits = baseline_logits(model, z[mask], targets)
    return torch.stack([F.cross_entropy(x.float(), targets[:, c]) for c, x in enumerate(logits)]).mean()


def host_masks(model: TokenBridge, batch_size: int, seed: int, step: int) -> Tensor:
    """Training masks (B, L) bool drawn on the host image by image; the mask ratio is the one that draw_step draws."""
    rng = np.random.default_rng([seed, step, 0])
    masked = num_masked_tokens(draw_mask_ratio(model.mask_ratio_min, float(rng.random())), model.num_tokens)
    mask = np.zeros((batch_size, model.num_tokens), dtype=bool)
    for row in mask:
        row[rng.permutation(model.num_tokens)[:masked]] = True
    return torch.from_numpy(mask)


def baseline_step(
    model: TokenBridge, vae: AutoencoderKL, batch: tuple[Tensor, Tensor], seed: int, precision: str, counter: OpCounter
) -> Callable[[], None]:
    """A function that does one training step of `model` per call on the batch (moments, labels).

    Loss and norm are fetched at every step. `counter` sees the first step, but for AdamW, whose count of steps is a
    tensor on the host.
    """
    (moments, labels), device, done = batch, batch[0].device, 0
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.attn.fused_attn = False
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.02), lr=1e-4, betas=(0.9, 0.95), foreach=False)
    ema = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def gradients() -> None:
        latents = vae.scale(DiagonalGaussian(moments).sample())
        mask = host_masks(model, len(latents), seed, done).to(device)
        drop = torch.rand(len(latents), device=device) < model.label_drop_prob
        with dist.autocast(device, precision):
            loss = baseline_loss(model, latents, labels, mask, drop)
        if not np.isfinite(loss.item()):
            raise ValueError("loss is not finite")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 3.0, foreach=False).item()

    def step() -> None:
        nonlocal done
        with contextlib.nullcontext() if done else counter:
            gradients()
        done += 1
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for average, p in zip(ema, parameters, strict=True):
                average.mul_(0.9999).add_(p, alpha=1 - 0.9999)

    return step
