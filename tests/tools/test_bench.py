"""tools/bench by its counts, never by time: bounds of the optimized parts, baselines that compute the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.inception import write_random_inception
from models import MODELS
from models.quantizer import GaussianQuantizer, quantize
from models.sampling.orders import random_orders
from models.tokenbridge import TokenBridge, mask_from_orders
from tests.helpers import DIGITS_MODEL, tiny_batch, tiny_config, tiny_model
from tools.bench import evaluation as bench_eval
from tools.bench import gpu
from tools.bench.__main__ import build_parser, main
from tools.bench.baselines import baseline_loss
from tools.bench.counting import OpCounter, count, no_fake_gpu
from tools.bench.quantizer import quantize_by_distance
from tools.bench.sample import REUSE, HeadPositions, count_samplers, samplers
from tools.bench.train import SAVINGS, count_training, counted_memory
from training.flops import mean_mask_ratio
from util.cli import run_cli

CPU = torch.device("cpu")
SMALL = "--model tokenbridge_digits --img_size 32 --vae_stride 8 --vae_embed_dim 4 --buffer_size 4 --device cpu"


def rows_of(capsys: pytest.CaptureFixture) -> dict[str, list[str]]:
    """{name: cells} of the printed tables."""
    return {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()}


def test_counter_counts_operations_and_the_largest_tensor() -> None:
    x = torch.zeros(3, 5)
    with OpCounter() as counter:
        y = x + 1
        y = y.unsqueeze(-1) * torch.ones(7, dtype=torch.float64)
        y.sum()
    assert counter.by_name == {"add": 1, "unsqueeze": 1, "ones": 1, "mul": 1, "sum": 1}
    assert (counter.ops, counter.views, counter.work) == (5, 1, 4) and counter.syncs == {}
    assert counter.largest == 3 * 5 * 7 and counter.largest_bytes == 3 * 5 * 7 * 8


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_fill_(x > 0, 1)[x > 2],
        lambda x: x.__setitem__(x > 0, x[x > 0]),
        lambda x: float(x[0, 0]),
        lambda x: int(x.argmax()),
    ],
)
def test_counter_knows_host_syncs(waits) -> None:
    with OpCounter() as counter:
        waits(torch.randn(4, 4))
    assert counter.num_syncs >= 1


def test_counter_lets_other_operations_pass() -> None:
    x, index = torch.randn(4, 4), torch.tensor([0, 2])
    with OpCounter() as counter:
        x[index], x[:, 1:3], torch.where(x > 0, x, 0), x.gather(0, index[None])
        x.masked_fill(x > 0, 1), x.argsort(), x.to(torch.float64)
        x[index] = 0
        x.scatter_(0, index[None], 1.0)
    assert counter.syncs == {} and counter.ops > 8


def test_counting_begins_with_the_module() -> None:
    layer = nn.Linear(3, 2)

    def function() -> None:
        torch.ones(3).sum().item()  # before: not counted
        layer(torch.ones(3)).sum().item()
        layer(torch.ones(3))

    counts = count(function, arm_at=layer)
    assert counts.syncs == {"_local_scalar_dense": 1} and counts.by_name["addmm"] == 2 and counts.by_name["sum"] == 1
    assert counts.flops == 2 * 2 * 3 * 2
    assert not layer._forward_pre_hooks  # nothing stays behind


@pytest.mark.parametrize("bits", [1, 4, 6, 8, 12])
def test_quantizing_makes_no_distance_tensor(bits: int) -> None:
    """No tensor larger than latents or table; the baseline makes one, and agrees but on the edges between cells."""
    values = GaussianQuantizer(bits, -5.0, 5.0).reconstruction_values
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16, 8, 8)).astype(np.float32) * 2)
    with OpCounter() as ours:
        indices = quantize(x, values, -5.0, 5.0)
    with OpCounter() as baseline:
        expected = quantize_by_distance(x, values, -5.0, 5.0)
    assert ours.largest <= max(x.numel(), 8 * len(values)) and ours.syncs == {}
    assert baseline.largest == x.numel() * len(values)
    mapped = (x.double() + 5) / 10 * 6 - 3
    midpoints = (values[:-1] + values[1:]).double() / 2
    near = (mapped.unsqueeze(-1) - midpoints).abs().amin(-1) < 1e-6  # where rounding may decide
    assert torch.equal(indices[~near], expected[~near]) and (indices - expected).abs().max() <= 1
    assert near.double().mean() < 0.02


def orders_and_labels(model: TokenBridge) -> tuple[torch.Tensor, torch.Tensor]:
    return random_orders(2, model.num_tokens, torch.Generator().manual_seed(3)), torch.tensor([3, 7])


@pytest.mark.parametrize(
    "guidance, head_start",
    [
        ((1, 1.0, "linear"), "official"),
        ((4, 3.0, "linear"), "official"),
        ((4, 3.0, "linear"), "trained"),
        ((5, 2.0, "constant"), "trained"),
        ((40, 3.0, "linear"), "trained"),
    ],
)
def test_the_baseline_samples_the_same_tokens(guidance: tuple[int, float, str], head_start: str) -> None:
    """Two passes, no cache, boolean masks: an independent implementation of the sampler gives every token alike."""
    model = tiny_model(head_start=head_start)
    ways = samplers(model, *orders_and_labels(model), *guidance)
    baseline, ours = (model.quantize(way())[0] for way in ways)
    assert torch.equal(baseline, ours)
    assert len(ours.unique()) > 4  # not a trivial picture


def test_counts_on_fake_tensors_are_those_of_a_real_run() -> None:
    """And what they are: each position of the head once per token; no host sync; fewer FLOPs than the baseline."""
    sizes = dict(vae_embed_dim=4, channel_order=[0, 1, 2, 3])
    model, guidance = tiny_model(**sizes), (2, 3.0, "linear")
    fake = count_samplers(lambda: TokenBridge(**tiny_config(**sizes)), 2, guidance, CPU)
    for (counts, _), way in zip(fake, samplers(model, *orders_and_labels(model), *guidance), strict=True):
        real = count(way, arm_at=model.z_proj)
        for name in ("flops", "ops", "syncs", "by_name"):
            assert getattr(counts, name) == getattr(real, name), name
    (baseline, baseline_positions), (ours, our_positions) = fake
    assert (baseline_positions, our_positions) == (1 + 2 + 3 + 4, 4)
    assert ours.syncs == {} and baseline.num_syncs == 6 * 2  # the baseline waits six times a step
    assert 0 < ours.flops < baseline.flops
    assert ours.work < baseline.work  # torch 2.6 counts a view for every ':' too


@pytest.mark.parametrize(
    "temperature, schedule, cfg, labels", [(1.0, "linear", 3.0, [1, 2]), (0.7, "constant", 1.0, None)]
)
def test_no_host_sync_at_any_temperature(temperature: float, schedule: str, cfg: float, labels: list | None) -> None:
    model = tiny_model()
    labels, positions = None if labels is None else torch.tensor(labels), HeadPositions(model)
    arguments = 2, 6, cfg, schedule, labels, temperature
    counts = count(lambda: model.sample_tokens(*arguments, seeds=[1, 2]), arm_at=model.z_proj)
    assert counts.syncs == {} and positions.total == 2 * model.num_tokens * 16


@pytest.mark.slow
def test_sampling_base_within_its_flops() -> None:
    """At most 1.7 TFLOP per image at 8 iterations with guidance, 256 px, 64 levels; the baseline needs 4.3."""
    counted = count_samplers(MODELS["tokenbridge_base"], 1, (8, 3.0, "linear"), CPU)
    (baseline, baseline_positions), (ours, our_positions) = counted
    assert baseline.flops == pytest.approx(4.3e12, rel=0.03) and 1.4e12 < ours.flops <= 1.7e12
    assert (baseline_positions, our_positions, ours.syncs) == (136, 16, {})


def test_more_iterations_cost_the_backbone_only() -> None:
    """A token passes the head once, however many steps there are."""
    model, counted = tiny_model(), []
    for num_iter in (2, 8):
        positions = HeadPositions(model)
        counts = count(lambda n=num_iter: model.sample_tokens(1, n, labels=[1], seeds=[0]))
        counted.append((positions.total, counts.flops))
        positions.handle.remove()
    (few_positions, few), (many_positions, many) = counted
    assert few_positions == many_positions == 16 * model.num_tokens and few < many


def test_training_counts() -> None:
    """The backward pass costs about twice the forward; a larger share of masked tokens moves work to the head."""
    (forward, both), (_, more) = count_training(lambda: TokenBridge(**tiny_config()), 2, [0.7, 1.0], CPU)
    assert 2.5 * forward.flops < both.flops < 3.6 * forward.flops and more.flops > both.flops
    assert both.syncs == forward.syncs == {}
    model = tiny_model().train()
    real = count(lambda: model(*tiny_batch(2), num_masked=12).backward(), arm_at=model.z_proj)
    assert real.flops == both.flops


def test_the_baseline_has_the_same_loss_and_gradients() -> None:
    """An independent implementation of the training step: boolean masks, attention with -inf, head by head."""
    latents, labels = tiny_batch(3)
    drop, orders = torch.tensor([False, True, False]), random_orders(3, 16, torch.Generator().manual_seed(1))
    mask, baseline, ours = mask_from_orders(orders, 13), tiny_model().train(), tiny_model().train()
    losses = baseline_loss(baseline, latents, labels, mask, drop), ours(latents, labels, mask, label_drop=drop)
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(baseline.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_training_base_within_its_flops() -> None:
    """At most 1.27 TFLOP per image, forward + backward, at the expected mask ratio."""
    ((forward, both),) = count_training(MODELS["tokenbridge_base"], 1, [mean_mask_ratio(0.7)], CPU)
    assert 1.0e12 < both.flops <= 1.27e12 and 0.3e12 < forward.flops < 0.45e12
    assert both.syncs == {}


def test_quantizer_table(capsys: pytest.CaptureFixture) -> None:
    main(["quantizer", "--shape", "2", "4", "8", "8", "--bits", "4", "--repeats", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "(2, 4, 8, 8) float32 latents at 16 levels" in out and "100.0000%" in out
    assert "16.0x" not in out.splitlines()[3]


def test_sample_table(capsys: pytest.CaptureFixture) -> None:
    main(["sample", *SMALL.split(), "--num_iter", "3", "--batch_size", "2"])
    rows = rows_of(capsys)
    assert rows["head positions per token"][:2] == ["10", "4"] and rows["host syncs in the loop"][:2] == ["18", "0"]
    assert rows["equal tokens"] == ["100.00%"] and float(rows["seconds per image"][0]) > 0


def test_memory_table(capsys: pytest.CaptureFixture) -> None:
    main(["train", *SMALL.split(), "--memory", "--repeats", "1", "--batch_size", "64"])
    rows = {line[:40].strip(): line[40:].split() for line in capsys.readouterr().out.splitlines()}
    assert all(float(rows[name][0]) > 0 and float(rows[name][1]) > 0 for name in SAVINGS)


def test_train_table(capsys: pytest.CaptureFixture) -> None:
    main(["train", *SMALL.split(), "--layers", "1", "--mask_ratio", "0.8", "--repeats", "1"])
    out = capsys.readouterr().out
    assert "0.8" in out and "13/16" in out and "Whole step" in out and "M parameters" in out
    ours = next(line for line in out.splitlines() if line.startswith("ours "))
    assert ours.split()[-1] == ("-" if no_fake_gpu() else "0")


@pytest.mark.slow
def test_training_counts_of_the_presets(capsys: pytest.CaptureFixture) -> None:
    main(["train", *SMALL.split(), "--flops_only"])
    out = capsys.readouterr().out
    assert "Whole step" not in out and "nothing was computed" in out and "mean 0.867" in out


@pytest.mark.parametrize(
    "command, message",
    [
        ("quantizer --bits 13", "bits must be at most 12, got 13 (--bits)"),
        ("quantizer --range -1", "range must be at least 1e-06, got -1.0 (--range)"),
        ("quantizer --shape 64 0", "shape must be at least 1, got 0 (--shape)"),
        ("quantizer --bits 12 --shape 64 16 64 64", "would take 128 GiB"),
        ("sample --num_iter 0", "num_iter must be at least 1, got 0 (--num_iter)"),
        ("sample --batch_size 0", "batch_size must be at least 1"),
        ("sample --img_size 100 --dry", "img_size 100"),
        ("train --mask_ratio 1.5", "mask_ratio must be at most 1, got 1.5 (--mask_ratio)"),
        ("train --mask_ratio 0", "mask_ratio must be above 0"),
        ("train --quant_bits 0", "quant_bits must be at least 1"),
        ("train --repeats 0", "repeats must be at least 1, got 0 (--repeats)"),
        ("train --device tpu", "--device 'tpu'"),
        ("cache --records 0", "records must be at least 1, got 0 (--records)"),
        ("cache --shape 3 4 4", "shape takes 2C h w"),
        ("gpu --budget 0", "budget must be above 0"),
        ("eval --num_images 9", "num_images must be at least 10"),
        pytest.param("gpu", "no GPU here", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")),
    ],
)
def test_bad_input(command: str, message: str, capsys: pytest.CaptureFixture) -> None:
    assert run_cli(lambda: main(command.split())) == 2
    assert message in capsys.readouterr().err


GPU = f"gpu {SMALL} --others tokenbridge_digits --batch_size 2 --sampling_batch 2 --num_iter 6 --no_compile --repeats 1"


def test_gpu_bench_names_what_it_skips(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has no time for, and a section that fails; those after it are run."""

    def fails(_: object) -> None:
        raise torch.OutOfMemoryError("out of memory\nand more")

    path = tmp_path / "gpu.json"
    monkeypatch.setitem(gpu.SECTIONS, "sampling", (0.26, fails))
    sections = "ceilings", "training", "sampling", "images", "reuse"
    main([*GPU.split(), "--budget", "1", "--json", str(path), "--only", *sections])
    found, out = json.loads(path.read_text()), capsys.readouterr().out
    assert found["rows"] == [] and found["device"] == "cpu"
    skipped = {entry["name"]: entry["reason"] for entry in found["skipped"]}
    assert {"copy bandwidth", "training, eager", "VAE", "reuse_features 2"} <= skipped.keys()
    assert skipped["sampling"] == "OutOfMemoryError: out of memory"
    assert "skipped: training, eager: needs about 10 s, 0 s of its section were left" in out


@pytest.mark.slow
def test_gpu_bench_runs_every_section(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "gpu.json"
    main([*GPU.split(), "--budget", "3000", "--vae_width", "16", "--json", str(path)])
    found = json.loads(path.read_text())
    assert found["skipped"] == [] and all(row["value"] > 0 for row in found["rows"])
    names = " ".join(row["name"] for row in found["rows"])
    for part in ("copy", "matrix", "training digits, batch 2, plain", "training digits, batch 2, eager", "VAE encode"):
        assert part in names
    for part in ("6 iterations, cfg 3.1, batch 2, eager", "1 image(s)", "8 image(s)", "Inception", "reuse_features 4"):
        assert part in names
    assert {len(kernels) for kernels in found["profile"].values()} == {15} and len(found["profile"]) == 2
    eager = [row["baseline"] for row in found["rows"] if row["name"] == "training digits, batch 2, eager"]
    assert len(eager) == 2 and eager[0] > 0 and "TFLOP/s" in capsys.readouterr().out  # the second is of --others


@pytest.mark.skipif(bool(no_fake_gpu()), reason=no_fake_gpu())
def test_gpu_counts_without_a_gpu(capsys: pytest.CaptureFixture) -> None:
    main([*GPU.split(), "--batch_size", "16", "--dry"])
    rows = {line[:44].strip(): line[44:].split() for line in capsys.readouterr().out.splitlines()}
    assert int(rows["step 3 of 6, 1 image(s), cfg 3.1"][0]) == int(rows["step 3 of 6, 2 image(s), cfg 3.1"][0]) > 200
    assert float(rows["training, batch 16, forward"][1]) > 0
    assert 1e-3 < counted_memory("tokenbridge_digits", 1) < 1


def test_unknown_model_lists_what_exists(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["sample", "--model", "tokenbridge_small"])
    assert "tokenbridge_base" in capsys.readouterr().err


def test_cache_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Bytes per image are what the records need and a head; every format is read; a second run keeps the files."""
    command = "cache --records 60 --shape 8 4 4 --batch_size 10 --num_workers 0 --repeats 1 --images 0 --folder"
    main([*command.split(), str(tmp_path)])
    rows = rows_of(capsys)
    sizes = {name: int(cells[-1]) for name, cells in rows.items() if name.startswith(("npz", "shards"))}
    record = 2 * 8 * 4 * 4
    assert sizes.pop("npz tree, float32 (published)") > 4 * record + 200
    needed = dict(zip(sizes, (4 * record, 2 * record, record, record * 6 // 16), strict=True))
    formats = "shards, float32|shards, float16 (default)|shards, mean, float16|shards, indices, 6 bits"
    assert "|".join(sizes) == formats
    stamp = 3 * 8  # size, time and checksum of the image
    assert all(needed[name] + stamp < size < needed[name] + stamp + 60 for name, size in sizes.items()), sizes
    assert all(float(cells[0]) > 0 for name, cells in rows.items() if name.startswith(("npz", "shards", "the float16")))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*0*.*z*") if path.is_file()}
    assert sum(path.suffix == ".npz" for path in before) == 60
    main([*command.split(), str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_what_is_reused_is_not_computed(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Study "reuse": fewer FLOPs than the exact sampler; a confidence order costs more the more it scores."""
    monkeypatch.setitem(MODELS, "tokenbridge_digits", DIGITS_MODEL)  # with one block, little would be reused
    main(["sample", "--study", "reuse", *SMALL.split(), "--num_iter", "6", "--dry"])
    fewer = {name: float(cells[1].rstrip("x")) for name, cells in rows_of(capsys).items() if name in REUSE}
    assert fewer["exact, random order"] == 1 and list(fewer) == list(REUSE)
    assert all(fewer[name] > 1.02 for name in fewer if name.startswith(("reuse", "both")))
    confidence = [value for name, value in fewer.items() if name.startswith("order confidence")]
    assert confidence == sorted(confidence)


@pytest.mark.slow
def test_both_ways_of_evaluating_agree(tmp_path: Path) -> None:
    """In memory and through torch-fidelity's reading of PNGs; scores of features in one and in two processes."""
    weights = write_random_inception(tmp_path / "inception.pth")
    found = bench_eval.compare_paths(bench_eval.Options(num_images=10, img_size=32, batch_size=5), weights, CPU)
    for score in ("fid", "is"):
        assert found[score] == pytest.approx(found[f"baseline {score}"], rel=1e-3)
    assert found["bytes"] > 0 and min(found[key] for key in ("in memory", "write", "read")) > 0
    one, two = (bench_eval.in_processes(world, bench_eval.score_features, 200, 16, False) for world in (1, 2))
    assert all(two[key] == pytest.approx(one[key], rel=1e-6) for key in ("fid", "sfid", "inception_score"))
