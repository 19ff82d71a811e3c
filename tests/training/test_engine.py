"""The training loop: draws, groups, schedules, skipped steps; processes and micro-batches stand for each other.
Generation.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch import Tensor

import engine_tokenbridge
from generation.pipeline import GenerationSettings, generate_batches
from generation.sample import balanced_labels
from models.tokenbridge import TokenBridge
from tests.helpers import tiny_model, tiny_vae
from tests.processes import train_tiny
from training import step as training_step
from training.guard import SkippedSteps
from training.lr_sched import learning_rate
from training.progress import Progress
from training.settings import TrainSettings
from training.state import TrainState, weight_decay_groups
from training.step import draw_step, masked_counts, optimizer_step
from util import dist
from util.log import JsonlLog
from util.seeds import mixed_seed

CPU = torch.device("cpu")


def assert_close(mine: dict, other: dict) -> None:
    """Equal up to the order of float32 sums, which ten steps of AdamW may carry to 2e-5.

    Biases of attention keys are left out: a softmax does not feel them, their gradient is 0 but for rounding, and AdamW
    makes steps of full size out of its noise.
    """
    assert mine.keys() == other.keys()
    for name in mine:
        if name.endswith("k_norm.bias"):
            continue
        a, b = mine[name], other[name]
        if name.endswith("qkv.bias"):
            a, b = (torch.stack([x.chunk(3)[0], x.chunk(3)[2]]) for x in (a, b))
        assert torch.allclose(a, b, rtol=0, atol=2e-5), f"{name}: {(a - b).abs().max()}"


# ---- draws


def test_draws_depend_on_seed_and_step_alone() -> None:
    model, s = tiny_model(label_drop_prob=0.3), train_tiny.settings(8, 1, 10)
    torch.manual_seed(1)
    one = draw_step(model, s, 4, CPU)
    torch.manual_seed(2)
    same, next_step, other_seed = (
        draw_step(model, s, 4, CPU),
        draw_step(model, s, 5, CPU),
        draw_step(model, train_tiny.settings(8, 1, 10, seed=8), 4, CPU),
    )
    for name in ("masks", "label_drop", "noise"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.noise, next_step.noise) and not torch.equal(one.noise, other_seed.noise)


def test_every_image_of_a_micro_batch_has_the_same_number_of_masked_tokens() -> None:
    model, s = tiny_model(), train_tiny.settings(6, 2, 10)
    counts = set()
    for step in range(40):
        draws = draw_step(model, s, step, CPU)
        assert draws.masks.shape == (2, 6, 16) and draws.noise.shape == (2, 6, 16, 4, 4)
        assert (
            draws.masks.sum(-1).tolist() == [[count] * 6 for count in draws.num_masked]
            and draws.counts == draws.num_masked
        )
        counts.update(draws.num_masked)
    assert min(counts) >= math.ceil(16 * 0.7) and max(counts) <= 16 and len(counts) > 2


def test_labels_are_dropped_at_the_rate() -> None:
    model, s = tiny_model(label_drop_prob=0.25), train_tiny.settings(48, 1, 10)
    share = torch.stack([draw_step(model, s, step, CPU).label_drop for step in range(100)]).float().mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4800)


def draws_of(
    monkeypatch: pytest.MonkeyPatch, model: TokenBridge, size: int, world: int, accum: int, step: int = 2
) -> dict[int, tuple[int, list[Tensor]]]:
    """Masked tokens and draws of every micro-batch of `size` images, by its number in the global batch."""
    monkeypatch.setattr(dist, "world_size", lambda: world)
    found = {}
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        draws = draw_step(model, train_tiny.settings(size, accum, 10, steps_per_epoch=2), step, CPU)
        assert len(draws.counts) == world * accum
        for micro in range(accum):
            number = micro * world + rank  # as GlobalBatchSampler deals the images
            assert draws.num_masked[micro] == draws.counts[number] == int(draws.masks[micro, 0].sum())
            found[number] = draws.num_masked[micro], [draws.masks[micro], draws.label_drop[micro], draws.noise[micro]]
    return found


@pytest.mark.parametrize("world, accum", [(4, 2), (2, 4), (1, 8)])
def test_processes_and_micro_batches_draw_the_same(monkeypatch: pytest.MonkeyPatch, world: int, accum: int) -> None:
    """8 processes x 1 micro-batch, 4 x 2, 2 x 4, 1 x 8: the same ratios, masks, dropped labels and noise for the same
    images.
    """
    model = tiny_model(label_drop_prob=0.3)
    eight, split = (draws_of(monkeypatch, model, 3, *layout) for layout in ((8, 1), (world, accum)))
    assert eight.keys() == split.keys() == set(range(8))
    for number, (count, tensors) in eight.items():
        assert split[number][0] == count and all(
            torch.equal(a, b) for a, b in zip(tensors, split[number][1], strict=True)
        )


def test_the_size_of_the_micro_batches_changes_the_mask_ratios_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(label_drop_prob=0.3)
    one, four = draws_of(monkeypatch, model, 24, 1, 1), draws_of(monkeypatch, model, 6, 4, 1)
    for i, part in enumerate(("drop", "noise"), 1):
        assert torch.equal(one[0][1][i], torch.cat([four[number][1][i] for number in range(4)])), part
    masks = torch.cat([four[number][1][0] for number in range(4)])
    common = torch.minimum(masks.sum(1), torch.tensor(one[0][0]))
    # the same order: the smaller mask is a part of the larger
    assert torch.equal((masks & one[0][1][0]).sum(1), common)
    assert len({count for count, _ in four.values()}) > 1


def test_32_ranks_draw_ratios_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 60 steps: a truncated normal by the Kolmogorov-Smirnov test (bound of 0.1 %), its mean, and no correlation
    of neighbours.

    With L = 256 tokens ceil(L * ratio) <= k is ratio <= k / L, so that the counts' distribution is exact at the
    multiples of 1 / L.
    """
    model = tiny_model(img_size=256)
    assert model.num_tokens == 256
    one_step = draws_of(monkeypatch, model, 1, 32, 1)
    assert len({count for count, _ in one_step.values()}) > 16  # of 78 possible values
    counts = np.array([masked_counts(model, 7, step, 32) for step in range(60)])
    assert list(counts[2]) == [one_step[rank][0] for rank in range(32)]
    law = truncnorm(-1.2, 0, loc=1, scale=0.25)
    grid = np.arange(180, 257)
    empirical = (counts.reshape(1, -1) <= grid[:, None]).mean(1)
    assert np.abs(empirical - law.cdf(grid / 256)).max() < 1.95 / math.sqrt(counts.size)
    assert abs((counts / 256).mean() - (law.mean() + 0.5 / 256)) < 4 * law.std() / math.sqrt(counts.size)
    for a, b in ((counts[:, :-1], counts[:, 1:]), (counts[:-1], counts[1:])):  # of ranks, of steps
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / math.sqrt(a.size)


def test_flops_count_every_micro_batch_of_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(engine_tokenbridge, "step_flops", lambda _, num_masked: counted.append(num_masked) or 1.0)
    train_tiny.run(4, 3, 2)
    expected = [masked_counts(tiny_model(), 7, step, 3) for step in range(2)]
    assert counted == expected[0] + expected[1] and len(set(counted)) > 1


# ---- steps


def test_no_decay_for_biases_and_vectors() -> None:
    model = tiny_model()
    plain, decayed = weight_decay_groups(model, 0.02)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.02)
    assert len(plain["params"]) + len(decayed["params"]) == len(names)
    assert all(p.ndim == 1 or names[id(p)].endswith(".bias") for p in plain["params"])
    assert all(p.ndim > 1 and not names[id(p)].endswith(".bias") for p in decayed["params"])


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    state = TrainState(tiny_model(), TrainSettings(precision="fp32"))
    parameters = list(state.model.parameters())
    for group in state.optimizer.param_groups:
        group["lr"] = 0.1
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer_step(state, parameters, 3.0)
    before = [p.detach().clone() for p in parameters]
    moments = [state.optimizer.state[p]["exp_avg"].clone() for p in parameters]
    for p in parameters:
        p.grad = torch.ones_like(p)
    parameters[3].grad.view(-1)[0] = float("inf")
    assert not math.isfinite(optimizer_step(state, parameters, 3.0))
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert all(
        torch.equal(state.optimizer.state[p]["exp_avg"], old) for p, old in zip(parameters, moments, strict=True)
    )
    for p in parameters:
        p.grad = torch.ones_like(p)
    assert math.isfinite(optimizer_step(state, parameters, 3.0))
    assert not torch.equal(parameters[3], before[3])


@pytest.mark.parametrize("clip, expected", [(0.5, 0.5), (0.0, 10.0), (1e6, 10.0)])
def test_gradients_are_clipped_to_the_norm(clip: float, expected: float) -> None:
    state = TrainState(tiny_model(), TrainSettings(precision="fp32"))
    parameters = list(state.model.parameters())
    count = sum(p.numel() for p in parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 10 / math.sqrt(count))
    assert optimizer_step(state, parameters, clip) == pytest.approx(10, rel=1e-4)
    assert math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters)) == pytest.approx(
        expected, rel=1e-4
    )


# ---- the loop


@pytest.fixture(scope="module")
def big_batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainState, list[int], list[dict]]:
    """Ten steps of 16 images in one process, two micro-batches each, with dropout: state, samples seen, lines of the
    log.
    """
    path = tmp_path_factory.mktemp("engine") / "log.jsonl"
    log = JsonlLog(path)
    state, seen = train_tiny.run(8, 2, 10, log)
    log.close()
    return state, seen, [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_logged_with_its_learning_rate(big_batch: tuple) -> None:
    _, seen, lines = big_batch
    assert [line["step"] for line in lines] == list(range(1, 11)) and len(seen) == 160
    for line in lines:
        progress = (line["step"] - 1) / 3  # of the steps before it; 48 images / 16
        assert line["lr"] == learning_rate(
            progress, peak=1e-3, min_lr=0.0, schedule="cosine", warmup_epochs=1, epochs=10 / 3
        )
        assert math.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["epoch"] == (line["step"] - 1) // 3
    assert lines[0]["lr"] == 0 and lines[1]["lr"] == pytest.approx(1e-3 / 3) and lines[3]["lr"] == pytest.approx(1e-3)


def test_an_epoch_shows_every_image_once(big_batch: tuple) -> None:
    seen = big_batch[1]
    for epoch in range(3):
        assert sorted(seen[epoch * 48 : epoch * 48 + 48]) == list(range(48))
    assert seen[:48] != seen[48:96]


def test_the_loss_falls(big_batch: tuple) -> None:
    lines = big_batch[2]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_accumulated_micro_batches_are_the_big_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one mask ratio for all of them and without dropout."""
    monkeypatch.setattr(training_step, "draw_mask_ratio", lambda lowest, uniform: 0.8)
    whole, seen = train_tiny.run(16, 1, 10, dropout=0)
    for batch, accum in ((8, 2), (4, 4)):
        state, seen_in_parts = train_tiny.run(batch, accum, 10, dropout=0)
        assert seen_in_parts == seen
        assert_close(state.model.state_dict(), whole.model.state_dict())
        assert_close(state.ema.state_dict(), whole.ema.state_dict())


def test_bad_steps_are_skipped_counted_and_stop_the_run(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=r"3 steps in a row .* stopped at step 6 with lr .*, loss nan, grad norm nan"):
        train_tiny.run(16, 1, 10, log, spoil_from=48)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped", False) for line in lines] == [False] * 3 + [True] * 3
    assert all("loss" not in line for line in lines[3:])  # no NaN in the JSON


def test_a_window_with_a_bad_step_reports_the_others(messages: list[str]) -> None:
    """As on a GPU, where a window is fetched only when its line is due."""
    progress, skipped = Progress(train_tiny.settings(16, 1, 10), CPU, None), SkippedSteps()
    for loss in (1.0, math.nan, 3.0):
        progress.window.add(torch.tensor(loss), torch.tensor(loss), 1e-3)
    progress.flush(3, skipped)
    assert "  loss 2.0000  " in messages[0] and messages[0].endswith("  (1 of 3 steps skipped, 0 in a row)")
    assert skipped == SkippedSteps(in_row=0, total=1, steps=3)


# ---- generation

SAMPLE = GenerationSettings(
    num_iter=3, cfg=2.0, cfg_schedule="linear", temperature=1.0, seed=5, batch_size=4, precision="fp32"
)


def images_of(batch_size: int, indices: list[int]) -> dict[int, torch.Tensor]:
    settings = GenerationSettings(**(vars(SAMPLE) | {"batch_size": batch_size}))
    labels = [i % 10 for i in range(10)]
    return {
        n: image
        for numbers, images in generate_batches(tiny_model(), tiny_vae(), labels, indices, settings, CPU)
        for n, image in zip(numbers, images, strict=True)
    }


def test_an_image_depends_on_its_number_alone() -> None:
    together, apart = images_of(4, list(range(6))), images_of(3, [5, 1, 3, 0])
    assert together[0].shape == (3, 64, 64) and together[0].dtype == torch.uint8
    # the tokens are equal bit for bit (test_sampling.py); the VAE's sums depend on the batch
    for number, image in apart.items():
        assert (image.int() - together[number].int()).abs().max() <= 1
    assert (together[0].int() - together[1].int()).abs().max() > 10


def test_weights_that_give_nan_are_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite|NaN"):
        list(generate_batches(model, tiny_vae(), [0], [0], SAMPLE, CPU))


@pytest.mark.parametrize(
    "count, classes, expected", [(6, range(3), [0, 0, 1, 1, 2, 2]), (5, [7, 2], [7, 7, 7, 2, 2]), (2, range(4), [0, 1])]
)
def test_labels_are_balanced_and_class_major(count: int, classes: list[int], expected: list[int]) -> None:
    assert balanced_labels(count, classes) == expected


def test_seeds_are_mixed() -> None:
    seeds = {mixed_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
