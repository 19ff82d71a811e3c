"""In which order the tokens are revealed. An order (B, L) holds a permutation per image and is used up from its end.

A new order is a function in `SEQUENCES`, grid -> tokens, first revealed first. Letters: B images, L tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from util.options import ArgumentError


def random_orders(
    batch: int, num_tokens: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """One random permutation of the tokens per image: (B, L) int64."""
    return torch.rand(batch, num_tokens, generator=generator, device=device).argsort(dim=1)


def radical_inverse(i: int, base: int) -> float:
    """The digits of i mirrored at the point: in base 2, 1, 2, 3, ... give 1/2, 1/4, 3/4, ..."""
    result, weight = 0.0, 1.0
    while i:
        i, digit = divmod(i, base)
        weight /= base
        result += digit * weight
    return result


def halton_sequence(grid: int) -> list[int]:
    """Tokens in the order in which Halton points (bases 2 and 3) first hit them: every prefix covers the image evenly.

    Besnier et al. 2025 (arXiv 2503.17076) found this order better than confidence for masked image models.
    """
    tokens: dict[int, None] = {}  # an ordered set
    i = 0
    while len(tokens) < grid * grid:
        i += 1
        tokens[int(radical_inverse(i, 2) * grid) * grid + int(radical_inverse(i, 3) * grid)] = None
    return list(tokens)


def raster_sequence(grid: int) -> list[int]:
    """Tokens row by row."""
    return list(range(grid * grid))


def subsample_sequence(grid: int) -> list[int]:
    """Coarse to fine: every 2^n-th row and column first, then the grids between them (bit-reversed Morton order)."""
    bits = max(1, (grid - 1).bit_length())

    def key(token: int) -> tuple[int, ...]:
        row, column = divmod(token, grid)
        return tuple(2 * (row >> b & 1) + (column >> b & 1) for b in range(bits))  # low bits decide first

    return sorted(range(grid * grid), key=key)


SEQUENCES: dict[str, Callable[[int], list[int]]] = {
    "halton": halton_sequence,
    "raster": raster_sequence,
    "subsample": subsample_sequence,
}
ORDERS = ("random", "confidence", *SEQUENCES)


def token_orders(kind: str, permutations: Tensor, grid: int) -> Tensor:
    """Orders (B, L) of the kind, given one random permutation per image (B, L).

    random and confidence start from the permutations (confidence sorts the masked tokens at every step). raster and
    subsample are the same for every image. halton starts at an offset that the permutation determines: any stretch of
    the sequence is even, and without the offset all images would reveal the same tokens at the same step.
    """
    if kind not in SEQUENCES:
        return permutations
    tokens = SEQUENCES[kind](grid)
    if sorted(tokens) != list(range(grid * grid)):
        raise ArgumentError("order", f"order {kind} does not list each of the {grid * grid} tokens once")
    sequence = torch.tensor(tokens, device=permutations.device)  # (L,) first revealed first
    places = torch.arange(len(sequence), device=permutations.device).expand_as(permutations)
    if kind == "halton":
        places = (places + permutations[:, :1]) % len(sequence)
    return sequence[places].flip(1)


def check_orders(orders: Tensor, batch: int, num_tokens: int) -> Tensor:
    """int64 orders; ValueError unless they are (B, L) permutations (checked on the CPU only: a host sync elsewhere)."""
    orders = torch.as_tensor(orders, dtype=torch.long)
    if tuple(orders.shape) != (batch, num_tokens):
        raise ValueError(f"orders has shape {tuple(orders.shape)}, expected {(batch, num_tokens)}")
    identity = torch.arange(num_tokens).expand(batch, -1)
    if orders.device.type == "cpu" and not torch.equal(orders.sort(1).values, identity):
        raise ValueError(f"every row of orders must be a permutation of 0..{num_tokens - 1}")
    return orders


def check_mask(mask: Tensor, batch: int, num_tokens: int, count: int | None = None) -> tuple[Tensor, int]:
    """Bool mask (B, L) of the tokens to predict and their number, equal in every row; ArgumentError otherwise.

    mask: of any dtype; one row stands for all images. A `count` is trusted, which spares a host sync.
    """
    mask = torch.as_tensor(mask) != 0
    if mask.numel() != num_tokens and (mask.numel() != batch * num_tokens or len(mask) != batch):
        expected = f"{(batch, num_tokens)} or one row for all images"
        raise ArgumentError("mask", f"mask has shape {tuple(mask.shape)}, expected {expected}")
    mask = mask.reshape(-1, num_tokens).expand(batch, -1)
    if count is not None:
        return mask, count
    counts = mask.sum(1).tolist()
    if len(set(counts)) != 1 or counts[0] == 0:
        found = f"at least one, in every image; it chooses {counts}"
        raise ArgumentError("mask", f"mask must choose the same number of tokens, {found}")
    return mask, counts[0]


def masked_first(orders: Tensor, regenerate: Tensor) -> Tensor:
    """Orders (B, L) with the tokens to regenerate (B, L; bool) first, each part in its previous order."""
    keep = regenerate.gather(1, orders).logical_not().to(torch.uint8)
    return orders.gather(1, keep.argsort(dim=1, stable=True))
