"""`python -m tools.bench gpu`: one GPU in a few minutes: ceilings, training, sampling, latency, kernels.

Sections run in order of worth; each has a share of --budget seconds, and what it leaves goes to the next. A case that
is expected to take longer than its section has left is skipped and named. One table; every result is written to --json
at once.
"""

import contextlib
import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from evaluation.inception import InceptionFeatures, write_random_inception
from models import MODELS
from models.sampling.loop import Sampler, sampling_noise
from models.sampling.options import SamplerOptions
from models.sampling.schedules import guidance_scale, unmasking_plan
from models.tokenbridge import TokenBridge
from models.vae import AutoencoderKL
from tools.bench.baselines import baseline_head, baseline_sampling_step, baseline_step
from tools.bench.counting import OpCounter, count, on_fake_gpu, print_table, timed
from tools.bench.evaluation import smooth_images
from tools.bench.options import REPEATS, ModelOptions
from tools.bench.train import GIB, STEPS_PER_CALL, forward_pass, our_loop, step_gib
from tools.bench.train import Options as TrainOptions
from training.flops import mean_masked, peak_tflops, step_flops
from training.step import masked_counts
from util import dist
from util.cli import check_writable
from util.files import write_json
from util.log import first_line
from util.options import ArgumentError, option

# Share of the budget, in order of worth.
SECTIONS = {
    "ceilings": 0.04,
    "training": 0.3,
    "sampling": 0.26,
    "interactive": 0.14,
    "profile": 0.06,
    "head": 0.05,
    "images": 0.05,
    "reuse": 0.05,
    "others": 0.05,
}
SAMPLED_STEPS = 6  # of the sampler's, evenly spaced; the rest is extrapolated
PAPER_HEAD = "paper, A100, batch not stated: 52.42 ms; a diffusion head 311.25 ms"
CFG = 3.1


@dataclass
class Options(ModelOptions):
    """What is measured and for how long. On a CPU give a small model: the same code runs."""

    model: str = option("tokenbridge_large", choices=list(MODELS))
    repeats: int = option(2, REPEATS, lowest=1)
    others: tuple[str, ...] = option(
        ("tokenbridge_base", "tokenbridge_huge"), "models whose training is timed last", choices=list(MODELS), nargs="*"
    )
    batch_size: int = option(64, "of training", lowest=1)
    sampling_batch: int = option(256, "images sampled together", lowest=1)
    num_iter: tuple[int, ...] = option((256, 64), "sampling iterations", lowest=1, nargs="+")
    budget: float = option(360.0, "seconds", above=0)
    only: tuple[str, ...] = option((), "these sections", choices=tuple(SECTIONS), nargs="+")
    json: str = option("gpu_bench.json", "file of the results")
    no_compile: bool = option(False, "leave out what compiles")
    vae_width: int = option(128, "of the VAE with random weights; KL-16 has 128", lowest=8)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_writable(str(Path(self.json).absolute().parent), "--json")

    def of_model(self, name: str, batch_size: int, compile: bool = False) -> TrainOptions:
        """Options of `tools.bench train`."""
        sizes = ("img_size", "vae_stride", "vae_embed_dim", "buffer_size", "quant_bits", "seed")
        same = {key: getattr(self, key) for key in sizes}
        return TrainOptions(model=name, batch_size=batch_size, compile=compile, device=self.device, **same)


@dataclass
class Bench:
    """Device, clock and results. `rows` of the table: name, value, unit and what else is known."""

    options: Options
    device: torch.device
    precision: str
    started: float = field(default_factory=time.perf_counter)
    deadline: float = 0.0  # of the section, seconds after the start
    results: dict = field(default_factory=dict)

    def record(self, name: str, value: float, unit: str, **more: object) -> None:
        """One more row, in the file at once."""
        self.results["rows"].append({"name": name, "value": value, "unit": unit, **more})
        self.results["seconds"] = time.perf_counter() - self.started
        write_json(self.options.json, self.results)
        print(f"{self.results['seconds']:6.0f} s  {name}: {value:.4g} {unit}", flush=True)

    def left(self) -> float:
        """Seconds that the section has left."""
        return self.deadline - (time.perf_counter() - self.started)

    def attempt(self, name: str, expected: float, case: Callable[[], object]) -> None:
        """Run a case if it is expected to end in time; otherwise, or if it fails, name it with the reason."""
        reason = f"needs about {expected:.0f} s, {max(0, self.left()):.0f} s of its section were left"
        if self.left() >= expected:
            try:
                case()
                reason = ""
            except Exception as error:  # the cases after it are worth their time
                reason = f"{type(error).__name__}: {first_line(str(error))}"
        if reason:
            self.results["skipped"].append({"name": name, "reason": reason})
            write_json(self.options.json, self.results)
            print(f"        skipped {name}: {reason}", flush=True)
        gc.collect()
        with contextlib.suppress(RuntimeError):  # after an error that the device keeps
            dist.free_memory(self.device)

    @property
    def ceiling(self) -> float | None:
        """TFLOP/s of the measured matrix product."""
        return self.results.get("matmul_tflops")

    def speed(self, tflop: float, seconds: float) -> dict[str, float]:
        """TFLOP/s, and its share of the maker's peak (MFU) and of the measured ceiling."""
        rate, peak = tflop / seconds, peak_tflops(dist.device_name(self.device), self.precision)
        more = {"tflops": rate} | ({"mfu": rate / peak} if peak else {})
        return more | ({"of_ceiling": rate / self.ceiling} if self.ceiling else {})


def run(options: Options) -> None:
    """The sections; the table of what was measured, and what was skipped. With --dry what is launched, counted."""
    if options.dry:
        return count_steps(options)
    device = dist.init(options.device)
    if device.type == "cpu" and options.device == "auto":  # the default sizes need the memory of a GPU
        raise ArgumentError("device", "there is no GPU here: give dry to count, or device cpu and a small model")
    precision = dist.pick_precision(options.precision, device)
    bench = Bench(options, device, precision)
    about = {"device": dist.device_name(device), "torch": torch.__version__, "precision": precision}
    bench.results |= about | {"budget": options.budget, "model": options.model, "rows": [], "skipped": []}
    chosen = [name for name in SECTIONS if name in (options.only or SECTIONS)]
    total = sum(SECTIONS[name] for name in chosen)
    try:
        for name in chosen:
            bench.deadline += options.budget * SECTIONS[name] / total
            bench.attempt(name, -math.inf, partial(RUN[name], bench))  # its cases have times of their own
    finally:  # also when it is stopped
        print_results(bench)


def print_results(bench: Bench) -> None:
    """One table; what was skipped below it."""
    columns, rows = ["value", "unit", "plain loop", "ratio", "TFLOP/s", "MFU", "of ceiling"], []
    for row in bench.results["rows"]:
        plain, value = row.get("baseline"), row["value"]
        faster = "" if not plain else f"{(plain / value if row['unit'] in ('s', 'ms') else value / plain):.2f}x"
        cells = [f"{value:.4g}", row["unit"], f"{plain:.4g}" if plain else "", faster]
        cells += [f"{row['tflops']:.0f}" if "tflops" in row else ""]
        rows.append((row["name"], cells + [f"{row[key]:.0%}" if key in row else "" for key in ("mfu", "of_ceiling")]))
    r = bench.results
    print_table(f"{r['device']}, torch {r['torch']}, {r['precision']}", columns, rows, first_width=62, width=12)
    for entry in r["skipped"]:
        print(f"skipped: {entry['name']}: {entry['reason']}")
    notes = {note for row in r["rows"] for note in [row.get("note")] if note}
    print("\n".join(sorted(notes)))


# ---- ceilings


def ceilings(bench: Bench) -> None:
    """Copy bandwidth (read and written) and the bf16 matrix product."""
    device, small = bench.device, bench.device.type == "cpu"

    def copy() -> None:
        a = torch.empty(2**22 if small else 2**30, dtype=torch.float32, device=device).normal_()
        b = torch.empty_like(a)
        (seconds,) = timed([lambda: b.copy_(a)], 10, device, warm_up=2)
        bench.record("copy bandwidth", 2 * 4 * a.numel() / seconds / 1e9, "GB/s")

    def matmul() -> None:
        n = 512 if small else 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        (seconds,) = timed([lambda: [a @ b for _ in range(10)]], 5, device, warm_up=2)
        bench.results["matmul_tflops"] = 10 * 2 * n**3 / seconds / 1e12
        bench.record(f"bf16 matrix product, {n} x {n}", bench.results["matmul_tflops"], "TFLOP/s")

    bench.attempt("copy bandwidth", 0.5, copy)
    bench.attempt("matrix product", 0.5, matmul)


# ---- training


def time_training(bench: Bench, name: str, batch_size: int, compile: bool, baseline: float | None = None) -> float:
    """Record images/s of our loop; FLOPs are those of the mask ratios that were drawn."""
    options = bench.options.of_model(name, batch_size, compile)
    state, steps = our_loop(options, bench.device, bench.precision)
    warm_up = 1 + compile  # another number of masked tokens may compile again
    (seconds,) = timed([steps], bench.options.repeats, bench.device, warm_up)
    timed_steps = range(warm_up * STEPS_PER_CALL, state.step)
    counts = [masked_counts(state.model, options.seed, step, 1)[0] for step in timed_steps]
    tflop = sum(step_flops(state.model.config, count) for count in counts) / len(counts) * batch_size / 1e12
    rate = STEPS_PER_CALL * batch_size / seconds
    more = bench.speed(tflop * STEPS_PER_CALL, seconds) | {"peak_gib": dist.peak_memory_gib(bench.device)}
    title = f"training {short(name)}, batch {batch_size}, {'compiled' if compile else 'eager'}"
    bench.record(title, rate, "images/s", baseline=baseline, **more)
    return rate


def time_training_baseline(bench: Bench, name: str, batch_size: int) -> float:
    """Images/s of the plain loop, at the largest batch up to `batch_size` that fits."""
    while True:
        options = bench.options.of_model(name, batch_size)
        try:
            vae, batch = options.small_vae().to(bench.device), options.batch(bench.device)
            model = options.built(bench.device).train()
            step = baseline_step(model, vae, batch, options.seed, bench.precision, OpCounter())
            (seconds,) = timed([step], 3 * bench.options.repeats, bench.device, warm_up=2)
            break
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            model = step = None
            dist.free_memory(bench.device)
    bench.record(f"training {short(name)}, batch {batch_size}, plain loop", batch_size / seconds, "images/s")
    return batch_size / seconds


def short(name: str) -> str:
    """Without the family's name."""
    return name.removeprefix("tokenbridge_")


def training(bench: Bench) -> None:
    """The main model: plain loop, eager, compiled, and the largest batch that is counted to fit."""
    o, found = bench.options, {}

    def baseline() -> None:
        found["baseline"] = time_training_baseline(bench, o.model, o.batch_size)

    bench.attempt("training, plain loop", 12, baseline)
    way = partial(time_training, bench, o.model, baseline=found.get("baseline"))
    bench.attempt("training, eager", 10, lambda: way(batch_size=o.batch_size, compile=False))
    if not o.no_compile:
        bench.attempt("training, compiled", 45, lambda: way(batch_size=o.batch_size, compile=True))
    largest = largest_batch(bench, o.model)
    if largest > o.batch_size:
        best = not o.no_compile
        bench.attempt(f"training, batch {largest}", 15, lambda: way(batch_size=largest, compile=best))


def others(bench: Bench) -> None:
    """The other models, eager and compiled."""
    for name in bench.options.others:
        for compile in (False, *(() if bench.options.no_compile else (True,))):
            way = partial(time_training, bench, name, bench.options.batch_size, compile)
            bench.attempt(f"training {short(name)}{', compiled' * compile}", 40 if compile else 12, way)


def counted_memory(name: str, batch_size: int) -> float:
    """GiB that a step in bf16 with dropout is counted to need: weights, EMA, AdamW's moments, the forward and the
    backward pass with gradients and half-precision copies of weights."""
    with torch.device("meta"):
        numbers = sum(p.numel() for p in MODELS[name]().parameters())
    return 4 * 4 * numbers / GIB + step_gib(name, batch_size)


def measured_memory(name: str, batch_size: int, device: torch.device) -> float:
    """Peak GiB of a few training steps in bf16."""
    dist.free_memory(device)
    _, steps = our_loop(TrainOptions(model=name, batch_size=batch_size), device, "bf16")
    steps()
    return dist.peak_memory_gib(device)


def largest_batch(bench: Bench, name: str) -> int:
    """The largest multiple of 32 that fits into 90 % of the memory, from counts of batches 16 and 32; 0 on a CPU."""
    total = dist.total_memory_gib(bench.device)
    if not total:
        return 0
    small, large = (counted_memory(name, batch) for batch in (16, 32))
    return int(16 + 16 * (0.9 * total - small) / (large - small)) // 32 * 32


# ---- sampling


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

        def one(way: str, num_iter: int = num_iter, found: dict = found) -> None:
            settings = SamplerOptions(num_iter=num_iter, cfg=CFG, compile=way == "compiled")
            tflop, rate = time_sampling(bench, model, settings, plain=way == "plain loop", **found)
            found.setdefault("baseline", rate)
            if way == "eager":
                found["tflop"] = tflop

        for way, expected in (("plain loop", 12), ("eager", 8), ("compiled", 30)):
            if way != "compiled" or (not bench.options.no_compile and "tflop" in found):
                bench.attempt(f"sampling, {num_iter} iterations, {way}", expected, partial(one, way))


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


# ---- the rest


def profile(bench: Bench) -> None:
    """The 15 kernels that take longest, of training steps and of a sampling step."""
    from torch.profiler import ProfilerActivity, profile

    device, o = bench.device, bench.options
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])

    def top(name: str, way: Callable[[], object]) -> None:
        way()
        with profile(activities=activities) as found:
            way()
            dist.synchronize(device)
        on_gpu = device.type == "cuda"
        events = [e for e in found.key_averages() if not on_gpu or "cuda" in str(e.device_type).lower()]
        events = [e for e in events if not getattr(e, "is_user_annotation", False)]  # they span kernels
        times = {
            e.key: ((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, e.count) for e in events
        }
        total, ranked = sum(ms for ms, _ in times.values()), sorted(times.items(), key=lambda item: -item[1][0])[:15]
        kernels = [{"kernel": key, "ms": ms, "count": n, "share": ms / total} for key, (ms, n) in ranked]
        bench.results.setdefault("profile", {})[name] = kernels
        bench.record(f"profile: {name}, all kernels", total, "ms")
        rows = [(k["kernel"][:88], [f"{k['ms']:.2f}", f"{k['count']}", f"{k['share']:.1%}"]) for k in kernels]
        print_table(f"{name}: the 15 kernels that take longest", ["ms", "calls", "share"], rows, 90, 10)

    def trained() -> None:
        _, steps = our_loop(o.of_model(o.model, o.batch_size), device, bench.precision)
        top(f"{STEPS_PER_CALL} training steps", steps)

    def sampled() -> None:
        with dist.autocast(device, bench.precision):
            num_iter = o.num_iter[-1]
            steps = Steps(
                sampling_model(bench), o.sampling_batch, SamplerOptions(num_iter=num_iter, cfg=CFG), [num_iter // 2]
            )
            top(f"a sampling step of {num_iter}", steps)

    bench.attempt("profile of training", 10, trained)
    bench.attempt("profile of sampling", 5, sampled)


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


def images(bench: Bench) -> None:
    """Images/s of the VAE's encoder and decoder and of Inception (random weights, float32; TF32 only in the VAE)."""
    o, device = bench.options, bench.device
    batch = min(o.batch_size, 64)

    def measured(name: str, way: Callable[[], object]) -> None:
        with torch.no_grad():
            (seconds,) = timed([way], o.repeats, device, warm_up=2)
        bench.record(f"{name}, batch {batch}", batch / seconds, "images/s")

    def vae() -> None:
        with torch.device(device):
            network = AutoencoderKL(embed_dim=o.vae_embed_dim, ch=o.vae_width, norm_groups=min(32, o.vae_width // 2))
        network = network.eval().to(memory_format=torch.channels_last)
        pixels = torch.randn(batch, 3, o.img_size, o.img_size, device=device).to(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = network.encode(pixels).mean
        measured("VAE encode, float32", lambda: network.encode(pixels))
        measured("VAE decode, float32", lambda: network.decode(latents))

    def inception() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extractor = InceptionFeatures(str(write_random_inception(Path(folder) / "inception.pth")), device)
        pixels = smooth_images(batch, o.img_size, 0).to(device)
        measured("Inception features, float32", lambda: extractor(pixels))

    bench.attempt("VAE", 8, vae)
    bench.attempt("Inception", 6, inception)


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


# ---- counted


def count_steps(options: Options) -> None:
    """Kernels and bytes of a sampling step and of a training step's forward pass, on fake GPU tensors."""
    precision, rows = options.precision or "bf16", []
    with on_fake_gpu(precision), torch.no_grad():
        train = options.of_model(options.model, options.batch_size)
        for images, num_iter in ((1, options.num_iter[-1]), *((options.sampling_batch, n) for n in options.num_iter)):
            model = train.build_model().eval().requires_grad_(False)
            steps = Steps(model, images, SamplerOptions(num_iter=num_iter, cfg=CFG), [num_iter // 2])
            rows.append((f"step {num_iter // 2} of {num_iter}, {images} image(s), cfg {CFG}", count(steps)))
        model, masked = train.build_model().train(), mean_masked(model.config)
        forward = count(partial(forward_pass, model, options.batch_size, masked, None))
        rows.append((f"training, batch {options.batch_size}, forward", forward))
    cells = [(name, [f"{c.launches}", f"{c.bytes / 1e9:.2f}", f"{c.flops / 1e12:.3f}"]) for name, c in rows]
    title = f"{options.model}, {precision}, eager; counted on fake GPU tensors, nothing was computed (--dry)"
    print_table(title, ["kernels", "GB moved", "TFLOP"], cells, first_width=44)


RUN = {
    section.__name__: section
    for section in (ceilings, training, sampling, interactive, profile, head, images, reuse, others)
}
