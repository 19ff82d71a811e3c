"""Sections "training" and "others" of `python -m tools.bench gpu`: images/s of training steps."""

from functools import partial

import torch

from tools.bench.baselines import baseline_step
from tools.bench.counting import OpCounter, timed
from tools.bench.gpu_results import Bench
from tools.bench.train import STEPS_PER_CALL, counted_memory, our_loop
from training.flops import step_flops
from training.step import masked_counts
from util import dist


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
            dist.reset_peak_memory(bench.device)
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


def largest_batch(bench: Bench, name: str) -> int:
    """The largest multiple of 32 that fits into 90 % of the memory, from counts of batches 16 and 32; 0 on a CPU."""
    total = dist.total_memory_gib(bench.device)
    if not total:
        return 0
    small, large = (counted_memory(name, batch) for batch in (16, 32))
    return int(16 + 16 * (0.9 * total - small) / (large - small)) // 32 * 32
