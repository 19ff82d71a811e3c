"""Training on the GPU: precision, no host sync, exact resume, NaN, compiled, one and two processes, memory."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.gpu.checks import deterministic, largest, tiny_trainer, train_to, trainer_settings, wait_for_host
from tests.helpers import DIGITS_MODEL, REPO, assert_same, tiny_batch, tiny_model, torchrun
from tests.processes import train_scaled
from training.sharding import cannot_shard
from training.state import compile_blocks
from training.step import draw_step
from util import checkpoint, dist
from util.log import JsonlLog

pytestmark = pytest.mark.gpu
BOUNDS = {"bf16": 1e-2, "fp16": 2e-3}  # of the loss, relative to float32; 8 and 11 bits of mantissa


@pytest.mark.parametrize("precision", BOUNDS)
def test_half_precision_losses(device: torch.device, report: Callable, precision: str) -> None:
    """Of an untrained and of the golden model: within the bound of float32; gradients are finite."""
    latents, labels = (x.to(device) for x in tiny_batch(16))
    mask = torch.arange(16, device=device).expand(16, -1) < 13
    for name, model in (("golden", tiny_model()), ("untrained", DIGITS_MODEL(img_size=64))):
        model, losses = model.train().to(device), []
        for p in ("fp32", precision):
            torch.manual_seed(0)
            with dist.float32_precision(device), dist.autocast(device, p):
                losses.append(model(latents, labels, mask, num_masked=13))
        losses[1].backward()
        error = abs(losses[1].item() / losses[0].item() - 1)
        report(f"loss in {precision}, {name} model: {error:.1e} from float32, bound {BOUNDS[precision]:.0e}")
        assert error < BOUNDS[precision] and losses[1].dtype == torch.float32
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, dict(grad_checkpointing=True), dict(head="parallel")], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_never_waits(device: torch.device, precision: str, changes: dict) -> None:
    """The real loop, from the loader's batch to the averages, between its logging steps (fp16's scaler does wait)."""
    s = trainer_settings(precision=precision, ema_warmup=True)
    state, watched = tiny_trainer(device, s, **changes), []

    def after_step() -> None:
        watched.append(state.step)
        wait_for_host(device, "error" if 2 <= state.step < 5 else "default")

    try:
        train_to(state, s, 6, after_step=after_step)
    finally:
        wait_for_host(device, "default")
    assert watched == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_training_is_the_same_bit_for_bit(device: torch.device, precision: str) -> None:
    s = trainer_settings(precision=precision)
    with deterministic():
        whole = train_to(tiny_trainer(device, s), s, 6).snapshot(s.steps_per_epoch)
        half = train_to(tiny_trainer(device, s), s, 3).snapshot(s.steps_per_epoch)
        resumed = tiny_trainer(device, s)
        checkpoint.load_state(resumed.model, half["model"], "half")
        resumed.load_state_dict(half, s.steps_per_epoch, "half")
        again = train_to(resumed, s, 6).snapshot(s.steps_per_epoch)
    for key in ("model", "model_ema", "optimizer", "step", "rng"):
        assert_same(again[key], whole[key])
    assert largest(whole["model"]["z_proj.weight"], half["model"]["z_proj.weight"]) > 0


def test_draws_of_a_step_are_the_same_every_time(device: torch.device) -> None:
    s = trainer_settings()
    a, b, other = (draw_step(tiny_model(), s, step, device) for step in (4, 4, 5))
    assert torch.equal(a.masks, b.masks) and torch.equal(a.noise, b.noise) and torch.equal(a.label_drop, b.label_drop)
    assert not torch.equal(a.noise, other.noise) and a.noise.device.type == device.type
    assert (a.masks.sum(-1) == a.num_masked[0]).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_nan_step_changes_nothing(device: torch.device, precision: str, tmp_path: Path) -> None:
    """NaN moments: weights, averages and moments of AdamW stay, the step is logged as skipped."""
    s = trainer_settings(precision=precision, log_freq=1)
    state = train_to(tiny_trainer(device, s), s, 2)
    before = copy.deepcopy([state.model.state_dict(), state.optimizer.state_dict()["state"]])
    train_to(state, s, 3, log=JsonlLog(tmp_path / "log.jsonl"), spoil_from=0)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["skipped"]
    assert_same([state.model.state_dict(), state.optimizer.state_dict()["state"]], before)
    assert state.skipped.in_row == 1 and all(value.isfinite().all() for value in state.ema.shadow.values())


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("positions, causal", [(16, True), (16, False), (1, False), (320, False)])
def test_flash_attention_serves_every_shape(device: torch.device, head_dim: int, positions: int, causal: bool) -> None:
    """bf16 with dropout (on a CPU without): the head's 16 positions (widths 96, 128), the backbone's (64, 80)."""
    generator = torch.Generator(device).manual_seed(0)
    shape, dropout = (4, 2, positions, head_dim), 0.1 if device.type == "cuda" else 0.0
    q, k, v = torch.randn(3, *shape, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_().unbind()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.no_grad():
            found = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal).float().sum().backward()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=causal)
    assert largest(found, expected) < 0.03


def test_peak_memory(device: torch.device, report: Callable) -> None:
    """Large at batch 64 in bf16, no flag given: below what tools.bench counts on fake tensors."""
    from tools.bench.train import Options, counted_memory, our_loop

    counted = counted_memory("tokenbridge_large", 64)
    total = dist.total_memory_gib(device)
    if total < counted + 2:
        pytest.skip(f"large at batch 64 needs {counted:.1f} GiB of GPU memory, here are {total:.1f}")
    dist.reset_peak_memory(device)
    our_loop(Options(model="tokenbridge_large", batch_size=64), device, "bf16")[1]()
    measured = dist.peak_memory_gib(device)
    report(f"peak memory of a training step, large, batch 64, bf16: {measured:.2f} GiB, counted {counted:.2f} GiB")
    assert measured <= counted


# ---- several processes, compiled: the slow ones last


def processes(device: torch.device, out: Path, count: int, **options: object) -> dict:
    """The checkpoint of `count` processes with their GPUs, joined in a process group even if there is but one."""
    options |= dict(device=device.type, batch_size=16 // count, steps=3)
    env = {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(dist.device_count()))))
    }
    script = REPO / "tests" / "processes" / "train_scaled.py"
    result = torchrun([script, out, json.dumps(options)], nproc=count, timeout=200, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_processes_train_as_one(device: torch.device, report: Callable, tmp_path: Path, count: int, fsdp: bool) -> None:
    """nccl (gloo on a CPU) and FSDP: weights, averages and moments of AdamW of one process without a group."""
    if device.type == "cuda" and dist.device_count() < count:
        pytest.skip(f"{count} processes need as many GPUs, here is {dist.device_count()}")
    if fsdp and cannot_shard(device):
        pytest.skip(cannot_shard(device))
    found = processes(device, tmp_path / "found.pth", count, fsdp=fsdp)
    with dist.float32_precision(device):
        alone = train_scaled.run(tmp_path / "alone.pth", batch_size=8, accum_iter=2, steps=3, device=device.type)
        one = train_scaled.run(tmp_path / "alone.pth", batch_size=16, steps=3, device=device.type)
    expected = alone if count == 2 else one
    error = max(largest(found["model_ema"][name], value) for name, value in expected["model_ema"].items())
    report(f"{count} process(es){', FSDP' * fsdp}: weights {error:.1e} from those of one without a group")
    assert error < 1e-4 and found["step"] == 3
    assert_same({k: v.shape for k, v in found["model"].items()}, {k: v.shape for k, v in expected["model"].items()})


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_compiled_training_is_eager(device: torch.device, report: Callable) -> None:
    """Loss and gradients of two numbers of masked tokens, to 1e-4."""
    eager, compiled = tiny_model().train().to(device), tiny_model().train().to(device)
    compile_blocks(compiled)
    latents, labels = (x.to(device) for x in tiny_batch())
    for masked in (13, 15):
        mask = torch.arange(16, device=device).expand(4, -1) < masked
        losses = [model(latents, labels, mask, num_masked=masked) for model in (eager, compiled)]
        for model, loss in zip((eager, compiled), losses, strict=True):
            model.zero_grad()
            loss.backward()
        pairs = zip(eager.parameters(), compiled.parameters(), strict=True)
        error = max(largest(a.grad, b.grad) for a, b in pairs if a.grad is not None)
        report(f"compiled training, {masked} masked tokens: gradients {error:.1e} from eager's")
        assert losses[1].item() == pytest.approx(losses[0].item(), abs=1e-4) and error < 1e-4
