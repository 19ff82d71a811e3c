"""TokenBridge (SPEC 4, 6): a masked autoregressive transformer over quantized VAE latents, with a per-dimension head.

Training: a random 70-100 % of an image's tokens is hidden; encoder sees the rest, decoder returns a vector z for each hidden
token, the head (channel_ar.py) turns z into C categorical distributions. Sampling: hide everything, then reveal in N steps.

Letters: B batch, C latent channels (dimensions of a token), H and W latent grid, L = H*W tokens, K levels, D width, S buffer
slots, M tokens masked, V = L - M visible.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.special import ndtr, ndtri
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from generation import library as generation
from models import quantizer
from models.channel_ar import ChannelAR
from models.layers import LAYER_NORM_EPS, masked_block, take, wanted_block
from models.sampling.loop import CFG_SCHEDULES as CFG_SCHEDULES
from models.sampling.loop import SamplerOptions, SamplerState, random_orders, sample_steps
from models.sampling.loop import cosine_keep as cosine_keep
from models.sampling.loop import guidance_scale as guidance_scale
from models.sampling.loop import unmasking_plan as unmasking_plan
from models.vae import KL16_CHANNEL_ORDER, AutoencoderKL

logger = logging.getLogger("tokenbridge")

# ----------------------------------------------------------------------------------------------- masking in training


def draw_mask_ratio(mask_ratio_min: float, uniform: float) -> float:
    """Mask ratio in [mask_ratio_min, 1] from a number in [0, 1]: a normal (loc 1, scale 0.25) truncated to that interval (SPEC 4.5)."""
    loc, scale = 1.0, 0.25
    lowest, highest = ndtr((mask_ratio_min - loc) / scale), ndtr((1 - loc) / scale)
    return float(np.clip(loc + scale * ndtri(lowest + uniform * (highest - lowest)), mask_ratio_min, 1.0))


def cpu_uniform(generator: torch.Generator | None = None) -> float:
    """One number in [0, 1) for a decision of the host, from a CPU generator (torch's own when another or none is given).

    Traced with fake tensors there is no number; 0.5, the median, stands in.
    """
    uniform = torch.rand(
        1, generator=generator if generator is not None and generator.device.type == "cpu" else None, device="cpu"
    )
    return 0.5 if isinstance(uniform, FakeTensor) else float(uniform.numpy()[0])


def num_masked_tokens(mask_ratio: float, num_tokens: int) -> int:
    """ceil(L * ratio) (SPEC 4.5)."""
    return math.ceil(num_tokens * mask_ratio)


def mask_from_orders(orders: Tensor, num_masked: int) -> Tensor:
    """Mask (B, L), True where hidden: the first `num_masked` tokens of each order (SPEC 4.5)."""
    return torch.zeros_like(orders, dtype=torch.bool).scatter_(1, orders[:, :num_masked], True)


@dataclass
class TrainingDetails:
    """What `TokenBridge.forward(..., return_details=True)` returns."""

    loss: Tensor  # scalar, float32
    tokens: Tensor  # (B, L, C) indices, natural dimension order
    z: Tensor  # (B, L, D)
    # (B*M, C, K), masked tokens batch-major in grid order; logits[:, c] predicts dimension channel_order[c]
    logits: Tensor


class TokenBridge(ChannelAR):
    """The whole model; constructor arguments and state-dict keys are those of SPEC 11 (sizes default to large).

    quant_levels: K, a power of two from 2 to 4096. channel_order: latent dimensions in the head's order, KL-16's for 16
    channels, otherwise identity unless given. head_start: what the *sampler* feeds the head first (SPEC 5). head: "parallel" for
    the ablation that predicts a token's dimensions at once. ValueError on arguments that do not fit together, naming the flag.
    """

    def __init__(
        self,
        *,
        img_size: int = 256,
        vae_stride: int = 16,
        patch_size: int = 1,
        encoder_embed_dim: int = 1024,
        encoder_depth: int = 16,
        encoder_num_heads: int = 16,
        decoder_embed_dim: int = 1024,
        decoder_depth: int = 16,
        decoder_num_heads: int = 16,
        channel_embed_dim: int = 1024,
        channel_depth: int = 4,
        channel_heads: int = 8,
        mlp_ratio: float = 4.0,
        quant_levels: int = 64,
        vae_embed_dim: int = 16,
        mask_ratio_min: float = 0.7,
        label_drop_prob: float = 0.1,
        class_num: int = 1000,
        attn_dropout: float = 0.1,
        proj_dropout: float = 0.1,
        buffer_size: int = 64,
        grad_checkpointing: bool = False,
        quant_min: float = -5.0,
        quant_max: float = 5.0,
        channel_order: Sequence[int] | None = None,
        head_start: str = "trained",
        head: str = "autoregressive",
    ):
        config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        if patch_size != 1:
            raise ValueError(
                f"patch_size {patch_size} (--patch_size): the per-dimension head is defined for one latent position per token, "
                "so only patch_size 1 is possible"
            )
        if img_size < 1 or img_size % (vae_stride * patch_size):
            raise ValueError(
                f"img_size {img_size} (--img_size) is not a multiple of vae_stride x patch_size = {vae_stride * patch_size}"
            )
        if quant_levels < 2 or quant_levels > 4096 or quant_levels & (quant_levels - 1):
            raise ValueError(
                f"quant_levels must be a power of two from 2 to 4096 (--quant_bits 1 to 12), got {quant_levels}"
            )
        if not 0 < mask_ratio_min <= 1:
            raise ValueError(f"mask_ratio_min must be in (0, 1] (--mask_ratio_min), got {mask_ratio_min}")
        for name, value in dict(
            label_drop_prob=label_drop_prob, attn_dropout=attn_dropout, proj_dropout=proj_dropout
        ).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability (--{name}), got {value}")
        if class_num < 1 or buffer_size < 1:
            raise ValueError(
                f"class_num (--class_num) and buffer_size (--buffer_size) must be at least 1, got {class_num} and {buffer_size}"
            )
        for part, dim, heads, depth in (
            ("encoder", encoder_embed_dim, encoder_num_heads, encoder_depth),
            ("decoder", decoder_embed_dim, decoder_num_heads, decoder_depth),
        ):
            if depth < 1:
                raise ValueError(f"{part}_depth must be at least 1, got {depth}")
            if dim % heads:
                raise ValueError(f"{part}_embed_dim {dim} is not a multiple of {part}_num_heads {heads}")
        quantizer.check_range(quant_min, quant_max)
        if channel_order is None:
            channel_order = KL16_CHANNEL_ORDER if vae_embed_dim == 16 else tuple(range(vae_embed_dim))
            if vae_embed_dim != 16:
                logger.info(
                    "no channel_order given for %d latent channels: dimensions are predicted in their natural order",
                    vae_embed_dim,
                )
        self.config = config | {"channel_order": [int(c) for c in channel_order]}
        self.grid_size = img_size // (vae_stride * patch_size)
        self.num_tokens, self.token_dim = self.grid_size**2, vae_embed_dim
        self.buffer_size, self.class_num = buffer_size, class_num
        self.mask_ratio_min, self.label_drop_prob = mask_ratio_min, label_drop_prob
        self.quant_min, self.quant_max = quant_min, quant_max
        self.grad_checkpointing = grad_checkpointing

        # The order of registration is that of the published checkpoints: optimizer states refer to parameters by position.
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).normal_(std=0.02))

        self.fake_latent = parameter(1, encoder_embed_dim)  # class embedding of "no class"
        self.encoder_pos_embed_learned = parameter(1, buffer_size + self.num_tokens, encoder_embed_dim)
        self.mask_token = parameter(1, 1, decoder_embed_dim)
        self.decoder_pos_embed_learned = parameter(1, buffer_size + self.num_tokens, decoder_embed_dim)
        self.output_pos_embed = parameter(1, self.num_tokens, decoder_embed_dim)
        self.channel_embed = parameter(1, vae_embed_dim, channel_embed_dim)
        self.timesteps_embeddings = parameter(1, vae_embed_dim, channel_embed_dim)
        self.register_buffer("channel_mask", torch.full((vae_embed_dim, vae_embed_dim), float("-inf")).triu(1))
        tables = quantizer.GaussianQuantizer(quant_levels.bit_length() - 1, quant_min, quant_max)
        self.register_buffer("reconstruction_values", tables.reconstruction_values)
        self.register_buffer("boundaries", tables.boundaries)
        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.z_proj = nn.Linear(vae_embed_dim, encoder_embed_dim)
        norm = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        block = partial(
            Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm, attn_drop=attn_dropout, proj_drop=proj_dropout
        )
        self.z_proj_ln = norm(encoder_embed_dim)
        self.encoder_blocks = nn.ModuleList(block(encoder_embed_dim, encoder_num_heads) for _ in range(encoder_depth))
        self.encoder_norm = norm(encoder_embed_dim)
        self.decoder_embed = nn.Linear(encoder_embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        self.decoder_norm = norm(decoder_embed_dim)
        self.build_channel_head(
            condition_dim=decoder_embed_dim,
            dim=channel_embed_dim,
            depth=channel_depth,
            num_heads=channel_heads,
            mlp_ratio=mlp_ratio,
            num_channels=vae_embed_dim,
            num_levels=quant_levels,
            channel_order=channel_order,
            head_start=head_start,
            grad_checkpointing=grad_checkpointing,
            attn_dropout=attn_dropout,
            proj_dropout=proj_dropout,
            head=head,
        )
        self._initialize()

    def _initialize(self) -> None:
        """Linear xavier-uniform with zero bias; class_emb N(0, 0.02); adaLN's last Linear zero (SPEC 5). The rest has its final value."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.zero_channel_modulation()

    # ------------------------------------------------------------------------------------------------------- tokens

    def patchify(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, C), row-major. ValueError if the latents are not of this model's size."""
        expected = (self.token_dim, self.grid_size, self.grid_size)
        if tuple(latents.shape[1:]) != expected:
            raise ValueError(
                f"latents of shape {tuple(latents.shape[1:])} do not fit the model, which takes {expected} (--img_size, --vae_embed_dim)"
            )
        return latents.flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, L, C) -> (B, C, H, W)."""
        return tokens.transpose(1, 2).reshape(len(tokens), self.token_dim, self.grid_size, self.grid_size)

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Elementwise: latents of any shape -> (indices int64, dequantized values float32), both of that shape; the value of NaN is NaN."""
        indices = quantizer.quantize(x, self.reconstruction_values, self.quant_min, self.quant_max)
        return indices, quantizer.keep_nan(self.dequantize(indices), x)

    def dequantize(self, indices: Tensor) -> Tensor:
        """Indices of any shape -> float32 latent values."""
        return quantizer.dequantize(indices, self.reconstruction_values, self.quant_min, self.quant_max)

    # ------------------------------------------------------------------------------------------------------- backbone

    def _run_blocks(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x

    def encoder_inputs(self, values: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        """S buffer slots, then the visible tokens (B, S+V, D); arguments as of `encode`."""
        s = self.buffer_size
        position = self.encoder_pos_embed_learned[0]  # (S+L, D)
        buffer = class_embedding.unsqueeze(1) + position[:s]  # (B, S, D)
        x = self.z_proj(values) + F.embedding(visible, position[s:])  # (B, V, D)
        return self.z_proj_ln(torch.cat([buffer, x], dim=1))

    def decoder_inputs(self, x: Tensor, visible: Tensor) -> Tensor:
        """S buffer slots, then the whole grid with `mask_token` at hidden positions (B, S+L, D), from `decoder_embed`'s x (B, S+V, D); visible (B, V)."""
        s = self.buffer_size
        hidden = self.mask_token.to(x.dtype).expand(len(x), self.num_tokens, x.shape[-1])
        grid = hidden.scatter(1, visible.unsqueeze(-1).expand_as(x[:, s:]), x[:, s:])  # (B, L, D)
        return torch.cat([x[:, :s], grid], dim=1) + self.decoder_pos_embed_learned

    def decoder_outputs(self, x: Tensor, wanted: Tensor) -> Tensor:
        """z (B, M, D) from what the last block made of the tokens (B, M, D) at grid positions wanted (B, M)."""
        return self.decoder_norm(x) + F.embedding(wanted, self.output_pos_embed[0])

    def encode(self, values: Tensor, visible: Tensor, class_embedding: Tensor, seen: Tensor | None = None) -> Tensor:
        """Encoder over S buffer slots and the visible tokens only (SPEC 4.2).

        values (B, V, C) dequantized, visible (B, V) their grid positions, class_embedding (B, D) -> (B, S+V, D).
        """
        x = self.encoder_inputs(values, visible, class_embedding)  # (B, S+V, D)
        if seen is None:
            return self.encoder_norm(self._run_blocks(self.encoder_blocks, x))
        for block in self.encoder_blocks:
            x = masked_block(block, x, seen)
        return self.encoder_norm(x)

    def decode(self, x: Tensor, visible: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Decoder over the whole grid with `mask_token` at hidden positions (SPEC 4.3).

        x (B, S+V, D) from `encode`, visible (B, V); wanted (B, M): grid positions whose z is needed, all when None -> z (B, M or L, D).
        """
        s = self.buffer_size
        x = self.decoder_inputs(self.decoder_embed(x), visible)  # (B, S+L, D)
        if wanted is None:
            return self.decoder_norm(self._run_blocks(self.decoder_blocks, x)[:, s:]) + self.output_pos_embed
        x = self._run_blocks(self.decoder_blocks[:-1], x)  # (B, S+L, D)
        x = wanted_block(self.decoder_blocks[-1], x, wanted + s)  # (B, M, D), no other token needs the last block
        return self.decoder_outputs(x, wanted)

    # ------------------------------------------------------------------------------------------------------- training

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
        """Mean cross-entropy over all (masked token, dimension) pairs, a float32 scalar (SPEC 4, 5).

        latents (B, C, H, W), scaled; labels (B,) in [0, class_num). mask (B, L), any dtype, nonzero = masked, the same count in every
        row, drawn when None. num_masked: that count; given with `mask` it is trusted, which spares a host sync. label_drop (B,)
        bool: images that lose their class, drawn in training when None. generator: on the latents' device, for those draws.
        return_metrics: (loss, loss of each dimension (C,), share of right predictions of each (C,)) instead, in head order, the last two
        without a gradient.
        """
        batch, device = len(latents), latents.device
        check_labels(labels, batch, self.class_num)
        indices, values = self.quantize(self.patchify(latents))  # (B, L, C) both
        if mask is None:
            if num_masked is None:
                num_masked = num_masked_tokens(
                    draw_mask_ratio(self.mask_ratio_min, cpu_uniform(generator)), self.num_tokens
                )
            mask = mask_from_orders(random_orders(batch, self.num_tokens, generator, device), num_masked)
        mask, num_masked = self._check_mask(mask, batch, num_masked)
        by_mask = mask.to(torch.uint8).argsort(dim=1, stable=True)  # visible first, each part in grid order
        visible, hidden = by_mask.split([self.num_tokens - num_masked, num_masked], dim=1)  # (B, V), (B, M)

        if label_drop is None and self.training and self.label_drop_prob > 0:
            label_drop = torch.rand(batch, generator=generator, device=device) < self.label_drop_prob
        class_embedding = self.class_emb(labels)  # (B, D)
        if label_drop is not None:
            class_embedding = torch.where(
                label_drop.unsqueeze(1), self.fake_latent.to(class_embedding.dtype), class_embedding
            )

        z = self.decode(self.encode(take(values, visible), visible, class_embedding), visible)  # (B, L, D)
        targets = take(indices, hidden).flatten(0, 1)[:, self.to_head_order]  # (B*M, C)
        logits = self.channel_logits(take(z, hidden).flatten(0, 1), targets)  # (B*M, C, K)
        by_dimension = logits.transpose(0, 1)  # (C, B*M, K), as the head made them
        losses = (
            F.cross_entropy(by_dimension.flatten(0, 1).float(), targets.T.flatten(), reduction="none")
            .view(self.token_dim, -1)
            .mean(1)
        )
        loss = losses.mean() + 0 * latents.float().mean()  # NaN latents would quantize to a level; show them
        if return_metrics:
            return loss, losses.detach(), (by_dimension.detach().argmax(-1) == targets.T).float().mean(1)
        return TrainingDetails(loss, indices, z, logits) if return_details else loss

    def _check_mask(self, mask: Tensor, batch: int, num_masked: int | None) -> tuple[Tensor, int]:
        if tuple(mask.shape) != (batch, self.num_tokens):
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {(batch, self.num_tokens)}")
        mask = mask != 0
        if num_masked is None and isinstance(mask, FakeTensor):  # has no numbers: trace the median ratio's shapes
            num_masked = num_masked_tokens(draw_mask_ratio(self.mask_ratio_min, 0.5), self.num_tokens)
        if num_masked is None:
            counts = mask.sum(1).tolist()
            if len(set(counts)) != 1 or counts[0] == 0:
                raise ValueError(
                    f"mask must hide the same number of tokens, at least one, in every row; it hides {counts}"
                )
            num_masked = counts[0]
        return mask, num_masked

    # ------------------------------------------------------------------------------------------------------- sampling

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
        """Generate `bsz` images' latents (B, C, H, W), still scaled, in `num_iter` steps (SPEC 6).

        labels: (B,) classes, or None to condition on `fake_latent`. orders: (B, L), each row a permutation, unmasked from its end; random
        when None. on_step(step, num_iter) is called after each step. more: what `sample_steps` takes. Latents of an image whose logits were
        not finite are NaN, never a plausible picture. Dropout is off. Nothing in the loop waits for the device.
        """
        for state in self.sample_steps(
            bsz,
            labels=labels,
            orders=orders,
            num_iter=num_iter,
            cfg=cfg,
            cfg_schedule=cfg_schedule,
            temperature=temperature,
            **more,
        ):
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

        class_embedding (B, D) instead of labels: see `class_embeddings`. seeds: one per image; its order and draws depend on nothing else,
        whatever the batch. Without seeds they come from `generator` (CPU) or torch's global one. init, regenerate: editing, see
        models/sampling/loop.py; options: the fields of SamplerOptions.
        """
        settings, device = SamplerOptions(**options), self.mask_token.device
        settings.check(self.token_dim)
        if class_embedding is None:
            class_embedding = self.fake_latent.detach().expand(bsz, -1)  # (B, D)
            if labels is not None:
                labels = torch.as_tensor(labels, dtype=torch.long)
                check_labels(labels, bsz, self.class_num)
                class_embedding = self.class_emb.weight.detach()[labels.to(device)]
        return sample_steps(
            self,
            class_embedding,
            settings,
            orders=orders,
            seeds=seeds,
            generator=generator,
            init=init,
            regenerate=regenerate,
        )

    def class_embeddings(self, classes: Sequence[int | None | Mapping[int, float]]) -> Tensor:
        """(B, D): of a class number, of no class (None), or of a mixture {class: weight, ...}, the weighted sum of its embeddings.

        ValueError for a class that the model does not have.
        """
        rows, table = [], self.class_emb.weight.detach()  # (classes, D)
        for entry in classes:
            parts = entry if isinstance(entry, Mapping) else {} if entry is None else {entry: 1.0}
            wrong = [c for c in parts if int(c) != c or not 0 <= c < self.class_num]
            if wrong or isinstance(entry, Mapping) and not (parts and all(math.isfinite(w) for w in parts.values())):
                raise ValueError(
                    f"classes (--classes): {entry} does not fit the model's classes, 0 to {self.class_num - 1}"
                )
            rows.append(sum(w * table[int(c)] for c, w in parts.items()) if parts else self.fake_latent.detach()[0])
        return torch.stack(rows)

    def generate(self, vae: AutoencoderKL, classes: generation.Classes, **options: object) -> list[Image.Image]:
        """PIL images of classes: `model.generate(vae, [207, 360], cfg=3.0, num_iter=64, seed=0)`; see generation/library.py for all options."""
        return generation.generate(self, vae, classes, **options)

    def generate_steps(
        self, vae: AutoencoderKL, classes: generation.Classes, **options: object
    ) -> Iterator[generation.GenerationStep]:
        """As `generate` for one batch, yielding after every step what is known so far (`step.images()`)."""
        return generation.generate_steps(self, vae, classes, **options)

    def _guided_z(
        self, values: Tensor, visible: Tensor, wanted: Tensor, class_embedding: Tensor, scale: float
    ) -> Tensor:
        """z (B, M, D) of the wanted tokens; with guidance both halves run as one batch: z_u + s * (z_c - z_u)."""

        def z_of(rows: Tensor, values: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
            return self.decode(self.encode(values, visible, rows), visible, wanted)

        if scale == 1:
            return z_of(class_embedding, values, visible, wanted)
        if visible.shape[1] == 0 and len(wanted) > 1:  # without a class all images are still the same one
            conditional = z_of(class_embedding, values, visible, wanted)
            unconditional = z_of(self.fake_latent, values[:1], visible[:1], wanted.reshape(1, -1)).view_as(conditional)
        else:
            class_embedding = torch.cat([class_embedding, self.fake_latent.expand_as(class_embedding)])  # (2B, D)
            values, visible, wanted = (torch.cat([x, x]) for x in (values, visible, wanted))
            conditional, unconditional = z_of(class_embedding, values, visible, wanted).chunk(2)
        return unconditional + scale * (conditional - unconditional)


def check_labels(labels: Tensor, batch: int, class_num: int) -> None:
    """ValueError unless labels is (B,) in [0, class_num). Values are checked on CPU tensors only: elsewhere it would cost a host sync."""
    if tuple(labels.shape) != (batch,):
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {(batch,)}")
    if (
        type(labels) is Tensor
        and labels.device.type == "cpu"
        and batch
        and not 0 <= int(labels.min()) <= int(labels.max()) < class_num
    ):
        raise ValueError(
            f"labels must be in [0, {class_num}) (class_num), got {int(labels.min())} to {int(labels.max())}"
        )
