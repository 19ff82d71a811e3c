"""KL autoencoder (docs/spec.md 2). With its defaults it is KL-16: 256x256 images <-> 16 channels at stride 16.

Letters: B batch, C latent channels, H and W image height and width, h = H/stride, w = W/stride.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from models.latent_space import KL16, LARGEST_SIZE, DiagonalGaussian, LatentSpace, VaeDescription
from util.checkpoint import load_state, plain_keys, read_file
from util.json_reader import conforms
from util.options import ArgumentError

logger = logging.getLogger("tokenbridge")

ROOT_KEY = "encoder.conv_in.weight"  # a state dict without a dict around it is recognised by this key
OF_DIFFUSERS = "encoder.mid_block.resnets.0.conv1.weight"
LDM = "first_stage_model."  # before the VAE's keys in a whole checkpoint of latent diffusion
# Larger sizes are a damaged file's, or a slip: KL-16 has 128, 2, 32, 16 and 4, at 5 levels.
LARGEST = {"ch": 8192, "num_res_blocks": 64, "norm_groups": 8192, "embed_dim": LARGEST_SIZE, "ch_mult": 64}
MOST_LEVELS = 12
THE_VAE = "the VAE (vae_embed_dim, or the sizes in the file's config)"


class ResidualBlock(nn.Module):
    """norm-swish-conv3x3 twice, with a 1x1 shortcut where the widths differ: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class SpatialAttention(nn.Module):
    """Single-head self-attention over all positions, residual; 1x1 convolutions, scale 1/sqrt(channels)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch, H, W) -> the same shape."""
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, ch), one head
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Stride-2 3x3 convolution, padded on the right and bottom only: (B, ch, H, W) -> (B, ch, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch, H, W) -> (B, ch, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest 2x, then a 3x3 convolution: (B, ch, H, W) -> (B, ch, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch, H, W) -> (B, ch, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """block_1, attn_1 (if the VAE has attention), block_2 at the coarsest level."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        if attention:
            self.attn_1 = SpatialAttention(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ch, h, w) -> the same shape."""
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


class Level(nn.Module):
    """One resolution: residual blocks, attention after each (may be empty), then a change of resolution or none."""

    def __init__(self, blocks: list[nn.Module], attention: list[nn.Module], **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attention)
        self.resample = list(resample)  # its name in checkpoints, `downsample` or `upsample`
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W), H and W halved or doubled where the resolution changes."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, 2C, h, w), before quant_conv. Attention at the last level."""

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: bool, groups: int, out_channels: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, multiplier in enumerate(ch_mult):
            last = i == len(ch_mult) - 1
            blocks, attn = [], []
            for _ in range(num_res_blocks):
                blocks.append(ResidualBlock(width, ch * multiplier, groups))
                width = ch * multiplier
                if last and attention:
                    attn.append(SpatialAttention(width, groups))
            self.down.append(Level(blocks, attn) if last else Level(blocks, attn, downsample=Downsample(width)))
        self.mid = Middle(width, groups, attention)
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2C, h, w)."""
        x = self.conv_in(x)  # (B, ch, H, W)
        for level in self.down:
            x = level(x)  # (B, ch*mult, H/2^i, W/2^i)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, C, h, w), after post_quant_conv -> image (B, 3, H, W).

    `up[0]` is full resolution, without attention.
    """

    def __init__(
        self, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attention: bool, groups: int, in_channels: int
    ):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = Middle(width, groups, attention)
        levels = []
        for i, multiplier in reversed(list(enumerate(ch_mult))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                blocks.append(ResidualBlock(width, ch * multiplier, groups))
                width = ch * multiplier
            levels.append(Level(blocks, []) if i == 0 else Level(blocks, [], upsample=Upsample(width)))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))  # (B, ch*mult[-1], h, w)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module, LatentSpace):
    """KL-regularised autoencoder; the defaults give KL-16 (66.456 M parameters, keys as published).

    embed_dim: latent channels C. ch, ch_mult: base width and its multiplier per level (stride = 2^(levels - 1)).
    num_res_blocks: blocks per encoder level, one more in the decoder. attention: spatial attention at the coarsest
    level. scale_factor, shift: one number, or one per channel, see `scale`; the default is KL-16's. channel_order:
    latent dimensions from low to high frequency, None where unknown. ckpt_path: weights, loaded strictly.

    Raises ValueError for sizes that do not fit, and what `load_weights` raises.
    """

    def __init__(
        self,
        embed_dim: int = 16,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        ckpt_path: str | None = None,
        *,
        ch: int = 128,
        num_res_blocks: int = 2,
        attention: bool = True,
        norm_groups: int = 32,
        scale_factor: float | Sequence[float] = KL16.scale_factor,
        shift: float | Sequence[float] = 0.0,
        channel_order: Sequence[int] | None = None,
    ):
        super().__init__()
        ch_mult = tuple(ch_mult)
        sizes = dict(embed_dim=[embed_dim], ch=[ch], num_res_blocks=[num_res_blocks], norm_groups=[norm_groups])
        for name, values in (sizes | {"ch_mult": ch_mult}).items():
            most = LARGEST[name]
            if not 1 <= len(values) <= MOST_LEVELS or not all(conforms(v, int) and 1 <= v <= most for v in values):
                raise ValueError(f"{name} of a VAE must be whole numbers from 1 to {most}, got {values[:MOST_LEVELS]}")
        if any(ch * m % norm_groups for m in (1, *ch_mult)):
            widths = f"ch {ch} times ch_mult {ch_mult}"
            raise ValueError(f"every VAE width ({widths}) must be a multiple of norm_groups {norm_groups}")
        if channel_order is None and embed_dim == 16 and ch_mult == (1, 1, 2, 2, 4) and ch == 128:
            channel_order = KL16.channel_order
        self.set_description(VaeDescription(embed_dim, 2 ** (len(ch_mult) - 1), scale_factor, shift, channel_order))
        self._architecture = dict(embed_dim=embed_dim, ch_mult=list(ch_mult), ch=ch, num_res_blocks=num_res_blocks)
        self._architecture |= dict(attention=attention, norm_groups=norm_groups)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, attention, norm_groups, 2 * embed_dim)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, attention, norm_groups, embed_dim)
        self.quant_conv = nn.Conv2d(2 * embed_dim, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, embed_dim, 1)
        if ckpt_path is not None:
            load_weights(self, ckpt_path)

    @property
    def config(self) -> dict:
        """Every constructor argument but ckpt_path, JSON-able; `AutoencoderKL(**vae.config)` is such a VAE."""
        return self._architecture | self.latent_config

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Image (B, 3, H, W) in [-1, 1] -> posterior over raw latents (B, C, h, w)."""
        self.check_images(x)
        return DiagonalGaussian(self.quant_conv(self.encoder(x)))  # moments (B, 2C, h, w)

    def decode(self, z: Tensor) -> Tensor:
        """Raw (unscaled) latents (B, C, h, w) -> image (B, 3, H, W), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))


def read_vae_file(path: str | Path) -> dict:
    """The dict in a VAE checkpoint, with its weights under "model" wherever the file has them.

    They may be under "model" or "state_dict" (latent diffusion, whose keys are the same), or be the dict itself.
    FileNotFoundError or ArgumentError, which name the file, for others.
    """
    path = Path(path)
    if not path.is_file():
        advice = "give a checkpoint such as pretrained_models/vae/kl16.ckpt (fetch it: python -m tools.download vae)"
        raise FileNotFoundError(f"no VAE weights at {path}: {advice}")
    try:
        content = read_file(path)
    except ValueError as error:
        raise ArgumentError("vae_path", str(error)) from error
    named = isinstance(content.get("model"), dict)
    weights = content["model"] if named else content.get("state_dict", content)
    weights = weights if isinstance(weights, dict) else {}
    inner = {str(key).removeprefix(LDM): value for key, value in weights.items() if str(key).startswith(LDM)}
    weights = plain_keys(inner or weights)
    if OF_DIFFUSERS in weights and not (named and "config" in content):  # with one, tools.export wrote it
        raise ArgumentError("vae_path", f"{path} holds a VAE of diffusers: give its folder, {path.parent}")
    if "mask_token" in weights:
        raise ArgumentError("vae_path", f"{path} holds a masked transformer (TokenBridge or MAR), not a VAE")
    if named:
        return content | {"model": weights}
    if ROOT_KEY not in weights:
        found = sorted(map(str, content))[:8]
        raise ArgumentError("vae_path", f'{path} has no weights under the key "model"; found {found}')
    return {"model": weights} | ({"config": content["config"]} if isinstance(content.get("config"), dict) else {})


def load_weights(vae: nn.Module, path: str | Path, content: dict | None = None) -> None:
    """Fill `vae` from a checkpoint file; ArgumentError for a missing key, a wrong shape or NaN.

    Keys that are neither weights nor main_vae.py's are logged.
    """
    content = read_vae_file(path) if content is None else content
    weights, own = content["model"], vae.state_dict()
    extra = [key for key in content if key not in ("model", "config", "description", "weights", "psnr", "step")]
    extra += [key for key in weights if key not in own]
    if extra:
        names = ", ".join(map(str, extra[:8]))
        logger.info("%s: ignoring %d keys that are not the VAE's weights: %s", path, len(extra), names)
    try:
        load_state(vae, weights, str(path), THE_VAE, others=True)
    except ValueError as error:
        raise ArgumentError("vae_path", str(error)) from error
