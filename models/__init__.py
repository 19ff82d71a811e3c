"""Models by name: `MODELS["tokenbridge_large"](img_size=256, quant_levels=64)` -> TokenBridge (docs/spec.md 4)."""

from collections.abc import Callable
from functools import partial

from models.tokenbridge import TokenBridge


def _sized(
    width: int, depth: int, heads: int, head_width: int, head_depth: int, head_heads: int
) -> Callable[..., TokenBridge]:
    backbone = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in (("embed_dim", width), ("depth", depth), ("num_heads", heads))
    }
    head = dict(channel_embed_dim=head_width, channel_depth=head_depth, channel_heads=head_heads)
    return partial(TokenBridge, **backbone, **head)


MODELS: dict[str, Callable[..., TokenBridge]] = {
    "tokenbridge_base": _sized(768, 12, 12, 768, 4, 8),  # 218.02 M parameters with 64 levels and 16 channels
    "tokenbridge_large": _sized(1024, 16, 16, 1024, 4, 8),  # 486.89 M
    "tokenbridge_huge": _sized(1280, 20, 16, 1024, 6, 8),  # 910.04 M
    "tokenbridge_digits": _sized(128, 3, 4, 64, 2, 4),  # the demo's; give it a small buffer_size
}
