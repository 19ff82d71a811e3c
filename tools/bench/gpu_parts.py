"""Sections "ceilings", "profile" and "images" of `python -m tools.bench gpu`: device, kernels, VAE, Inception."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import profiler
from torch.profiler import ProfilerActivity

from evaluation.inception import InceptionFeatures, write_random_inception
from models.sampling.options import SamplerOptions
from models.vae import AutoencoderKL
from tools.bench.counting import print_table, timed
from tools.bench.evaluation import smooth_images
from tools.bench.gpu_results import Bench
from tools.bench.gpu_sampling import CFG, Steps, sampling_model
from tools.bench.train import STEPS_PER_CALL, our_loop
from util import dist


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


def profile(bench: Bench) -> None:
    """The 15 kernels that take longest, of training steps and of a sampling step."""
    device, o, num_iter = bench.device, bench.options, bench.options.num_iter[-1]

    def trained() -> None:
        _, steps = our_loop(o.of_model(o.model, o.batch_size), device, bench.precision)
        rank_kernels(bench, f"{STEPS_PER_CALL} training steps", steps)

    def sampled() -> None:
        options = SamplerOptions(num_iter=num_iter, cfg=CFG)
        with dist.autocast(device, bench.precision):
            steps = Steps(sampling_model(bench), o.sampling_batch, options, [num_iter // 2])
            rank_kernels(bench, f"a sampling step of {num_iter}", steps)

    bench.attempt("profile of training", 10, trained)
    bench.attempt("profile of sampling", 5, sampled)


def rank_kernels(bench: Bench, name: str, way: Callable[[], object]) -> None:
    """Record the kernels of one call of `way` (on a CPU the operations), and print those that take longest."""
    on_gpu = bench.device.type == "cuda"
    way()
    with profiler.profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        way()
        dist.synchronize(bench.device)
    events = [e for e in profiled.key_averages() if not on_gpu or "cuda" in str(e.device_type).lower()]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]  # they span kernels
    times = {e.key: ((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e3, e.count) for e in events}
    total, ranked = sum(ms for ms, _ in times.values()), sorted(times.items(), key=lambda item: -item[1][0])[:15]
    kernels = [{"kernel": key, "ms": ms, "count": n, "share": ms / total} for key, (ms, n) in ranked]
    bench.results.setdefault("profile", {})[name] = kernels
    bench.record(f"profile: {name}, all kernels", total, "ms")
    rows = [(k["kernel"][:88], [f"{k['ms']:.2f}", f"{k['count']}", f"{k['share']:.1%}"]) for k in kernels]
    print_table(f"{name}: the 15 kernels that take longest", ["ms", "calls", "share"], rows, 90, 10)


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
