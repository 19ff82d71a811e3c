"""How much a training step computes, and how much the device could: for TFLOP/s and MFU (model FLOPs utilization).

Closed formulas of docs/spec.md 4 and 5, a multiply-add being two FLOPs; tests compare them with torch's counter.
Norms, activations and everything else that is no matrix product are left out, as is usual for MFU; so is what
checkpointing computes a second time.
"""

from statistics import NormalDist

from models.config import TokenBridgeConfig
from models.tokenbridge import num_masked_tokens

IMAGENET = 1_281_167  # training images

# Dense peak, TFLOP/s, from the makers' data sheets: (half precision with float32 sums, float32 as TF32 where the device
# has it).
# The first name that is part of the device's own name counts, so the special ones come first.
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 1125),
    "H200": (989, 495),
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 418),
    "GH200": (989, 495),
    "H100": (989, 495),
    "A100": (312, 156),
    "A800": (312, 156),
    "A40": (150, 75),
    "A30": (165, 82),
    "A10G": (70, 35),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L40": (181, 90.5),
    "L4": (121, 60),
    "RTX 6000 Ada": (364, 182),
    "RTX A6000": (155, 77.4),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """The device's dense peak at this precision, TFLOP/s; None if it is not in the table (give --peak_tflops)."""
    for name, (half, single) in PEAKS.items():
        if name in device_name:
            return single if precision == "fp32" else half
    return None


def mean_mask_ratio(mask_ratio_min: float) -> float:
    """Expected mask ratio of a training step: mean of a normal (loc 1, scale 0.25) truncated to [mask_ratio_min, 1]."""
    normal, lowest = NormalDist(), (mask_ratio_min - 1) / 0.25
    return 1 - 0.25 * (normal.pdf(0) - normal.pdf(lowest)) / (normal.cdf(0) - normal.cdf(lowest))


def mean_masked(config: TokenBridgeConfig) -> int:
    """Number of masked tokens at the expected mask ratio."""
    return num_masked_tokens(mean_mask_ratio(config.mask_ratio_min), config.num_tokens)


def block_flops(tokens: int, width: int, mlp_ratio: float) -> float:
    """Forward FLOPs of one transformer block: projections and MLP, then scores and their weighted sum."""
    return 2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width


def head_flops(config: TokenBridgeConfig) -> float:
    """FLOPs of the head for one token: all of its dimensions."""
    c, head, dims = config, config.channel_embed_dim, config.vae_embed_dim
    # adaLN, then attention over the dimensions, and MLP
    layer = 2 * dims * 6 * head**2 + block_flops(dims, head, c.mlp_ratio)
    ends = 2 * c.decoder_embed_dim * head + 2 * dims * 2 * head**2 + 2 * dims * head * c.quant_levels
    return ends + c.channel_depth * layer


def forward_flops(config: TokenBridgeConfig, num_masked: int) -> float:
    """FLOPs of one image's forward pass with `num_masked` of its tokens hidden."""
    c = config
    tokens = c.num_tokens
    visible, slots, dims, ratio = tokens - num_masked, c.buffer_size, c.vae_embed_dim, c.mlp_ratio
    wide, deep = c.encoder_embed_dim, c.decoder_embed_dim
    seen = slots + visible
    encoder = 2 * visible * dims * wide + c.encoder_depth * block_flops(seen, wide, ratio)
    decoder = 2 * seen * wide * deep + c.decoder_depth * block_flops(slots + tokens, deep, ratio)
    return encoder + decoder + num_masked * head_flops(c)


def step_flops(config: TokenBridgeConfig, num_masked: int) -> float:
    """FLOPs of one image's training step: forward, and twice that backward."""
    return 3 * forward_flops(config, num_masked)
