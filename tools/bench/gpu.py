"""`python -m tools.bench gpu`: one GPU in a few minutes: ceilings, training, sampling, latency, kernels.

Sections run in order of worth; each has a share of --budget seconds, and what it leaves goes to the next. A case that
is expected to take longer than its section has left is skipped and named. One table; every result is written to --json
at once.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch

from models.sampling.options import SamplerOptions
from tools.bench.counting import count, on_fake_gpu, print_table
from tools.bench.gpu_parts import ceilings, images, profile
from tools.bench.gpu_results import Bench, GpuOptions, print_results
from tools.bench.gpu_sampling import CFG, Steps, head, interactive, reuse, sampling
from tools.bench.gpu_training import others, training
from tools.bench.train import forward_pass
from training.flops import mean_masked
from util import dist
from util.options import ArgumentError, option

SECTIONS = {  # name: share of the budget, function; in order of worth
    "ceilings": (0.04, ceilings),
    "training": (0.3, training),
    "sampling": (0.26, sampling),
    "interactive": (0.14, interactive),
    "profile": (0.06, profile),
    "head": (0.05, head),
    "images": (0.05, images),
    "reuse": (0.05, reuse),
    "others": (0.05, others),
}


@dataclass
class Options(GpuOptions):
    """What is measured and for how long. On a CPU give a small model: the same code runs."""

    only: tuple[str, ...] = option((), "these sections", choices=tuple(SECTIONS), nargs="+")


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
    chosen = {name: section for name, section in SECTIONS.items() if name in (options.only or SECTIONS)}
    total = sum(share for share, _ in chosen.values())
    try:
        for name, (share, section) in chosen.items():
            bench.deadline += options.budget * share / total
            bench.attempt(name, -math.inf, partial(section, bench))  # its cases have times of their own
    finally:  # also when it is stopped
        print_results(bench)


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
