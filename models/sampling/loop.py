"""How images are drawn from the model (SPEC 6): schedules, token orders, and the loop that reveals tokens step by step.

What happens at a step is known before anything runs: how many tokens are masked before and after it, the guidance scale, the temperature. So
the loop has static shapes and never waits for the device. An order (B, L) is used up from its end: `order[:, after:before]` are predicted
together, `order[:, before:]` are visible.

Letters: B batch, C latent channels, H and W latent grid, L = H*W tokens, K levels, D width, M tokens predicted at a step, V visible, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.layers import take
from models.sampling.compiled import CompiledSampler
from models.sampling.packed import PackedLinears
from models.sampling.reuse import FeatureSource, ReusedFeatures

if TYPE_CHECKING:
    from models.tokenbridge import TokenBridge

# ----------------------------------------------------------------------------------------------- schedules, one function each

# Share of the tokens that stays masked after `done` of `total` steps: 1 before the first, 0 after the last.
MASK_SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "cosine": lambda done, total: math.cos(math.pi / 2 * done / total),  # published (SPEC 6)
    "linear": lambda done, total: 1 - done / total,
    "square": lambda done, total: 1 - (done / total) ** 2,
    "cubic": lambda done, total: 1 - (done / total) ** 3,
    "sqrt": lambda done, total: 1 - math.sqrt(done / total),
    "arccos": lambda done, total: math.acos(done / total) / (math.pi / 2),
}
CFG_SCHEDULES = ("linear", "constant", "cosine", "interval")
TEMPERATURE_SCHEDULES = ("constant", "linear", "cosine")
ORDERS = ("random", "confidence", "halton", "raster", "subsample")
DRAWS = ("inverse", "gumbel")


def _choose(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r} (--{name}); choose from {', '.join(choices)}")


def keep_masked(step: int, num_iter: int, num_tokens: int, masked_now: int, schedule: str = "cosine") -> int:
    """How many tokens stay masked after sampling step `step` (0-based) of `num_iter` (SPEC 6).

    floor(L * share) in float64, clipped to [1, masked_now - 1]: a step predicts at least one token and leaves at least one. (The last step
    ignores this and predicts the rest; with N > L a step that finds one token left predicts none.) Raises ValueError if step is outside
    [0, N) or the schedule is unknown.
    """
    if not 0 <= step < num_iter:
        raise ValueError(f"step {step} is outside [0, {num_iter})")
    _choose(schedule, tuple(MASK_SCHEDULES), "mask_schedule")
    return max(1, min(masked_now - 1, math.floor(num_tokens * MASK_SCHEDULES[schedule](step + 1, num_iter))))


def cosine_keep(step: int, num_iter: int, num_tokens: int, masked_now: int) -> int:
    """`keep_masked` with the published schedule: floor(L*cos(pi/2*(step+1)/N)), clipped."""
    return keep_masked(step, num_iter, num_tokens, masked_now)


def unmasking_plan(num_iter: int, num_tokens: int, schedule: str = "cosine") -> list[tuple[int, int, int]]:
    """The sampler's steps as (masked before, masked after, `keep` for the guidance), known before anything runs.

    The last step leaves nothing masked, while its clipped keep, which the guidance sees, is 1 (SPEC 6).
    """
    plan, masked = [], num_tokens
    for step in range(num_iter):
        keep = keep_masked(step, num_iter, num_tokens, masked, schedule)
        after = 0 if step == num_iter - 1 else keep
        plan.append((masked, after, keep))
        masked = after
    return plan


def guidance_scale(
    cfg: float, schedule: str, num_tokens: int, keep: int, interval: tuple[float, float] = (0.0, 1.0)
) -> float:
    """Classifier-free guidance scale of a step that leaves `keep` of L tokens masked; x = (L - keep) / L is the share revealed.

    linear (published, SPEC 6): 1 + (cfg - 1)*x; constant: cfg; cosine: 1 + (cfg - 1)*(1 - cos(pi*x))/2, late and soft; interval: cfg while x
    lies in `interval`, otherwise 1, which skips the unconditional half. ValueError that lists the choices for another schedule.
    """
    _choose(schedule, CFG_SCHEDULES, "cfg_schedule")
    share = (num_tokens - keep) / num_tokens
    if schedule == "linear":
        return 1 + (cfg - 1) * (num_tokens - keep) / num_tokens
    if schedule == "cosine":
        return 1 + (cfg - 1) * (1 - math.cos(math.pi * share)) / 2
    return cfg if schedule == "constant" or interval[0] <= share <= interval[1] else 1.0


def temperature_at(step: int, num_iter: int, start: float, end: float, schedule: str) -> float:
    """Temperature of a step: `start` throughout (constant), or from `start` at the first step to `end` at the last (linear, cosine)."""
    _choose(schedule, TEMPERATURE_SCHEDULES, "temperature_schedule")
    if schedule == "constant":
        return start
    share = step / max(1, num_iter - 1)
    return start + (end - start) * (share if schedule == "linear" else (1 - math.cos(math.pi * share)) / 2)


# ----------------------------------------------------------------------------------------------- orders


def random_orders(
    batch: int, num_tokens: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Tensor:
    """One random permutation of the tokens per image: (B, L) int64."""
    return torch.rand(batch, num_tokens, generator=generator, device=device).argsort(dim=1)


def raster_sequence(grid: int) -> list[int]:
    """Tokens of a grid x grid image row by row, first revealed first."""
    return list(range(grid * grid))


def halton_sequence(grid: int) -> list[int]:
    """Tokens in the order in which the Halton points (bases 2 and 3) first hit them: every beginning covers the image evenly.

    Besnier et al. 2025 (arXiv 2503.17076) found this order better than confidence for masked image models.
    """

    def radical_inverse(i: int, base: int) -> float:
        result, weight = 0.0, 1.0
        while i:
            i, digit = divmod(i, base)
            weight /= base
            result += digit * weight
        return result

    found: dict[int, None] = {}
    i = 0
    while len(found) < grid * grid:
        i += 1
        found[int(radical_inverse(i, 2) * grid) * grid + int(radical_inverse(i, 3) * grid)] = None
    return list(found)


def subsample_sequence(grid: int) -> list[int]:
    """Coarse to fine: every 2^n-th row and column first, then the grids between them (bit-reversed Morton order)."""
    bits = max(1, (grid - 1).bit_length())

    def key(token: int) -> tuple[int, ...]:
        row, column = divmod(token, grid)
        return tuple(2 * (row >> b & 1) + (column >> b & 1) for b in range(bits))  # low bits decide first

    return sorted(range(grid * grid), key=key)


SEQUENCES: dict[str, Callable[[int], list[int]]] = {
    "raster": raster_sequence,
    "halton": halton_sequence,
    "subsample": subsample_sequence,
}


def token_orders(kind: str, drawn: Tensor, grid: int) -> Tensor:
    """Orders (B, L), used up from the end, for `kind`; `drawn` (B, L) are the images' random permutations.

    random and confidence start from those (confidence re-sorts while sampling). raster and subsample are the same for every image. halton begins
    at a place of the sequence that the image draws (any stretch of it is even), or all images would reveal the same tokens at the same step.
    """
    _choose(kind, ORDERS, "order")
    if kind not in SEQUENCES:
        return drawn
    sequence = torch.tensor(SEQUENCES[kind](grid), device=drawn.device)  # (L,) first revealed first
    place = torch.arange(len(sequence), device=drawn.device).expand_as(drawn)
    if kind == "halton":
        place = (place + drawn[:, :1]) % len(sequence)
    return sequence[place].flip(1)


def check_orders(orders: Tensor, bsz: int, num_tokens: int) -> Tensor:
    """int64 orders; ValueError unless they are (B, L) permutations (looked at on CPU tensors only: elsewhere it would cost a host sync)."""
    orders = torch.as_tensor(orders, dtype=torch.long)
    if tuple(orders.shape) != (bsz, num_tokens):
        raise ValueError(f"orders has shape {tuple(orders.shape)}, expected {(bsz, num_tokens)}")
    if orders.device.type == "cpu" and not torch.equal(orders.sort(1).values, torch.arange(num_tokens).expand(bsz, -1)):
        raise ValueError(f"every row of orders must be a permutation of 0..{num_tokens - 1}")
    return orders


def image_seed(seed: int, index: int) -> int:
    """The seed of image number `index` of a run with --seed `seed`: 63 bits that depend on nothing else. ValueError if one is negative."""
    if seed < 0 or index < 0:
        raise ValueError(f"seeds and image numbers must not be negative (--seed), got {seed} and {index}")
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]) >> 1


# ----------------------------------------------------------------------------------------------- settings


@dataclass(kw_only=True)
class SamplerOptions:
    """How images are drawn; the flags of main_tokenbridge.py have the same names. Defaults are the published sampler's.

    channel_temperature: one factor per dimension in *head* order, or two, for the first and the last, with a line between; empty for 1.
    top_k 0 and top_p 1 keep all levels. confidence_candidates: with --order confidence, only so many times the wanted tokens are scored; 0: all.
    reuse_features, reuse_guidance: see models/sampling/reuse.py; 1 recomputes at every step. compile: see models/sampling/compiled.py.
    """

    num_iter: int = 64
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    cfg_interval: tuple[float, float] = (0.2, 0.8)
    temperature: float = 1.0
    temperature_schedule: str = "constant"
    temperature_end: float = 0.0
    channel_temperature: tuple[float, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    order: str = "random"
    mask_schedule: str = "cosine"
    confidence_temperature: float = 1.0
    confidence_candidates: float = 0.0
    draw: str = "inverse"
    reuse_features: int = 1
    reuse_guidance: int = 1
    compile: bool = False

    def check(self, num_channels: int) -> None:
        """ValueError naming the flag, and the choices where there are any, for a value that makes no sense."""
        for name, choices in (
            ("order", ORDERS),
            ("mask_schedule", tuple(MASK_SCHEDULES)),
            ("cfg_schedule", CFG_SCHEDULES),
            ("temperature_schedule", TEMPERATURE_SCHEDULES),
            ("draw", DRAWS),
        ):
            _choose(getattr(self, name), choices, name)
        if self.num_iter < 1:
            raise ValueError(f"num_iter must be at least 1 (--num_iter), got {self.num_iter}")
        for name in ("temperature", "temperature_end", "confidence_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative (--{name}), got {getattr(self, name)}")
        if not math.isfinite(self.cfg):
            raise ValueError(f"cfg must be finite (--cfg), got {self.cfg}")
        if len(self.cfg_interval) != 2 or not 0 <= self.cfg_interval[0] <= self.cfg_interval[1] <= 1:
            raise ValueError(
                f"cfg_interval must be two shares, 0 <= from <= to <= 1 (--cfg_interval), got {self.cfg_interval}"
            )
        factors = self.channel_temperature
        if len(factors) not in (0, 2, num_channels) or not all(0 <= f < math.inf for f in factors):
            raise ValueError(
                f"channel_temperature takes 2 or {num_channels} factors, none negative (--channel_temperature), got {tuple(factors)}"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 for all levels (--top_k), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (--top_p), got {self.top_p}")
        if self.confidence_candidates and not self.confidence_candidates >= 1:
            raise ValueError(
                f"confidence_candidates must be at least 1, or 0 for all (--confidence_candidates), got {self.confidence_candidates}"
            )
        for name in ("reuse_features", "reuse_guidance"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (--{name}), got {getattr(self, name)}")
            if self.compile and getattr(self, name) > 1:
                raise ValueError(
                    f"--compile and --{name} do not go together: what is reused changes its shape at every step"
                )

    def temperatures(self, step: int, num_channels: int) -> list[float]:
        """Temperature of each dimension (C values, head order) at a step."""
        now = temperature_at(step, self.num_iter, self.temperature, self.temperature_end, self.temperature_schedule)
        factors = list(self.channel_temperature) or [1.0]
        if len(factors) == 2 != num_channels:
            factors = [factors[0] + (factors[1] - factors[0]) * c / (num_channels - 1) for c in range(num_channels)]
        return [now * f for f in factors * (num_channels if len(factors) == 1 else 1)]


OPTION_NAMES = tuple(field.name for field in fields(SamplerOptions))


# ----------------------------------------------------------------------------------------------- the loop


@dataclass
class SamplerState:
    """What is known after a step; `latents` and `masked` stay valid when sampling goes on."""

    step: int  # 0-based, of num_iter
    num_iter: int
    values: Tensor  # (B, L, C) dequantized, 0 where masked
    orders: Tensor  # (B, L): the first num_masked tokens of each row are masked
    num_masked: int
    scale: float  # guidance of this step
    grid: int

    @property
    def latents(self) -> Tensor:
        """(B, C, H, W), scaled; 0 where masked."""
        return self.values.transpose(1, 2).reshape(len(self.values), -1, self.grid, self.grid)

    @property
    def masked(self) -> Tensor:
        """(B, H, W) bool: tokens not known yet."""
        mask = torch.zeros_like(self.orders, dtype=torch.bool).scatter_(1, self.orders[:, : self.num_masked], True)
        return mask.view(-1, self.grid, self.grid)


@dataclass
class Noise:
    """All random numbers of a batch, on the CPU first, so that a seed means the same image on any device; row i is image i's alone."""

    orders: Tensor  # (B, L) random permutations
    draws: Tensor  # (B, L, C) uniforms, or (B, L, C, K) Gumbel noise; dimensions in natural order
    confidence: Tensor | None  # (B, L) Gumbel noise


def gumbel(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Gumbel noise: -log of exponential draws."""
    return torch.empty(tuple(shape)).exponential_(generator=generator).log_().neg_()


def sampling_noise(
    bsz: int,
    num_tokens: int,
    num_channels: int,
    seeds: Sequence[int] | None,
    generator: torch.Generator | None,
    options: SamplerOptions | None = None,
    num_levels: int = 0,
) -> Noise:
    """The batch's random numbers: image i's from seeds[i], all from `generator` without seeds. ValueError if a seed is negative or one is missing."""
    options = SamplerOptions() if options is None else options

    def of(rows: int, g: torch.Generator | None) -> list[Tensor]:
        orders = random_orders(rows, num_tokens, g, "cpu")
        shape = (rows, num_tokens, num_channels)
        draws = (
            torch.rand(shape, generator=g, device="cpu")
            if options.draw == "inverse"
            else gumbel((*shape, num_levels), g)
        )
        return [orders, draws] + ([gumbel((rows, num_tokens), g)] if options.order == "confidence" else [])

    if seeds is None:
        parts = of(bsz, generator)
    else:
        if len(seeds) != bsz:
            raise ValueError(f"{len(seeds)} seeds for {bsz} images")
        if any(int(seed) < 0 for seed in seeds):
            raise ValueError(f"seeds must not be negative (--seed), got {min(int(seed) for seed in seeds)}")
        rows = [of(1, torch.Generator("cpu").manual_seed(int(seed))) for seed in seeds]
        parts = [torch.cat(part) for part in zip(*rows, strict=True)]
    return Noise(parts[0], parts[1], parts[2] if len(parts) > 2 else None)


def masked_first(orders: Tensor, regenerate: Tensor) -> Tensor:
    """Orders (B, L) with the tokens to regenerate (B, L; bool) moved to the front, both parts in their order."""
    return orders.gather(1, regenerate.gather(1, orders).logical_not().to(torch.uint8).argsort(dim=1, stable=True))


def check_regenerate(regenerate: Tensor, bsz: int, num_tokens: int) -> tuple[Tensor, int]:
    """Bool mask (B, L) of the tokens to draw anew, and their number, the same in every row; ValueError otherwise."""
    mask = torch.as_tensor(regenerate) != 0
    if mask.numel() not in (num_tokens, bsz * num_tokens):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected {(bsz, num_tokens)} or one row for all images (--mask)"
        )
    mask = mask.reshape(-1, num_tokens).expand(bsz, -1)
    counts = mask.sum(1).tolist()
    if len(set(counts)) != 1 or counts[0] == 0:
        raise ValueError(
            f"mask must choose the same number of tokens, at least one, in every image; it chooses {counts} (--mask)"
        )
    return mask, counts[0]


@torch.no_grad()
def sample_steps(
    model: TokenBridge,
    class_embedding: Tensor,
    options: SamplerOptions,
    *,
    orders: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
    regenerate: Tensor | None = None,
) -> Iterator[SamplerState]:
    """Draw B images, one for each row of class_embedding (B, D), and yield the state after every step (SPEC 6).

    orders (B, L): given permutations instead of those of options.order. seeds: one per image; it depends on nothing else. init (B or 1, C, H, W)
    scaled latents and regenerate (B or 1, L) bool: only those tokens are drawn, the others keep init's quantized values, exactly. Latents of
    an image whose logits were not finite are NaN. Dropout is off while a step runs.
    """
    bsz, device, num_tokens = len(class_embedding), class_embedding.device, model.num_tokens
    options.check(model.token_dim)
    if orders is not None:
        orders = check_orders(orders, bsz, num_tokens)
    noise = sampling_noise(bsz, num_tokens, model.token_dim, seeds, generator, options, model.num_levels)
    if orders is None:
        orders = token_orders(options.order, noise.orders, model.grid_size)
    orders, num_masked = orders.to(device), num_tokens
    values = torch.zeros(bsz, num_tokens, model.token_dim, device=device)  # dequantized so far
    if (init is None) != (regenerate is None):
        raise ValueError("editing needs both an image and a mask of what to regenerate (--init, --mask)")
    if init is not None:
        mask, num_masked = check_regenerate(regenerate, bsz, num_tokens)
        mask = mask.to(device)
        orders = masked_first(orders, mask)
        known = model.quantize(model.patchify(init.to(device)))[1].expand(bsz, -1, -1)  # (B, L, C)
        values = known.masked_fill(mask.unsqueeze(-1), 0.0)
    draws = noise.draws[:, :, model.channel_order].to(device).flatten(2)  # (B, L, C) or (B, L, C*K), head order
    confidence = None if noise.confidence is None else noise.confidence.to(device)
    features = feature_source(model, class_embedding, options)
    channel_sample = CompiledSampler.of(model).channel_sample if options.compile else model.channel_sample
    packed = PackedLinears([] if options.compile else model.modules())
    was_training = model.training
    for step, (before, after, keep) in enumerate(unmasking_plan(options.num_iter, num_masked, options.mask_schedule)):
        scale = guidance_scale(options.cfg, options.cfg_schedule, num_masked, keep, options.cfg_interval)
        if before > after:
            if was_training:
                model.eval()
            try:
                with packed.used():
                    orders, z = _choose_tokens(
                        model, features, values, orders, before, after, scale, confidence, options
                    )
                    wanted = orders[:, after:before]  # (B, M)
                    picked = take(draws, wanted).flatten(0, 1).unflatten(1, (model.token_dim, -1))  # (B*M, C, 1 or K)
                    indices, witness = channel_sample(
                        z.flatten(0, 1),
                        picked if options.draw == "gumbel" else picked[..., 0],
                        options.temperatures(step, model.token_dim),
                        options.top_k,
                        options.top_p,
                    )
            finally:
                if was_training:
                    model.train()
            predicted = model.dequantize(indices[:, model.to_natural_order]) + 0 * witness[:, None]  # (B*M, C)
            predicted = predicted.view(bsz, -1, model.token_dim)  # (B, M, C), NaN where a logit was not finite
            values = values.scatter(1, wanted.unsqueeze(-1).expand_as(predicted), predicted)
        yield SamplerState(step, options.num_iter, values, orders, after, scale, model.grid_size)


def feature_source(model: TokenBridge, class_embedding: Tensor, options: SamplerOptions) -> FeatureSource:
    """What computes z: called with values (B, L, C), orders (B, L), the number of masked tokens, wanted (B, M) and the guidance scale -> (B, M, D)."""
    if options.compile:
        return CompiledSampler.of(model).features(class_embedding)
    if options.reuse_features > 1 or options.reuse_guidance > 1:
        return ReusedFeatures(model, class_embedding, options)

    def features(values: Tensor, orders: Tensor, num_masked: int, wanted: Tensor, scale: float) -> Tensor:
        visible = orders[:, num_masked:]  # (B, V)
        return model._guided_z(take(values, visible), visible, wanted, class_embedding, scale)

    return features


def _choose_tokens(
    model: TokenBridge,
    features: FeatureSource,
    values: Tensor,
    orders: Tensor,
    before: int,
    after: int,
    scale: float,
    noise: Tensor | None,
    options: SamplerOptions,
) -> tuple[Tensor, Tensor]:
    """Orders whose [after:before] are this step's tokens, and their z (B, M, D).

    With --order confidence the candidates among the masked tokens are sorted by how sure the model is of their leading dimension: the log of its
    largest probability plus Gumbel noise times confidence_temperature times the share still masked (none at the end, as in MaskGIT). As many
    z are computed as there are candidates.
    """
    wanted = before - after
    if noise is None:
        return orders, features(values, orders, before, orders[:, after:before], scale)
    count = min(before, math.ceil(options.confidence_candidates * wanted)) if options.confidence_candidates else before
    candidates = orders[:, before - count : before]  # (B, M')
    z = features(values, orders, before, candidates, scale)  # (B, M', D)
    if count == wanted:
        return orders, z
    score = model.leading_logits(z.flatten(0, 1)).log_softmax(-1).amax(-1).view_as(candidates)
    score = score + options.confidence_temperature * after / model.num_tokens * noise.gather(1, candidates)
    rank = score.argsort(dim=1, stable=True)  # surest last: orders are used from their end
    orders = torch.cat([orders[:, : before - count], candidates.gather(1, rank), orders[:, before:]], dim=1)
    return orders, take(z, rank[:, count - wanted :])
