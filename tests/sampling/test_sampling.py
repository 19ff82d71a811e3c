"""Sampling (docs/spec.md 6): golden images at temperature 0, schedules by hand, seeds, guidance, no host sync."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from models.sampling.orders import SEQUENCES, check_mask, token_orders
from models.sampling.schedules import guidance_scale, keep_masked, unmasking_plan
from models.tokenbridge import TokenBridge
from tests.helpers import RecordOps, golden_arrays, golden_json, tiny_model
from tools.bench.counting import SYNC_OPS

MANY_N = [1, 2, 3, 4, 6, 7, 8, 9, 12, 15, 16, 17, 24, 48, 64, 100, 192, 255, 256, 257, 300, 512]


def greedy(model: TokenBridge, **changes: object) -> Tensor:
    """Two images, 4 steps, argmax, fixed orders."""
    arguments = dict(bsz=2, num_iter=4, labels=torch.tensor([3, 7]), temperature=0, orders=fixed_orders(2))
    return model.sample_tokens(**(arguments | changes))


def fixed_orders(batch: int) -> Tensor:
    rng = np.random.default_rng(2)
    return torch.from_numpy(np.stack([rng.permutation(16) for _ in range(batch)]))


def golden_sample(number: int, head_start: str = "official") -> tuple[Tensor, Tensor]:
    """Latents (B, C, H, W) and tokens (B, L, C) of a golden case at its own steps, guidance and labels."""
    settings, golden = golden_json(f"sample_tiny_{number}"), golden_arrays(f"sample_tiny_{number}")
    model = tiny_model(head_start=head_start, **settings["config"])
    options = {name: settings[name] for name in ("num_iter", "cfg", "cfg_schedule", "temperature")}
    labels = torch.from_numpy(golden["labels"]) if settings["labels"] else None
    orders = torch.from_numpy(golden["orders"])
    latents = model.sample_tokens(len(orders), labels=labels, orders=orders, **options)
    return latents, model.quantize(latents.flatten(2).transpose(1, 2))[0]


@pytest.mark.parametrize("number", range(5))
def test_golden(number):
    """All tokens equal, latents too."""
    golden, (latents, tokens) = golden_arrays(f"sample_tiny_{number}"), golden_sample(number)
    np.testing.assert_array_equal(tokens.numpy(), golden["tokens"])
    np.testing.assert_allclose(latents.numpy(), golden["latents"], rtol=0, atol=1e-6 * 16)


def test_the_goldens_cover_schedules_steps_and_labels():
    cases = [golden_json(f"sample_tiny_{i}") for i in range(5)]
    assert [c["num_iter"] for c in cases] == [1, 4, 4, 16, 20]
    assert {c["cfg_schedule"] for c in cases} == {"linear", "constant"}
    assert {c["labels"] for c in cases} == {True, False}


def test_the_trained_start_is_another_model():
    """So the switch does something: the golden tokens are not met with head_start="trained"."""
    _, tokens = golden_sample(1, head_start="trained")
    assert (tokens.numpy() != golden_arrays("sample_tiny_1")["tokens"]).mean() > 0.1


def test_plan_by_hand():
    """L = 16, N = 4: floor(16 cos(k pi/8)) is floor(14.78), floor(11.31), floor(6.12), then the rest."""
    assert unmasking_plan(4, 16) == [(16, 14, 14), (14, 11, 11), (11, 6, 6), (6, 0, 1)]
    assert unmasking_plan(1, 16) == [(16, 0, 1)]
    assert unmasking_plan(3, 16) == [(16, 13, 13), (13, 8, 8), (8, 0, 1)]  # cos(pi/3) = 1/2 lands on 8


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 256])
@pytest.mark.parametrize("num_iter", MANY_N)
def test_plan_by_brute_force(num_iter, num_tokens):
    """docs/spec.md 6 step by step with numpy's float64 cosine on a mask that is really emptied."""
    masked = np.ones(num_tokens, dtype=bool)
    for step, (before, after, keep) in enumerate(unmasking_plan(num_iter, num_tokens)):
        assert before == masked.sum()
        floor = int(np.floor(num_tokens * np.cos(math.pi / 2 * (step + 1) / num_iter)))
        expected = max(1, min(int(masked.sum()) - 1, floor))
        assert keep == expected
        masked[:] = False
        masked[: 0 if step == num_iter - 1 else expected] = True
        assert after == masked.sum() <= before
    assert step == num_iter - 1 and not masked.any()


@pytest.mark.parametrize("num_iter", [3, 6, 9, 12, 24, 48, 96, 192])
def test_multiples_of_three_land_on_half(num_iter):
    """At step 2N/3 the cosine is exactly 1/2: half of the tokens stay masked, not one fewer.

    Elsewhere compare with 50 digits.
    """
    assert keep_masked(num_iter * 2 // 3 - 1, num_iter, 256, 256) == 128
    with mpmath.workdps(50):
        for step in range(num_iter - 1):
            exact = int(mpmath.floor(256 * mpmath.cos(mpmath.pi / 2 * (step + 1) / num_iter) + mpmath.mpf(10) ** -40))
            assert keep_masked(step, num_iter, 256, 256) == max(1, min(255, exact))


def test_float64_decides_where_it_misses_the_whole_number():
    """At N = 300 (pi/2 * 200) / 300 rounds up, so its cosine is 0.49999999999999994: 127, as published, not 128."""
    assert math.cos(math.pi / 2 * 200 / 300) < 0.5
    assert keep_masked(199, 300, 256, 256) == 127


def test_long_plans_end_with_idle_steps_at_most():
    """N > L: nothing negative, at most all predicted, and a step that finds one token leaves it to the last."""
    plan = unmasking_plan(20, 16)
    assert sum(before - after for before, after, _ in plan) == 16
    assert any(before == after == 1 for before, after, _ in plan) and plan[-1] == (1, 0, 1)


@pytest.mark.parametrize("step", [-1, 4])
def test_steps_outside_the_plan_are_refused(step):
    with pytest.raises(ValueError, match="outside"):
        keep_masked(step, 4, 16, 16)


@pytest.mark.parametrize(
    ("cfg", "keep", "expected"),
    [(3.1, 256, 1.0), (3.1, 128, 2.05), (3.1, 64, 2.575), (3.1, 1, 1 + 2.1 * 255 / 256), (1.0, 7, 1.0)],
)
def test_linear_guidance_by_hand(cfg, keep, expected):
    assert guidance_scale(cfg, "linear", 256, keep) == pytest.approx(expected, abs=1e-12)
    assert guidance_scale(cfg, "constant", 256, keep) == cfg


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [1.2625, 1.65625, 2.3125, 2.96875]), ("constant", [3.1] * 4)]
)
def test_guidance_scales_that_the_sampler_uses(schedule, expected):
    """L = 16, N = 4: 1 + 2.1 (16 - keep)/16 with keep 14, 11, 6 and, at the last step, 1."""
    steps = tiny_model().sample_steps(2, num_iter=4, cfg=3.1, cfg_schedule=schedule, temperature=0)
    assert [state.scale for state in steps] == pytest.approx(expected, abs=1e-12)


def count_passes(model: TokenBridge, **arguments: object) -> tuple[list[tuple[int, int]], list[int]]:
    """(rows, length) of every encoder pass, and the tokens of every head pass, of one call of the sampler."""
    passes, heads = [], []
    model.encoder_blocks[0].register_forward_hook(lambda module, args, out: passes.append(tuple(out.shape[:2])))
    model.condition_proj.register_forward_hook(lambda module, args, out: heads.append(len(out)))
    greedy(model, **arguments)
    return passes, heads


def test_without_guidance_the_unconditional_pass_is_skipped():
    """B rows, growing by what was revealed (5 buffer slots); guided 2B rows, or B and 1 while nothing is visible."""
    lengths = [5, 5 + 2, 5 + 5, 5 + 10]
    for schedule in ("linear", "constant"):
        assert count_passes(tiny_model(), cfg=1.0, cfg_schedule=schedule) == ([(2, n) for n in lengths], [4, 6, 10, 12])
        passes = [(2, 5), (1, 5)] + [(4, n) for n in lengths[1:]]
        assert count_passes(tiny_model(), cfg=2.0, cfg_schedule=schedule) == (passes, [4, 6, 10, 12])


def test_guidance_formula():
    """One step: z = z_u + s (z_c - z_u), z_c and z_u from the training forward with everything masked."""
    model = tiny_model(head_start="trained")
    labels, everything = torch.tensor([3, 7]), torch.ones(2, 16)
    empty = torch.zeros(2, 16, 4, 4)
    with torch.no_grad():
        z_c = model(empty, labels, everything, return_details=True).z
        z_u = model(empty, labels, everything, label_drop=torch.ones(2, dtype=torch.bool), return_details=True).z
        indices, _ = model.channel_sample((z_u + 2.5 * (z_c - z_u)).flatten(0, 1), torch.zeros(32, 16), 0)
    expected = model.dequantize(indices[:, model.to_natural_order]).view(2, 16, 16)
    found = greedy(model, num_iter=1, cfg=2.5, cfg_schedule="constant")
    assert torch.equal(found.flatten(2).transpose(1, 2), expected)


def test_each_step_continues_from_the_dequantized_tokens():
    """Sampling in 4 steps is 4 teacher-forced passes: masked forwards over what is known give the same new tokens."""
    model, orders = tiny_model(head_start="trained"), fixed_orders(2)
    final = greedy(model)
    labels = torch.tensor([3, 7])
    for keep_before, keep_after in [(16, 14), (14, 11), (11, 6), (6, 0)]:
        mask = torch.zeros(2, 16).scatter(1, orders[:, :keep_before], 1.0)
        with torch.no_grad():
            details = model(final, labels, mask, return_details=True)  # the head is forced to the final indices
        predicted = details.logits.argmax(-1)[:, model.to_natural_order]  # (B*M, C)
        rows = torch.nonzero(mask)  # batch-major, grid order
        for row, (b, position) in enumerate(rows.tolist()):
            if position in orders[b, keep_after:keep_before].tolist():
                assert torch.equal(predicted[row], details.tokens[b, position])


@pytest.mark.parametrize("num_iter", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_any_number_of_steps(num_iter, cfg):
    """Every latent is a level, in one step, one token a step, or with idle steps; on_step is called for each."""
    model, steps = tiny_model(), []
    options = dict(labels=[1, 2, 3], seeds=[1, 2, 3], on_step=lambda step, total: steps.append((step, total)))
    latents = model.sample_tokens(3, num_iter=num_iter, cfg=cfg, **options)
    assert latents.shape == (3, 16, 4, 4) and latents.dtype == torch.float32
    levels = model.dequantize(torch.arange(16))
    assert torch.isin(latents, levels).all() and len(latents.unique()) > 4
    assert steps == [(step, num_iter) for step in range(num_iter)]


def test_one_token_at_a_time():
    """With more steps than tokens, idle steps run no pass."""
    passes, heads = count_passes(tiny_model(), num_iter=40)
    assert len(passes) == len(heads) <= 16 and sum(heads) == 2 * 16


def test_the_model_is_as_before():
    """Training mode comes back, also after an error; dropout is off meanwhile; no gradient, no parameter changed."""
    model = tiny_model(attn_dropout=0.5, proj_dropout=0.5).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = greedy(model), greedy(model)
    assert model.training and model.encoder_blocks.training and torch.equal(first, second)
    assert torch.equal(first, greedy(model.eval())) and not model.training
    assert not first.requires_grad and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.train()

    def fail(step: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        greedy(model, on_step=fail)
    assert model.training


def test_no_labels_means_fake_latent():
    model = tiny_model()
    unconditional = greedy(model, labels=None)
    assert not torch.equal(unconditional, greedy(model))
    # both halves are the same
    assert torch.equal(unconditional, greedy(model, labels=None, cfg=4.0, cfg_schedule="constant"))
    with torch.no_grad():
        model.class_emb.weight[:] = model.fake_latent
    assert torch.equal(unconditional, greedy(model))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_seed_is_an_image_whatever_the_batch(cfg):
    model = tiny_model()

    def images(*numbers: int) -> Tensor:
        return model.sample_tokens(len(numbers), 4, cfg, labels=numbers, seeds=[11 + i for i in numbers])

    together = images(0, 1, 2, 3, 4, 5)
    assert torch.equal(torch.cat([images(0, 1), images(2, 3, 4), images(5)]), together)
    assert torch.equal(images(5, 0, 3), together[[5, 0, 3]])
    torch.manual_seed(99)  # the global state plays no part
    assert torch.equal(images(0, 1, 2, 3, 4, 5), together)
    assert len({tuple(image.flatten().tolist()) for image in together}) == 6


def test_seeds_are_not_labels():
    """The same seed with two labels, and the same label with two seeds, are different images."""
    model = tiny_model()
    a, b, c = model.sample_tokens(3, 4, labels=[1, 2, 1], seeds=[5, 5, 6])
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_generator_and_global_state():
    model = tiny_model()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, same, other = (model.sample_tokens(2, 4, generator=generator) for generator in generators)
    assert torch.equal(first, same) and not torch.equal(first, other)
    torch.manual_seed(1)
    one, two = model.sample_tokens(2, 4), model.sample_tokens(2, 4)
    torch.manual_seed(1)
    assert torch.equal(one, model.sample_tokens(2, 4)) and not torch.equal(one, two)


def test_given_orders_are_used():
    """At temperature 0 nothing else is random: another order is another image, whatever the seed."""
    model, orders = tiny_model(), fixed_orders(2)
    first, same = (greedy(model, orders=orders, seeds=seeds) for seeds in ([1, 2], [3, 4]))
    assert torch.equal(first, same) and not torch.equal(first, greedy(model, orders=orders.flip(1)))
    assert torch.equal(first, greedy(model, orders=orders.to(torch.int32)))


def test_temperature():
    """Cold draws are greedy; hot ones are uniform over the levels."""
    model = tiny_model()
    cold = greedy(model, temperature=1e-4, seeds=[1, 2])
    assert torch.equal(cold, greedy(model))
    hot = model.quantize(model.sample_tokens(40, 1, temperature=1e4, seeds=range(40)))[0]
    counts = torch.bincount(hot.flatten(), minlength=16).double() / hot.numel()  # 10,240 draws: standard error 0.0024
    assert (counts - 1 / 16).abs().max() < 0.012


def test_draws_follow_the_logits():
    """One step, 1,000 images of a class: the leading dimension follows the softmax of its logits at T = 0.8."""
    model = tiny_model(head_start="trained", vae_embed_dim=3, channel_order=[2, 0, 1])
    with torch.no_grad():
        details = model(torch.zeros(1, 3, 4, 4), torch.tensor([4]), torch.ones(1, 16), return_details=True)
    expected = (details.logits[6, 0].double() / 0.8).softmax(-1)
    latents = model.sample_tokens(1000, 1, labels=[4] * 1000, temperature=0.8, seeds=range(1000))
    drawn = model.quantize(latents[:, 2, 1, 2])[0]  # dimension 2 leads the order; token 6 is row 1, column 2
    counts = torch.bincount(drawn, minlength=16).double() / 1000
    assert ((counts - expected).abs() <= 4 * (expected * (1 - expected) / 1000).sqrt() + 1e-3).all()


def test_broken_weights_give_nan_not_a_picture():
    """Only the images that met them: class 3's embedding is NaN, class 7's is not."""
    model = tiny_model()
    with torch.no_grad():
        model.class_emb.weight[3] = math.nan
    for temperature in (0, 1.0):
        latents = greedy(model, temperature=temperature)
        assert latents[0].isnan().all() and latents[1].isfinite().all()


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_no_host_sync(cfg, temperature):
    """Counts come from the plan: no operation that waits for the device, from beginning to end."""
    model = tiny_model()
    with RecordOps() as ops:
        model.sample_tokens(2, 8, cfg=cfg, temperature=temperature, seeds=[1, 2])
    assert len(ops.names) > 500 and SYNC_OPS.isdisjoint(ops.names)


def test_no_host_sync_in_the_loop_with_labels_and_orders():
    """Those are checked where they lie, on the CPU, before the loop; after the first encoder pass nothing waits."""
    model, ops, first = tiny_model(), RecordOps(), []
    model.z_proj.register_forward_pre_hook(lambda *_: first.append(len(ops.names)))
    with ops:
        greedy(model, cfg=2.0)
    assert len(first) == 4 + 1 and SYNC_OPS.isdisjoint(ops.names[first[0] :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_iter=0), "num_iter must be at least 1, got 0"),
        (dict(temperature=-0.1), "temperature must be at least 0, got -0.1"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(cfg=math.nan), "cfg must be finite"),
        (dict(cfg_schedule="step"), "'step'.*linear, constant, cosine, interval"),
        (dict(labels=torch.tensor([0, 10])), r"labels must be in \[0, 10\)"),
        (dict(labels=[-1, 0]), r"labels must be in \[0, 10\)"),
        (dict(labels=[1, 2, 3]), r"labels has shape \(3,\)"),
        (dict(seeds=[1]), "1 seeds for 2 images"),
        (dict(orders=torch.arange(16).view(1, 16)), r"orders has shape \(1, 16\), expected \(2, 16\)"),
        (dict(orders=torch.zeros(2, 16, dtype=torch.long)), "permutation"),
        (dict(orders=torch.arange(1, 17).expand(2, 16)), "permutation"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        greedy(tiny_model(), **change)


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("name", SEQUENCES)
def test_every_sequence_is_a_permutation(name: str, grid: int) -> None:
    permutation = torch.arange(grid * grid).unsqueeze(0)
    assert torch.equal(token_orders(name, permutation, grid).sort(1).values, permutation)


@pytest.mark.parametrize("tokens", [[0, 0, 1, 2], [0, 1, 2], [0, 1, 2, 4], [0, 1, 2, 3, 3]])
def test_a_sequence_that_is_no_permutation(tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SEQUENCES, "wrong", lambda grid: tokens)
    with pytest.raises(ValueError, match="order wrong does not list each of the 4 tokens once"):
        token_orders("wrong", torch.arange(4).unsqueeze(0), 2)


def test_a_transposed_mask_is_refused() -> None:
    mask = torch.zeros(4, 16)
    mask[:, :3] = 1
    assert check_mask(mask, 4, 16)[1] == check_mask(mask[0].view(4, 4), 4, 16)[1] == 3
    with pytest.raises(ValueError, match=r"mask has shape \(16, 4\), expected \(4, 16\) or one row"):
        check_mask(mask.T, 4, 16)
