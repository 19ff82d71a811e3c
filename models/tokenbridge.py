"""TokenBridge (docs/spec.md 4, 6): a masked autoregressive transformer over quantized VAE latents.

Training: a random 70-100 % of an image's tokens is masked; the encoder sees the rest, the decoder returns a vector z
for each masked token, the head (channel_ar.py) turns z into C categorical distributions. Sampling (sampling/loop.py):
mask everything, then reveal the tokens in N steps.

Letters: B batch, C latent channels (dimensions of a token), H and W latent grid, L = H*W tokens, K levels, D width, S
buffer slots, M tokens masked, V = L - M visible.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from models import quantizer
from models.channel_ar import ChannelAR, embedding
from models.config import TokenBridgeConfig
from models.layers import LAYER_NORM_EPS, take
from models.sampling.loop import SamplerState, sample_steps
from models.sampling.options import SamplerOptions
from models.sampling.orders import check_mask, random_orders
from models.vit_blocks import TrainedBlock, partial_block, recomputed
from util.options import ArgumentError


def draw_mask_ratio(mask_ratio_min: float, uniform: float) -> float:
    """Mask ratio in [mask_ratio_min, 1] from a number in [0, 1] (docs/spec.md 4.5).

    A normal (loc 1, scale 0.25) truncated to that interval, by its quantile function.
    """
    loc, scale = 1.0, 0.25
    lowest, highest = ndtr((mask_ratio_min - loc) / scale), ndtr((1 - loc) / scale)
    return float(np.clip(loc + scale * ndtri(lowest + uniform * (highest - lowest)), mask_ratio_min, 1.0))


def cpu_uniform(generator: torch.Generator | None = None) -> float:
    """One number in [0, 1) for a decision of the host, from a CPU generator (torch's if another or none is given)."""
    on_cpu = generator is not None and generator.device.type == "cpu"
    return float(torch.rand(1, generator=generator if on_cpu else None, device="cpu").numpy()[0])


def num_masked_tokens(mask_ratio: float, num_tokens: int) -> int:
    """ceil(L * ratio) (docs/spec.md 4.5)."""
    return math.ceil(num_tokens * mask_ratio)


def mask_from_orders(orders: Tensor, num_masked: int) -> Tensor:
    """Mask (B, L), True where masked: the first `num_masked` tokens of each order (docs/spec.md 4.5)."""
    return torch.zeros_like(orders, dtype=torch.bool).scatter_(1, orders[:, :num_masked], True)


@dataclass
class TrainingDetails:
    """What `TokenBridge.forward(..., return_details=True)` returns."""

    loss: Tensor  # scalar, float32
    tokens: Tensor  # (B, L, C) indices, natural dimension order
    z: Tensor  # (B, L, D)
    logits: Tensor  # (B*M, C, K), masked tokens batch-major in grid order; logits[:, c]: dimension channel_order[c]


class TokenBridge(ChannelAR):
    """The whole model, from a `TokenBridgeConfig` or its fields as keywords (a config's are replaced by them).

    State-dict keys are those of the published checkpoints. ArgumentError for arguments that do not fit together.
    """

    boundaries: Tensor
    reconstruction_values: Tensor

    def __init__(self, config: TokenBridgeConfig | None = None, **arguments: object):
        super().__init__()
        if config is not None and not isinstance(config, TokenBridgeConfig):
            raise TypeError(f"TokenBridge takes a TokenBridgeConfig or keywords, got {config!r}")
        c = self.config = TokenBridgeConfig(**arguments) if config is None else config.changed(**arguments)
        self.grid_size, self.num_tokens, self.token_dim = c.grid_size, c.num_tokens, c.vae_embed_dim
        self.buffer_size, self.class_num, self.grad_checkpointing = c.buffer_size, c.class_num, c.grad_checkpointing
        self.mask_ratio_min, self.label_drop_prob = c.mask_ratio_min, c.label_drop_prob
        self.quant_min, self.quant_max = c.quant_min, c.quant_max
        # The order of registration is that of the published checkpoints: optimizer states refer to parameters by
        # position. The order of the random draws is part of what a seed means.
        width, decoder_width, slots = c.encoder_embed_dim, c.decoder_embed_dim, c.buffer_size + c.num_tokens
        self.fake_latent = embedding(1, width)  # class embedding of "no class"
        self.encoder_pos_embed_learned = embedding(1, slots, width)
        self.mask_token = embedding(1, 1, decoder_width)
        self.decoder_pos_embed_learned = embedding(1, slots, decoder_width)
        self.output_pos_embed = embedding(1, c.num_tokens, decoder_width)
        self.build_head_embeddings(c)
        self.register_buffer("channel_mask", torch.full((c.vae_embed_dim, c.vae_embed_dim), float("-inf")).triu(1))
        tables = quantizer.GaussianQuantizer(c.quant_levels.bit_length() - 1, c.quant_min, c.quant_max)
        self.register_buffer("reconstruction_values", tables.reconstruction_values)
        self.register_buffer("boundaries", tables.boundaries)
        self.class_emb = nn.Embedding(c.class_num, width)
        self.z_proj = nn.Linear(c.vae_embed_dim, width)
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        dropout = dict(attn_drop=c.attn_dropout, proj_drop=c.proj_dropout)
        kept = dict(selective=c.grad_checkpointing == "selective")
        block = partial(TrainedBlock, mlp_ratio=c.mlp_ratio, qkv_bias=True, norm_layer=norm, **dropout, **kept)
        self.z_proj_ln = norm(width)
        self.encoder_blocks = nn.ModuleList(block(width, c.encoder_num_heads) for _ in range(c.encoder_depth))
        self.encoder_norm = norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.decoder_blocks = nn.ModuleList(block(decoder_width, c.decoder_num_heads) for _ in range(c.decoder_depth))
        self.decoder_norm = norm(decoder_width)
        self.build_head(c)
        self._initialize()

    def _initialize(self) -> None:
        """Linear xavier-uniform with zero bias; class_emb N(0, 0.02); adaLN's last Linear zero (docs/spec.md 5)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.zero_channel_modulation()

    # ---- latents and tokens

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> tokens (B, L, C), row-major (docs/spec.md 4.1). ValueError for any other shape."""
        expected = (self.token_dim, self.grid_size, self.grid_size)
        if tuple(latents.shape[1:]) != expected:
            got = tuple(latents.shape[1:])
            raise ArgumentError("img_size", f"latents of shape {got} do not fit the model, which takes {expected}")
        return latents.flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, C, H, W)."""
        return tokens.transpose(1, 2).reshape(len(tokens), self.token_dim, self.grid_size, self.grid_size)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of any shape -> indices int64 and dequantized values float32 of that shape; NaN stays NaN."""
        indices = quantizer.quantize(x, self.reconstruction_values, self.quant_min, self.quant_max)
        return indices, quantizer.keep_nan(self.dequantize(indices), x)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Indices of any shape -> float32 latent values."""
        return quantizer.dequantize(indices, self.reconstruction_values, self.quant_min, self.quant_max)

    # ---- backbone

    def _run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        full = self.grad_checkpointing == "full" and self.training and torch.is_grad_enabled()
        for block in blocks:
            x = recomputed(block, x) if full else block(x)
        return x

    def encoder_inputs(self, values: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        """S buffer slots, then the visible tokens (B, S+V, D); arguments as of `run_encoder`."""
        s = self.buffer_size
        position = self.encoder_pos_embed_learned[0]  # (S+L, D)
        buffer = class_embedding.unsqueeze(1) + position[:s]  # (B, S, D)
        x = self.z_proj(values) + F.embedding(visible, position[s:])  # (B, V, D)
        return self.z_proj_ln(torch.cat([buffer, x], dim=1))

    def decoder_inputs(self, x: Tensor, visible: Tensor) -> Tensor:
        """S buffer slots, then the whole grid with `mask_token` at masked positions (B, S+L, D).

        x (B, S+V, D) from `decoder_embed`, visible (B, V).
        """
        s = self.buffer_size
        masked = self.mask_token.to(x.dtype).expand(len(x), self.num_tokens, x.shape[-1])
        grid = masked.scatter(1, visible.unsqueeze(-1).expand_as(x[:, s:]), x[:, s:])  # (B, L, D)
        return torch.cat([x[:, :s], grid], dim=1) + self.decoder_pos_embed_learned

    def decoder_outputs(self, x: Tensor, targets: Tensor) -> Tensor:
        """z (B, M, D) from the last block's output x (B, M, D) for the tokens at grid positions targets (B, M)."""
        return self.decoder_norm(x) + F.embedding(targets, self.output_pos_embed[0])

    def run_encoder(self, values: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        """Encoder over S buffer slots and the visible tokens only (docs/spec.md 4.2): (B, S+V, D).

        values (B, V, C) dequantized, visible (B, V) their grid positions, class_embedding (B, D).
        """
        x = self.encoder_inputs(values, visible, class_embedding)  # (B, S+V, D)
        return self.encoder_norm(self._run_blocks(self.encoder_blocks, x))

    def run_decoder(self, x: Tensor, visible: Tensor, targets: Tensor | None = None) -> Tensor:
        """Decoder over the whole grid with `mask_token` at masked positions (docs/spec.md 4.3): z (B, M or L, D).

        x (B, S+V, D) from `run_encoder`, visible (B, V); targets (B, M): grid positions whose z is needed, all when
        None.
        """
        s = self.buffer_size
        x = self.decoder_inputs(self.decoder_embed(x), visible)  # (B, S+L, D)
        if targets is None:
            return self.decoder_norm(self._run_blocks(self.decoder_blocks, x)[:, s:]) + self.output_pos_embed
        x = self._run_blocks(self.decoder_blocks[:-1], x)  # (B, S+L, D)
        x = partial_block(self.decoder_blocks[-1], x, targets + s)  # (B, M, D): no other token needs the last block
        return self.decoder_outputs(x, targets)

    # ---- training

    def forward(
        self,
        latents: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        return_details: bool = False,
        *,
        num_masked: int | None = None,
        label_drop: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_metrics: bool = False,
    ) -> Tensor | TrainingDetails | tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy over all (masked token, dimension) pairs, a float32 scalar (docs/spec.md 4, 5).

        latents (B, C, H, W), scaled; labels (B,) in [0, class_num). mask (B, L), any dtype, nonzero = masked, the same
        count in every row, drawn when None. num_masked: that count; given with `mask` it is trusted, which spares a
        host sync. label_drop (B,) bool: images that lose their class, drawn in training when None. generator: on the
        latents' device, for those draws. return_metrics: (loss, loss of each dimension (C,), accuracy of each (C,))
        instead, in head order, the last two without a gradient.
        """
        check_labels(labels, len(latents), self.class_num)
        indices, values = self.quantize(self.patchify(latents))  # (B, L, C) both
        if mask is None:
            if num_masked is None:
                ratio = draw_mask_ratio(self.mask_ratio_min, cpu_uniform(generator))
                num_masked = num_masked_tokens(ratio, self.num_tokens)
            mask = mask_from_orders(random_orders(len(latents), self.num_tokens, generator, latents.device), num_masked)
        elif tuple(mask.shape) != (len(latents), self.num_tokens):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(len(latents), self.num_tokens)}")
        mask, num_masked = check_mask(mask, len(latents), self.num_tokens, num_masked)
        by_mask = mask.to(torch.uint8).argsort(dim=1, stable=True)  # visible first, each part in grid order
        visible, masked = by_mask.split([self.num_tokens - num_masked, num_masked], dim=1)  # (B, V), (B, M)
        class_embedding = self._training_classes(labels, label_drop, generator)  # (B, D)
        z = self.run_decoder(self.run_encoder(take(values, visible), visible, class_embedding), visible)  # (B, L, D)
        targets = take(indices, masked).flatten(0, 1)[:, self.to_head_order]  # (B*M, C)
        z_masked = take(z, masked).flatten(0, 1)  # (B*M, D)
        logits = self.channel_logits(z_masked, targets) if return_details else None  # (B*M, C, K)
        loss, metrics = self.channel_loss(z_masked, targets, logits)
        loss = loss + 0 * latents.float().mean()  # NaN latents would quantize to a level; show them
        if return_metrics:
            return loss, *metrics
        return TrainingDetails(loss, indices, z, logits) if return_details else loss

    def _training_classes(self, labels: Tensor, label_drop: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Class embeddings (B, D) with `fake_latent` for dropped labels (docs/spec.md 4.4)."""
        if label_drop is None and self.training and self.label_drop_prob > 0:
            device = self.fake_latent.device
            label_drop = torch.rand(len(labels), generator=generator, device=device) < self.label_drop_prob
        embeddings = self.class_emb(labels)  # (B, D)
        if label_drop is None:
            return embeddings
        return torch.where(label_drop.unsqueeze(1), self.fake_latent.to(embeddings.dtype), embeddings)

    # ---- sampling

    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | Sequence[int] | None = None,
        temperature: float = 1.0,
        orders: Tensor | None = None,
        *,
        on_step: Callable[[int, int], None] | None = None,
        **more: object,
    ) -> Tensor:
        """Generate `bsz` images' latents (B, C, H, W), still scaled, in `num_iter` steps (docs/spec.md 6).

        labels: (B,) classes, or None to condition on `fake_latent`. orders: (B, L), each row a permutation, unmasked
        from its end; random when None. on_step(step, num_iter) is called after each step. more: what `sample_steps`
        takes. Latents of an image whose logits were not finite are NaN. Dropout is off. The loop has no host sync.
        """
        options = dict(num_iter=num_iter, cfg=cfg, cfg_schedule=cfg_schedule, temperature=temperature) | more
        with closing(self.sample_steps(bsz, labels=labels, orders=orders, **options)) as states:
            for state in states:
                if on_step is not None:
                    on_step(state.step, state.num_iter)
        return state.latents

    def sample_steps(
        self,
        bsz: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        class_embedding: Tensor | None = None,
        orders: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        init: Tensor | None = None,
        regenerate: Tensor | None = None,
        **options: object,
    ) -> Iterator[SamplerState]:
        """As `sample_tokens`, but yields a SamplerState after every step; closing the iterator stops.

        class_embedding (B, D) instead of labels: see `class_embeddings`. seeds: one per image; its order and draws
        depend on nothing else, whatever the batch. Without seeds they come from `generator` (CPU) or torch's global
        one. init, regenerate: editing, see models/sampling/loop.py; options: the fields of SamplerOptions.
        """
        settings = SamplerOptions(**options)
        settings.check(self.token_dim)
        if class_embedding is None:
            class_embedding = self.fake_latent.detach().expand(bsz, -1)  # (B, D)
            if labels is not None:
                labels = torch.as_tensor(labels, dtype=torch.long)
                check_labels(labels, bsz, self.class_num)
                class_embedding = self.class_emb.weight.detach()[labels.to(self.mask_token.device)]
        inputs = dict(orders=orders, seeds=seeds, generator=generator, init=init, regenerate=regenerate)
        return sample_steps(self, class_embedding, settings, **inputs)

    def class_embeddings(self, classes: Sequence[int | None | Mapping[int, float]]) -> Tensor:
        """(B, D): of a class number, of no class (None), or of a mixture {class: weight, ...}, the weighted sum.

        ArgumentError for a class that the model does not have.
        """
        rows, table = [], self.class_emb.weight.detach()  # (classes, D)
        for entry in classes:
            parts = entry if isinstance(entry, Mapping) else {} if entry is None else {entry: 1.0}
            known = all(int(c) == c and 0 <= c < self.class_num for c in parts)
            finite = all(math.isfinite(weight) for weight in parts.values())
            if not known or not finite or (entry is not None and not parts):
                message = f"classes: {entry} does not fit the model's classes, 0 to {self.class_num - 1}"
                raise ArgumentError("classes", message)
            rows.append(sum(w * table[int(c)] for c, w in parts.items()) if parts else self.fake_latent.detach()[0])
        return torch.stack(rows)


def check_labels(labels: Tensor, batch: int, class_num: int) -> None:
    """ValueError unless labels is (B,) in [0, class_num). Values are checked on the CPU only: a host sync elsewhere."""
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {(batch,)}")
    if not batch or type(labels) is not Tensor or labels.device.type != "cpu":
        return
    lowest, highest = int(labels.min()), int(labels.max())
    if not 0 <= lowest <= highest < class_num:
        raise ValueError(f"labels must be in [0, {class_num}) (class_num), got {lowest} to {highest}")
