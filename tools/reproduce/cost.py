"""What a stage costs: FLOPs by closed formulas, and bytes on the disk.

Letters: L tokens, S buffer slots, V visible tokens, M tokens predicted at a step.
"""

import functools
from dataclasses import dataclass

import torch

from models.config import TokenBridgeConfig
from models.sampling.schedules import unmasking_plan
from models.vae import AutoencoderKL
from tools.bench.counting import count, fake_mode
from training.flops import block_flops, head_flops

INCEPTION_FLOPS = 11.4e9  # of one image at 299 x 299: 5.7 G multiply-adds
# Bytes of a download; of a checkpoint at most: weights, EMA and both of AdamW's averages in float32.
DOWNLOAD_BYTES = {"vae": 0.3e9, "large": 16 * 487e6, "huge": 16 * 911e6, "stats": 4e7, "adm_batch": 2.1e9}
DOWNLOAD_BYTES["inception"] = 1e8


@dataclass(frozen=True)
class Work:
    """FLOPs of a stage in half precision (transformer) and in float32 (VAE, Inception), and bytes that it writes."""

    half: float = 0.0
    single: float = 0.0
    written: float = 0.0

    def seconds(self, half_rate: float, single_rate: float) -> float:
        """At these rates, FLOP/s of all devices together."""
        return self.half / half_rate + self.single / single_rate


def sampling_flops(config: TokenBridgeConfig, num_iter: int, guided: bool = True) -> float:
    """FLOPs of one image: the published schedule, both passes of the guidance, the last block for M tokens only.

    The first step's unconditional pass is one row for the whole batch and is left out.
    """
    c, total = config, 0.0
    slots, wide, deep, ratio = c.buffer_size, c.encoder_embed_dim, c.decoder_embed_dim, c.mlp_ratio
    everything = slots + c.num_tokens
    for before, after, _ in unmasking_plan(num_iter, c.num_tokens):
        visible, predicted = c.num_tokens - before, before - after
        if not predicted:
            continue
        seen = slots + visible
        encoder = 2 * visible * c.vae_embed_dim * wide + c.encoder_depth * block_flops(seen, wide, ratio)
        last = 4 * everything * deep**2 + predicted * (2 * deep**2 * (2 + 2 * ratio) + 4 * everything * deep)
        decoder = 2 * seen * wide * deep + (c.decoder_depth - 1) * block_flops(everything, deep, ratio) + last
        total += (encoder + decoder) * (2 if guided and visible else 1) + predicted * head_flops(c)
    return total


@functools.cache
def vae_flops(img_size: int = 256, **shape: object) -> tuple[float, float]:
    """FLOPs of the encoder and the decoder for one image, counted on fake tensors. shape: of AutoencoderKL."""
    with fake_mode(), torch.no_grad():
        vae = AutoencoderKL(**shape)
        image = torch.zeros(1, 3, img_size, img_size)
        latent = torch.zeros(1, vae.embed_dim, img_size // vae.stride, img_size // vae.stride)
        return count(lambda: vae.encode(image)).flops, count(lambda: vae.decode(latent)).flops
