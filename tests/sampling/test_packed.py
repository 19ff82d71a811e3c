"""models/sampling/packed.py: packed layers give the same numbers, come back, and follow changes of the weights."""

import copy

import pytest
import torch
from torch import nn

from models.sampling import packed
from models.sampling.packed import PackedLinears, can_pack
from models.tokenbridge import TokenBridge
from tests.helpers import RecordOps, fake_gpu, tiny_model

PACKED = "_linear_pointwise"
needs_packing = pytest.mark.skipif(not can_pack(torch.zeros(2, 2)), reason="torch packs no weights on this CPU")


@pytest.fixture
def small_too(monkeypatch):
    """Models of any size are packed."""
    monkeypatch.setattr(packed, "WORTHWHILE", 0)


def sample(model: TokenBridge, batch: int = 2, **more: object) -> torch.Tensor:
    options = dict(num_iter=4, cfg=2.0, labels=[3, 7, 1][:batch], seeds=[1, 2, 3][:batch]) | more
    return model.sample_tokens(batch, **options)


@needs_packing
@pytest.mark.usefixtures("small_too")
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out"), [(16, 48), (768, 64), (100, 7), (1, 1)])
def test_same_numbers_for_any_shape(width, out, bias):
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias)
    rows = torch.randn(6, 5, width)
    for x in (rows[0], rows, rows[:, 2:3], rows.transpose(0, 1), rows[:, :0], rows[:0], rows[0, 0]):
        with PackedLinears([layer]).used():
            found = layer(x)
        assert found.shape == (*x.shape[:-1], out) and torch.allclose(found, layer(x), atol=1e-5)


@needs_packing
@pytest.mark.usefixtures("small_too")
def test_layers_come_back():
    model = tiny_model()
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    linears = PackedLinears(model.modules())
    assert [layer for layer, _ in linears.forwards] == layers
    with linears.used():
        assert all("forward" in vars(layer) for layer in layers)
    with pytest.raises(KeyError), linears.used():
        raise KeyError
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state


@needs_packing
@pytest.mark.usefixtures("small_too")
@pytest.mark.parametrize("training", [False, True])
def test_the_sampler_packs_and_draws_the_same(monkeypatch, training):
    """All products are packed but the last decoder block's q and kv; gradients flow between the steps."""
    model, ops = tiny_model().train(training), RecordOps()
    steps = model.sample_steps(2, num_iter=4, cfg=2.0, labels=[3, 7], seeds=[1, 2])
    with ops:
        for state in steps:
            assert model.z_proj(torch.ones(1, 16)).requires_grad
            latents = state.latents
    names = [name.split(".")[0] for name in ops.names]
    unpacked = names.count("addmm") - 4  # the loop's own call of z_proj
    # a pass more, and z_proj of no token in two passes
    assert unpacked == 2 * (4 + 1) + 2 and names.count(PACKED) > 100
    monkeypatch.setattr(packed, "can_pack", lambda weight: False)
    assert torch.equal(sample(model), latents)


@needs_packing
@pytest.mark.usefixtures("small_too")
def test_weights_changed_between_batches_are_seen():
    model = tiny_model()
    before = sample(model)
    with torch.no_grad():
        model.channel_heads[3].weight.data.neg_()  # raises no version counter
    after = sample(model)
    assert not torch.equal(before, after) and torch.equal(after, sample(copy.deepcopy(model)))


@needs_packing
@pytest.mark.usefixtures("small_too")
def test_an_image_is_the_same_whatever_the_batch():
    model = tiny_model()
    whole = sample(model, 3)
    for i in range(3):
        assert torch.equal(sample(model, 1, labels=[[3, 7, 1][i]], seeds=[i + 1])[0], whole[i])


def test_what_is_not_packed():
    """Small models, other types, devices and layers, autocast."""
    assert not PackedLinears(tiny_model().modules()).forwards
    wide = nn.Linear(512, 512)
    assert bool(PackedLinears([wide, nn.Linear(512, 2)]).forwards) == can_pack(wide.weight)

    class Other(nn.Linear):
        pass

    assert not PackedLinears([Other(512, 512)]).forwards
    with fake_gpu():
        assert not can_pack(torch.empty(2, 2, device="cuda")) and not can_pack(torch.empty(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(wide.weight)
    assert not can_pack(wide.weight.double()) and not can_pack(wide.weight.bfloat16())
