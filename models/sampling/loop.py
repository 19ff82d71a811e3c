"""The sampling loop (docs/spec.md 6): reveals the tokens of a batch of images step by step.

What happens at a step is known before anything runs: how many tokens are masked before and after it, the guidance
scale, the temperature (schedules.py). So the loop has static shapes and never waits for the device. An order (B, L) is
used up from its end: `order[:, after:before]` are predicted together, given the visible tokens `order[:, before:]`.

Letters: B batch, C latent channels, H and W latent grid, L = H*W tokens, K levels, D width, M tokens predicted at a
step, V visible, N steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.layers import take
from models.sampling.compiled import CompiledSampler
from models.sampling.half import HalfWeights
from models.sampling.options import FeatureSource, SamplerModel, SamplerOptions
from models.sampling.orders import check_mask, check_orders, masked_first, random_orders, token_orders
from models.sampling.packed import PackedLinears
from models.sampling.reuse import ReusedFeatures
from models.sampling.schedules import guidance_scale, unmasking_plan
from util.options import ArgumentError


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
    """All random numbers of a batch, drawn on the CPU so that a seed is the same image on any device."""

    orders: Tensor  # (B, L) random permutations
    uniforms: Tensor  # (B, L, C), dimensions in natural order
    confidence: Tensor | None  # (B, L) Gumbel noise


def sampling_noise(
    batch: int,
    num_tokens: int,
    num_channels: int,
    seeds: Sequence[int] | None,
    generator: torch.Generator | None,
    with_confidence: bool = False,
) -> Noise:
    """Row i from seeds[i] alone; all rows from `generator` without seeds. ValueError for negative or missing seeds."""

    def draw(rows: int, g: torch.Generator | None) -> list[Tensor]:
        parts = [random_orders(rows, num_tokens, g, "cpu")]
        parts.append(torch.rand((rows, num_tokens, num_channels), generator=g, device="cpu"))
        if with_confidence:  # Gumbel noise: -log of exponential draws
            parts.append(torch.empty((rows, num_tokens), device="cpu").exponential_(generator=g).log_().neg_())
        return parts

    if seeds is None:
        parts = draw(batch, generator)
    else:
        if len(seeds) != batch:
            raise ValueError(f"{len(seeds)} seeds for {batch} images")
        if min(map(int, seeds), default=0) < 0:
            raise ArgumentError("seed", f"seeds must not be negative, got {min(map(int, seeds))}")
        rows = [draw(1, torch.Generator("cpu").manual_seed(int(seed))) for seed in seeds]
        parts = [torch.cat(part) for part in zip(*rows, strict=True)]
    return Noise(parts[0], parts[1], parts[2] if with_confidence else None)


@contextmanager
def evaluating(model: SamplerModel) -> Iterator[None]:
    """Within, the model is in eval mode; afterwards in the mode it was in."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def sample_steps(
    model: SamplerModel,
    class_embedding: Tensor,
    options: SamplerOptions,
    *,
    orders: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    init: Tensor | None = None,
    regenerate: Tensor | None = None,
    num_regenerate: int | None = None,
) -> Iterator[SamplerState]:
    """Sample B images, one per row of class_embedding (B, D), and yield the state after every step (docs/spec.md 6).

    orders (B, L): given permutations instead of those of options.order. seeds: one per image, which depends on nothing
    else. init (B or 1, C, H, W) scaled latents and regenerate (B or 1, L) bool: only those tokens are sampled, the
    others keep init's quantized values exactly. num_regenerate: their number per image, if known, which spares a host
    sync. Latents of an image whose logits were not finite are NaN. The model is in eval mode until the iterator ends.
    """
    batch, device, num_tokens = len(class_embedding), class_embedding.device, model.num_tokens
    options.check(model.token_dim)
    if orders is not None:
        orders = check_orders(orders, batch, num_tokens)
    noise = sampling_noise(batch, num_tokens, model.token_dim, seeds, generator, options.order == "confidence")
    orders = token_orders(options.order, noise.orders, model.grid_size) if orders is None else orders
    orders, num_masked = orders.to(device, non_blocking=True), num_tokens  # no copy to the device makes the host wait
    values = torch.zeros(batch, num_tokens, model.token_dim, device=device)  # dequantized so far
    if (init is None) != (regenerate is None):
        raise ArgumentError("mask", "editing needs both an image (init) and a mask of what to regenerate (mask)")
    if init is not None:
        mask, num_masked = check_mask(regenerate, batch, num_tokens, num_regenerate)
        mask = mask.to(device, non_blocking=True)
        orders = masked_first(orders, mask)
        known = model.quantize(model.patchify(init.to(device, non_blocking=True)))[1].expand(batch, -1, -1)  # (B, L, C)
        values = known.masked_fill(mask.unsqueeze(-1), 0.0)
    sampler = Sampler(model, class_embedding, options, noise)
    plan = unmasking_plan(options.num_iter, num_masked, options.mask_schedule)
    with evaluating(model):
        for step, (before, after, keep) in enumerate(plan):
            scale = guidance_scale(options.cfg, options.cfg_schedule, num_masked, keep, options.cfg_interval)
            if before > after:
                with sampler.prepared():
                    orders, z = sampler.choose(values, orders, before, after, scale)
                    values = sampler.reveal(values, orders[:, after:before], z, step)
            yield SamplerState(step, options.num_iter, values, orders, after, scale, model.grid_size)


class Sampler:
    """The two parts of a step: which tokens leave the mask, and what they become."""

    def __init__(self, model: SamplerModel, class_embedding: Tensor, options: SamplerOptions, noise: Noise):
        device = class_embedding.device
        self.model, self.options = model, options
        uniforms = noise.uniforms.to(device, non_blocking=True)  # (B, L, C)
        self.uniforms = uniforms.index_select(2, model.to_head_order)
        self.confidence = None if noise.confidence is None else noise.confidence.to(device, non_blocking=True)  # (B, L)
        compiled = CompiledSampler.of(model) if options.compile else None
        replays = compiled is not None and compiled.replays(len(class_embedding))
        self.run = compiled.replay if replays else call  # runs the two costly parts
        self.features = feature_source(model, class_embedding, options, self.run)
        half = torch.is_autocast_enabled(device.type)
        weights = HalfWeights.of(model, torch.get_autocast_dtype(device.type)) if half else None
        weights = weights or PackedLinears([] if options.compile else model.modules())
        self.contexts = [weights.used] + ([compiled.used] if compiled else [])

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Within, the model computes with the weights and blocks that were prepared for sampling."""
        with ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            yield

    def choose(self, values: Tensor, orders: Tensor, before: int, after: int, scale: float) -> tuple[Tensor, Tensor]:
        """Orders whose [after:before] are this step's tokens, and their z (B, M, D).

        With order "confidence" the masked tokens are sorted by how sure the model is of their leading dimension: the
        log of its largest probability, plus Gumbel noise that fades with the share still masked (as in MaskGIT).
        """
        if self.confidence is None:
            return orders, self.features(values, orders, before, orders[:, after:before], scale)
        candidates = orders[:, :before]  # (B, M')
        z = self.features(values, orders, before, candidates, scale)  # (B, M', D)
        if after == 0:
            return orders, z
        score = self.model.leading_logits(z.flatten(0, 1)).log_softmax(-1).amax(-1).view_as(candidates)
        noise = self.confidence.gather(1, candidates)
        score = score + self.options.confidence_temperature * after / self.model.num_tokens * noise
        rank = score.argsort(dim=1, stable=True)  # most confident last: orders are used from their end
        orders = torch.cat([candidates.gather(1, rank), orders[:, before:]], dim=1)
        return orders, take(z, rank[:, after:])

    def reveal(self, values: Tensor, targets: Tensor, z: Tensor, step: int) -> Tensor:
        """values (B, L, C) with what the head samples for the tokens targets (B, M) from their z (B, M, D)."""
        model, options = self.model, self.options
        indices, valid = self.run(
            model.channel_sample,
            z.flatten(0, 1),  # (B*M, D)
            take(self.uniforms, targets).flatten(0, 1),  # (B*M, C)
            tuple(options.temperatures(step, model.token_dim)),
            options.top_k,
            options.top_p,
        )
        predicted = model.dequantize(indices[:, model.to_natural_order])  # (B*M, C)
        predicted = predicted.masked_fill(~valid.unsqueeze(1), math.nan).view(*targets.shape, -1)  # (B, M, C)
        return values.scatter(1, targets.unsqueeze(-1).expand_as(predicted), predicted)


def call(function: Callable[..., object], *arguments: object) -> object:
    """function(*arguments)."""
    return function(*arguments)


def feature_source(
    model: SamplerModel, class_embedding: Tensor, options: SamplerOptions, run: Callable[..., object] = call
) -> FeatureSource:
    """What computes z for images with class_embedding (B, D), with reuse between the steps or without.

    run: calls the function that does it without.
    """
    if options.reuse_features > 1 or options.reuse_guidance > 1:
        return ReusedFeatures(model, class_embedding, options)

    def features(values: Tensor, orders: Tensor, num_masked: int, targets: Tensor, scale: float) -> Tensor:
        visible = orders[:, num_masked:]
        # as a tensor, so that one graph serves every scale
        strength = scale if run is call or scale == 1 else torch.full((), scale, device=values.device)
        return run(guided_z, model, take(values, visible), visible, targets, class_embedding, strength)

    return features


def guided_z(
    model: SamplerModel,
    values: Tensor,
    visible: Tensor,
    targets: Tensor,
    class_embedding: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """z (B, M, D) of the target tokens (B, M), guided: z_u + scale * (z_c - z_u) (docs/spec.md 6); scale 1 skips z_u.

    values (B, V, C) of the visible tokens (B, V). Both passes run as one batch. A scale in a tensor must not be 1.
    """

    def z_of(rows: Tensor, values: Tensor, visible: Tensor, targets: Tensor) -> Tensor:
        return model.run_decoder(model.run_encoder(values, visible, rows), visible, targets)

    if not isinstance(scale, Tensor) and scale == 1:
        return z_of(class_embedding, values, visible, targets)
    if visible.shape[1] == 0 and len(targets) > 1:
        # Nothing is visible and there is no class, so z_u is the same for all images: one row serves all their targets.
        conditional = z_of(class_embedding, values, visible, targets)
        unconditional = z_of(model.fake_latent, values[:1], visible[:1], targets.reshape(1, -1)).view_as(conditional)
    else:
        class_embedding = torch.cat([class_embedding, model.fake_latent.expand_as(class_embedding)])  # (2B, D)
        values, visible, targets = (torch.cat([x, x]) for x in (values, visible, targets))
        conditional, unconditional = z_of(class_embedding, values, visible, targets).chunk(2)
    return unconditional + scale * (conditional - unconditional)
