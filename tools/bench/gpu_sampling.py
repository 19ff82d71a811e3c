"""Sections "sampling", "interactive", "head" and "reuse" of `python -m tools.bench gpu`: speed of the sampler."""

from collections.abc import Sequence
from functools import partial

import torch

from models.sampling.loop import Sampler, sampling_noise
from models.sampling.options import SamplerOptions
from models.sampling.schedules import guidance_scale, unmasking_plan
from models.tokenbridge import TokenBridge
from tools.bench.baselines import baseline_head, baseline_sampling_step
from tools.bench.counting import count, timed
from tools.bench.gpu_results import Bench
from util import dist

SAMPLED_STEPS = 6  # of the sampler's, evenly spaced; the rest is extrapolated
PAPER_HEAD = "paper, A100, batch not stated: 52.42 ms; a diffusion head 311.25 ms"
CFG = 3.1


class Steps:
    """Some steps of a sampling run of `num_iter` iterations, on random values of the tokens known by then."""

    def __init__(self, model: TokenBridge, batch: int, options: SamplerOptions, steps: Sequence[int]):
        device = model.mask_token.device
        self.model, self.options = model, options
        labels = torch.arange(batch, device=device) % model.class_num
        self.class_embedding = model.class_emb.weight.detach()[labels]
        noise = sampling_noise(batch, model.num_tokens, model.token_dim, None, torch.Generator().manual_seed(0))
        self.orders = noise.orders.to(device)
        self.values = torch.randn(batch, model.num_tokens, model.token_dim, device=device)
        self.sampler = Sampler(model, self.class_embedding, options, noise)
        plan = unmasking_plan(options.num_iter, model.num_tokens)
        self.steps = [(step, *plan[step]) for step in steps if plan[step][0] > plan[step][1]]
        if not self.steps:
            raise ValueError(f"none of the steps {list(steps)} of {options.num_iter} reveals a token")

    def scale(self, keep: int) -> float:
        """Guidance of a step."""
        o = self.options
        return guidance_scale(o.cfg, o.cfg_schedule, self.model.num_tokens, keep, o.cfg_interval)

    @torch.no_grad()
    def __call__(self) -> None:
        """Run them as `sample_steps` does."""
        for step, before, after, keep in self.steps:
            with self.sampler.prepared():
                _, z = self.sampler.choose(self.values, self.orders, before, after, self.scale(keep))
                self.sampler.reveal(self.values, self.orders[:, after:before], z, step)

    @torch.no_grad()
    def plain(self) -> None:
        """The same steps of the plain loop."""
        for _, before, after, keep in self.steps:
            masked = torch.zeros_like(self.orders, dtype=torch.bool).scatter_(1, self.orders[:, :before], True)
            rest = (before, after), self.class_embedding, self.scale(keep)
            baseline_sampling_step(self.model, self.values.clone(), masked, self.orders, *rest)


def sampling_model(bench: Bench) -> TokenBridge:
    """The main model in eval mode."""
    return bench.options.built(bench.device).eval().requires_grad_(False)


def spaced(num_iter: int, count: int = SAMPLED_STEPS) -> list[int]:
    """Step numbers in the middle of `count` equal parts of the run."""
    return sorted({int((i + 0.5) * num_iter / count) for i in range(min(count, num_iter))})


def time_sampling(
    bench: Bench,
    model: TokenBridge,
    options: SamplerOptions,
    *,
    plain: bool = False,
    numbers: Sequence[int] = (),
    tflop: float = 0.0,
    baseline: float | None = None,
) -> tuple[float, float]:
    """Record images/s of a whole run, extrapolated from some steps; returns (TFLOP of these steps, images/s).

    tflop: what compiled functions cannot be asked for.
    """
    batch, numbers = bench.options.sampling_batch, numbers or spaced(options.num_iter)
    with dist.autocast(bench.device, bench.precision):
        steps = Steps(model, batch, options, numbers)
        tflop = tflop if options.compile else count(steps).flops / 1e12
        ways = [steps.plain] if plain else [steps]
        (seconds,) = timed(ways, bench.options.repeats, bench.device, warm_up=1 + options.compile)
    whole = seconds / len(numbers) * options.num_iter
    name = "plain loop" if plain else "compiled" if options.compile else "eager"
    reuse = f", reuse_features {options.reuse_features}" if options.reuse_features > 1 else ""
    title = f"sampling, {options.num_iter} iterations, cfg {options.cfg:g}, batch {batch}, {name}{reuse}"
    note = f"sampling: {len(numbers)} evenly spaced steps timed, the rest extrapolated; without the VAE"
    bench.record(title, batch / whole, "images/s", note=note, baseline=baseline, **bench.speed(tflop, seconds))
    return tflop, batch / whole


def sampling(bench: Bench) -> None:
    """The published setting and 64 iterations: plain loop, eager, compiled."""
    model = sampling_model(bench)
    for num_iter in bench.options.num_iter:
        found: dict[str, float] = {}
        ways = {"plain loop": 12, "eager": 8} | ({} if bench.options.no_compile else {"compiled": 30})
        for way, expected in ways.items():
            if way != "compiled" or "tflop" in found:
                case = partial(sample_one_way, bench, model, num_iter, way, found)
                bench.attempt(f"sampling, {num_iter} iterations, {way}", expected, case)


def sample_one_way(bench: Bench, model: TokenBridge, num_iter: int, way: str, found: dict[str, float]) -> None:
    """Time one way; `found` gets the first way's images/s as "baseline", and "tflop" of the eager one."""
    options = SamplerOptions(num_iter=num_iter, cfg=CFG, compile=way == "compiled")
    tflop, rate = time_sampling(bench, model, options, plain=way == "plain loop", **found)
    found.setdefault("baseline", rate)
    if way == "eager":
        found["tflop"] = tflop


def interactive(bench: Bench) -> None:
    """Seconds of a whole run of 64 iterations with guidance, for 1 and 8 images."""
    model, found = sampling_model(bench), {}

    def whole(images: int, compile: bool) -> None:
        labels = torch.arange(images, device=bench.device) % model.class_num
        options = dict(num_iter=64, cfg=CFG, labels=labels, seeds=list(range(images)), compile=compile)
        with dist.autocast(bench.device, bench.precision):
            way = partial(model.sample_tokens, images, **options)
            (seconds,) = timed([way], bench.options.repeats, bench.device, warm_up=1 + compile)
        title = f"64 iterations, cfg {CFG}, {images} image(s), {'compiled' if compile else 'eager'}"
        bench.record(title, seconds, "s", baseline=found.get(images))
        found.setdefault(images, seconds)

    for images in (1, 8):
        bench.attempt(f"interactive, {images} image(s), eager", 6, partial(whole, images, False))
        if not bench.options.no_compile:
            bench.attempt(f"interactive, {images} image(s), compiled", 25, partial(whole, images, True))


def head(bench: Bench) -> None:
    """The head alone: the 256 tokens of an image, and those of a batch."""
    model = sampling_model(bench)

    def alone(tokens: int) -> None:
        z = torch.randn(tokens, model.mask_token.shape[-1], device=bench.device)
        uniforms = torch.rand(tokens, model.num_channels, device=bench.device)
        embedding = model.fake_latent.expand(2, -1)
        noise = sampling_noise(2, model.num_tokens, model.token_dim, None, None)
        with torch.no_grad(), dist.autocast(bench.device, bench.precision):
            sampler = Sampler(model, embedding, SamplerOptions(), noise)
            with sampler.prepared():
                ours, plain = partial(model.channel_sample, z, uniforms, 1.0), partial(baseline_head, model, z)
                seconds = timed([ours, plain], bench.options.repeats, bench.device)
        milliseconds, baseline = (1e3 * s for s in seconds)
        note = f"head alone: {PAPER_HEAD}; no comparison on equal terms"
        bench.record(f"head alone, {tokens} tokens, eager", milliseconds, "ms", baseline=baseline, note=note)

    for tokens in (256, 16 * 256):
        bench.attempt(f"head alone, {tokens} tokens", 3, partial(alone, tokens))


def reuse(bench: Bench) -> None:
    """Features reused for 2 and 4 steps: whole groups of neighbouring steps in the middle of a run."""
    model, rates, num_iter = sampling_model(bench), [], bench.options.num_iter[-1]
    middle = range(num_iter // 2 - min(4, num_iter // 2), num_iter)[:8]

    def one(every: int) -> None:
        options = SamplerOptions(num_iter=num_iter, cfg=CFG, reuse_features=every)
        baseline = rates[0] if rates else None
        rates.append(time_sampling(bench, model, options, numbers=middle, baseline=baseline)[1])

    for every in (1, 2, 4):
        bench.attempt(f"reuse_features {every}", 6, partial(one, every))
