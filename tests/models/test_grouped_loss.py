"""The head's loss in groups of tokens (models/grouped_loss.py) against the loss of all tokens together."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import MODELS
from models.grouped_loss import grouped_sum
from models.tokenbridge import TokenBridge
from tests.helpers import tiny_batch, tiny_model

ROUNDING = ("k_norm.bias", "k.bias")  # a key's bias shifts all scores of a query alike: its gradient is rounding alone


def step(
    model: TokenBridge,
    precision: torch.dtype | None = None,
    batch: tuple[Tensor, Tensor] | None = None,
    scale: float = 1,
) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """Loss, losses and accuracies by dimension; gradients by name, divided by `scale`; FLOPs."""
    model.zero_grad()
    latents, labels = batch or tiny_batch(channels=model.token_dim)
    masked = model.num_tokens * 13 // 16
    torch.manual_seed(1)  # dropout
    with FlopCounterMode(display=False) as counter:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            results = model.train()(latents, labels, num_masked=masked, return_metrics=True)
        (results[0] * scale).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return [r.detach() for r in results], gradients, counter.get_total_flops()


def assert_same_step(whole: tuple, groups: tuple, gradient: float = 1e-5, loss: float = 1e-6) -> None:
    """Relative error of each gradient as a vector."""
    for a, b in zip(whole[0], groups[0], strict=True):
        torch.testing.assert_close(a, b, rtol=loss, atol=loss)
    assert whole[1].keys() == groups[1].keys() and whole[2] == groups[2]
    for name, expected in whole[1].items():
        if not name.endswith(ROUNDING):
            error, norm = (groups[1][name] - expected).norm(), expected.norm()
            assert error <= gradient * norm, f"{name}: {error:.2g} of {norm:.2g}"  # a zero gradient stays zero


@pytest.mark.parametrize("head", ["autoregressive", "parallel"])
@pytest.mark.parametrize("size", [7, 100])
def test_groups_have_the_loss_gradients_and_flops_of_the_whole(size: int, head: str) -> None:
    """52 tokens in groups of 6 and 7, and in one."""
    assert_same_step(*(step(tiny_model(head_chunk=chunk, head=head)) for chunk in (0, size)))


@pytest.mark.slow
def test_base_has_the_loss_and_gradients_of_the_whole() -> None:
    torch.manual_seed(0)
    model = MODELS["tokenbridge_base"](head_chunk=0, attn_dropout=0.0, proj_dropout=0.0)
    for layers in model.modulation_layers:
        torch.nn.init.normal_(layers[1].weight, std=0.02)
    batch = torch.randn(1, 16, 16, 16), torch.tensor([3])
    whole = step(model, batch=batch)
    model.head_chunk = None
    assert 1 < model.group_size("cpu") < 208
    assert_same_step(whole, step(model, batch=batch))


@pytest.mark.parametrize(("precision", "scale"), [(torch.bfloat16, 1), (torch.float16, 2.0**14)])
def test_half_precision_in_groups_is_as_close_to_float32(precision: torch.dtype, scale: float) -> None:
    """Per gradient: no further from the float32 gradient than 1.5 times the whole computation's, or 2 % of its norm.

    In float16 the sums inside the groups do not underflow; the scaler's factor comes in afterwards.
    """
    exact = step(tiny_model(head_chunk=0))[1]
    whole, groups = (step(tiny_model(head_chunk=chunk), precision, scale=scale)[1] for chunk in (0, 7))
    for name, expected in exact.items():
        if not name.endswith(ROUNDING):
            errors = [float((found[name] - expected).norm() / expected.norm()) for found in (whole, groups)]
            assert errors[1] < max(1.5 * errors[0], 0.02), f"{name}: {errors}"


def test_dropout_is_drawn_per_group_and_the_same_from_the_same_seed() -> None:
    model = tiny_model(head_chunk=7, attn_dropout=0.2, proj_dropout=0.2, vae_embed_dim=4)
    first, again = step(model), step(model)
    assert all(torch.equal(g, again[1][name]) for name, g in first[1].items())
    model.head_chunk = 26
    assert not torch.equal(step(model)[0][0], first[0][0])


def test_without_gradients_groups_run_forward_only() -> None:
    model, flops = tiny_model(head_chunk=7).train(), {}
    for enabled in (True, False):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(enabled):
            loss = model(*tiny_batch(), num_masked=13, generator=torch.Generator().manual_seed(0))
        flops[enabled] = counter.get_total_flops()
        assert loss.requires_grad == enabled
    assert flops[False] < 0.6 * flops[True] and all(p.grad is None for p in model.parameters())


def test_hooks_frozen_parameters_and_a_second_backward_pass() -> None:
    """Hooks on a parameter's gradient run once, in the backward pass; a frozen one gets none."""
    weight, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    x, seen = torch.arange(12.0).view(4, 3).requires_grad_(), []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def function(x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (x * weight * frozen * targets).sum(), targets.sum(0)

    total, details = grouped_sum(function, x, torch.full((4, 1), 2.0), [weight, frozen], 3)
    assert not seen and details.item() == 8 and not details.requires_grad
    (total / 2).backward(retain_graph=True)
    assert len(seen) == 1 and torch.equal(weight.grad, x.detach().sum(0)) and torch.equal(x.grad, torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="head_chunk"):
        total.backward()
