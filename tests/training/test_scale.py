"""Ways to train more with less: DDP, accumulation, checkpointing, compilation, sharding; none changes what is learned,
or the checkpoint's layout.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from models.tokenbridge import TokenBridge
from tests.helpers import REPO, fake_gpu, log_of, skip_unless_shardable, tiny_batch, tiny_config, tiny_model
from tests.processes import train_scaled
from tests.processes.forked import run_processes
from tools.bench.counting import OpCounter, count, fake_mode
from training.settings import TrainSettings
from training.state import TrainState, compile_blocks, weight_decay_groups
from training.step import nan_gradients_if_not_finite, optimizer_step
from util import checkpoint

COMPILER = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile on a CPU needs a C++ compiler; none is here",
)


def two_processes(out: Path, timeout: float = 240, **options: object) -> dict:
    """The checkpoint that rank 0 of two writes."""
    if options.get("fsdp"):
        skip_unless_shardable()
    result = run_processes(
        [REPO / "tests" / "processes" / "train_scaled.py", out, json.dumps(options)], nproc=2, timeout=timeout
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(out, weights_only=True)


def assert_close(a: dict, b: dict, atol: float = 2e-5) -> None:
    """Same keys and shapes; equal up to the order of float32 sums. Biases of attention keys, whose gradient is rounding
    alone, are left out.
    """
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        if name.endswith("k_norm.bias"):
            continue
        x, y = a[name], b[name]
        if name.endswith("qkv.bias"):
            x, y = (torch.stack([v.chunk(3)[0], v.chunk(3)[2]]) for v in (x, y))
        assert torch.allclose(x, y, rtol=0, atol=atol), f"{name}: {(x - y).abs().max()}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Four steps of 2 micro-batches of 8 images by one process: what two processes with 8 images each do."""
    return train_scaled.run(tmp_path_factory.mktemp("alone") / "a.pth", batch_size=8, accum_iter=2)


DROPOUT = dict(attn_dropout=0.2, proj_dropout=0.2, head_chunk=40)  # several groups of tokens


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """As `alone` with dropout, and its log."""
    out = tmp_path_factory.mktemp("one") / "a.pth"
    return train_scaled.run(out, batch_size=8, accum_iter=2, **DROPOUT), out.with_suffix(".jsonl")


@pytest.fixture(scope="module")
def alone_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Four steps of 4 micro-batches of 4 images by one process, with dropout."""
    return train_scaled.run(tmp_path_factory.mktemp("alone") / "a.pth", batch_size=4, accum_iter=4, **DROPOUT)


def assert_same_training(found: dict, alone: dict, atol: float = 2e-5) -> None:
    assert found["step"] == alone["step"]
    for key in ("model", "model_ema", "averaged"):
        assert_close(found[key], alone[key], atol)
    for sigma_rel, average in alone["posthoc_ema"].items():
        assert_close(found["posthoc_ema"][sigma_rel], average, atol)
        assert all(
            torch.equal(value, found["posthoc_ema"][sigma_rel][name].half())
            for name, value in found["snapshot"][sigma_rel].items()
        )
    assert found["optimizer"]["state"].keys() == alone["optimizer"]["state"].keys()
    assert all(
        mine["exp_avg"].shape == found["optimizer"]["state"][i]["exp_avg"].shape
        for i, mine in alone["optimizer"]["state"].items()
    )
    assert [group["params"] for group in found["optimizer"]["param_groups"]] == [
        group["params"] for group in alone["optimizer"]["param_groups"]
    ]


def test_the_averaged_model_has_the_ema_and_the_tables(one: tuple[dict, Path]) -> None:
    alone = one[0]
    assert all(torch.equal(value, alone["averaged"][name]) for name, value in alone["model_ema"].items())
    assert all(
        torch.equal(alone["averaged"][name], alone["model"][name])
        for name in ("boundaries", "reconstruction_values", "channel_mask")
    )


@pytest.mark.slow
def test_accumulation_and_checkpointing_under_ddp(alone_with_dropout: dict, tmp_path: Path) -> None:
    """Held gradients, recomputation and dropout together: 2 processes x 2 micro-batches x 4 images are 16 images."""
    found = two_processes(tmp_path / "a.pth", batch_size=4, accum_iter=2, grad_checkpointing=True, **DROPOUT)
    assert_same_training(found, alone_with_dropout)


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_are_one_with_two_micro_batches(one: tuple[dict, Path], tmp_path: Path, fsdp: bool) -> None:
    """Weights, averages, images, losses; with dropout."""
    alone, log = one
    found = two_processes(tmp_path / "two.pth", batch_size=8, fsdp=fsdp, **DROPOUT)
    assert_same_training(found, alone)
    first, second = found["seen"]
    assert [n for i in range(0, 32, 8) for rank in (first, second) for n in rank[i : i + 8]] == alone["seen"][0]
    losses = [[line["loss"] for line in log_of(path.parent, path.name)] for path in (log, tmp_path / "two.jsonl")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5) and len(losses[0]) == 4


@pytest.mark.slow
def test_sharded_training_is_the_same_and_its_checkpoint_too(alone: dict, tmp_path: Path) -> None:
    assert_same_training(two_processes(tmp_path / "a.pth", batch_size=8, fsdp=True), alone)


@pytest.mark.slow
@COMPILER
def test_compiled_and_sharded_is_eager_alone_to_1e_4(alone: dict, tmp_path: Path) -> None:
    """The blocks that are compiled are the units that are cut."""
    assert_same_training(
        two_processes(tmp_path / "a.pth", timeout=900, batch_size=8, fsdp=True, compiled=True), alone, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("first", ["sharded", "alone"])
def test_sharded_and_plain_runs_continue_each_other(tmp_path: Path, first: str) -> None:
    """Two steps one way, two the other, with accumulation and checkpointing where sharded."""
    sharded, plain = (
        dict(batch_size=4, accum_iter=2, fsdp=True, grad_checkpointing=True, **DROPOUT),
        dict(batch_size=4, accum_iter=4, **DROPOUT),
    )
    half, out = tmp_path / "half.pth", tmp_path / "a.pth"
    if first == "sharded":
        two_processes(half, steps=2, **sharded)
        found = train_scaled.run(out, resume=str(half), **plain)
        checkpoint.atomic_save(found, out)
    else:
        checkpoint.atomic_save(train_scaled.run(half, steps=2, **plain), half)
        two_processes(out, resume=str(half), **sharded)
    # the schedule ends at max_steps: compare like with like
    reference = train_scaled.run(tmp_path / "b.pth", steps=2, **plain)
    checkpoint.atomic_save(reference, tmp_path / "b.pth")
    assert_same_training(
        torch.load(out, weights_only=True),
        train_scaled.run(tmp_path / "c.pth", resume=str(tmp_path / "b.pth"), **plain),
    )


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nan_on_one_of_two_processes_stops_both(tmp_path: Path, fsdp: bool) -> None:
    """Rank 1's images are NaN from its third step on; with three bad steps in a row allowed, both end with the same
    words, none hangs.
    """
    if fsdp:
        skip_unless_shardable()
    options, out = dict(batch_size=8, steps=20, fsdp=fsdp, spoil_from=16), tmp_path / "a.pth"
    result = run_processes([REPO / "tests" / "processes" / "train_scaled.py", out, json.dumps(options)], nproc=2)
    assert result.returncode != 0 and not out.exists()
    words = "3 steps in a row had a loss or gradient that is not finite; stopped at step 5 with lr"
    assert result.stderr.count(words) == 2, result.stderr[-3000:]
    assert "grad norm" in result.stderr and "lower the learning rate" in result.stderr


# ---- one process


def gradients(model: TokenBridge) -> tuple[float, dict[str, torch.Tensor]]:
    latents, labels = tiny_batch()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)  # dropout
    loss = model.train()(latents, labels, num_masked=13, generator=generator)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def step_counts(**changes: object) -> OpCounter:
    """Of forward and backward of a tiny model with a deep decoder, on fake tensors."""
    with fake_mode():
        model = TokenBridge(**tiny_config(decoder_depth=8, **changes)).train()
        return count(lambda: model(torch.zeros(8, 16, 4, 4), torch.zeros(8).long(), num_masked=13).backward())


def test_less_memory_with_equal_gradients_and_flops() -> None:
    """A step's bytes: groups of tokens instead of all, norms and GELU recomputed, whole blocks recomputed: ever less.

    With dropout, whose masks are drawn again alike, gradients are equal bit for bit. Only "full" costs FLOPs.
    """
    changes = dict(attn_dropout=0.2, proj_dropout=0.2, label_drop_prob=0.3, head_chunk=16)
    plain, *others = (gradients(tiny_model(grad_checkpointing=x, **changes)) for x in ("none", "selective", "full"))
    for loss, found in others:
        assert loss == plain[0] and all(torch.equal(g, plain[1][name]) for name, g in found.items())
    whole = step_counts(grad_checkpointing="none", head_chunk=0)
    none, selective, full = (
        step_counts(grad_checkpointing=kept, head_chunk=16) for kept in ("none", "selective", "full")
    )
    assert full.peak_bytes < selective.peak_bytes < 0.8 * none.peak_bytes < 0.8 * 0.6 * whole.peak_bytes
    assert whole.flops == none.flops == selective.flops < full.flops


@pytest.mark.slow
@COMPILER
def test_compiled_is_eager_to_1e_4() -> None:
    loss, plain = gradients(tiny_model(label_drop_prob=0.3))
    model = tiny_model(label_drop_prob=0.3)
    compile_blocks(model)
    again, found = gradients(model)
    assert again == pytest.approx(loss, abs=1e-4)
    assert all(torch.allclose(plain[name], found[name], rtol=1e-4, atol=1e-4) for name in plain)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_metrics_by_dimension_are_those_of_the_logits() -> None:
    model, (latents, labels) = tiny_model(), tiny_batch()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, :13] = True
    loss, losses, accuracy = model(latents, labels, mask, return_metrics=True)
    details = model(latents, labels, mask, return_details=True)
    targets = details.tokens[:, :13].flatten(0, 1)[:, model.channel_order]
    right = details.logits.argmax(-1) == targets
    by_hand = -details.logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1))[..., 0].mean(0)
    assert torch.allclose(losses.double(), by_hand, atol=1e-5) and torch.allclose(accuracy, right.float().mean(0))
    assert (
        loss.item() == pytest.approx(float(by_hand.mean()), abs=1e-5)
        and loss.requires_grad
        and not losses.requires_grad
    )


def test_a_loss_that_is_not_finite_spoils_every_gradient() -> None:
    """Also where its own path would give a finite one."""
    w = torch.ones(3, requires_grad=True)
    nan_gradients_if_not_finite(w.sum() + 0 * torch.tensor(float("nan"))).backward()
    assert w.grad.isnan().all()
    w.grad = None
    nan_gradients_if_not_finite(w.sum()).backward()
    assert torch.equal(w.grad, torch.ones(3))


def test_learning_and_stepping_never_wait_for_a_gpu() -> None:
    """The host syncs of a forward pass with metrics, and of clipping, AdamW's step and the averages, on fake GPU
    tensors: none.

    The backward pass on fake GPU tensors needs a CUDA build that this machine may lack; its operations are the
    forward's transposes.
    """
    with fake_gpu(allow_non_fake_inputs=True), torch.device("cuda"):
        model = tiny_model_on_gpu()
        state = TrainState(model, TrainSettings(precision="bf16", ema_warmup=True, posthoc_ema_freq=1))
        latents, labels = torch.zeros(4, 16, 4, 4), torch.zeros(4, dtype=torch.long)
        mask, drop = torch.ones(4, 16, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
        counter = OpCounter()
        with counter, torch.autocast("cuda", torch.bfloat16):
            nan_gradients_if_not_finite(
                model(latents, labels, mask, num_masked=12, label_drop=drop, return_metrics=True)[0]
            )
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with counter:
            optimizer_step(state, list(model.parameters()), 3.0)
            state.step = 7
            state.update_averages()
    assert counter.ops > 100 and counter.syncs == {}


def tiny_model_on_gpu() -> torch.nn.Module:
    return TokenBridge(**tiny_config(head_chunk=0)).train()  # groups have a backward pass


def test_every_parameter_is_in_one_group() -> None:
    model = tiny_model()
    groups = weight_decay_groups(model, 0.02)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
