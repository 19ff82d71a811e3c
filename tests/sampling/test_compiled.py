"""models/sampling/compiled.py: replayed parts change no token; blocks compiled for real in a slow test."""

import shutil

import pytest
import torch
from torch import Tensor

from models.sampling import compiled
from models.sampling.compiled import LAUNCHES_PER_STEP, CompiledSampler
from tests.helpers import tiny_model
from util import dist

LABELS = torch.tensor([3, 7])


class Replayed:
    """Stands for a CUDA graph: inputs and outputs stay where they were, and each call overwrites the last one's."""

    def __init__(self, function, arguments):
        self.function, self.inputs, self.outputs = function, [x.clone() for x in arguments], None

    def __call__(self, *arguments):
        for own, given in zip(self.inputs, arguments, strict=True):
            own.copy_(given)
        found = self.function(*self.inputs)
        if self.outputs is None:
            self.outputs = found
        else:
            for old, new in zip(*((x,) if isinstance(x, Tensor) else x for x in (self.outputs, found)), strict=True):
                old.copy_(new)
        return self.outputs


def uncompiled(model, capture=Replayed):
    """The model with a sampler that replays, and whose compiled blocks are the blocks themselves."""
    CompiledSampler.of(model, compile=lambda function, dynamic: function, capture=capture)
    return model


def sample(model, **options):
    return model.sample_tokens(2, labels=LABELS, seeds=[1, 2], **(dict(num_iter=8, cfg=3.0) | options))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(num_iter=1),
        dict(num_iter=20),
        dict(cfg=1.0),
        dict(temperature=0),
        dict(temperature_schedule="linear", temperature_end=0.0),
        dict(top_k=3, top_p=0.9),
        dict(order="confidence"),
        dict(cfg_schedule="interval", cfg_interval=(0.3, 0.7)),
        dict(channel_temperature=(0.0, 1.5)),
    ],
)
@pytest.mark.parametrize("head_start", ["official", "trained"])
def test_replaying_changes_no_token(options, head_start):
    """Nor does a second batch, which finds the graphs of the first."""
    model = uncompiled(tiny_model(head_start=head_start, vae_embed_dim=4, channel_depth=1))
    expected = sample(model, **options)
    for _ in range(2):
        assert torch.equal(sample(model, compile=True, **options), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_replaying_changes_no_token_in_half_precision(precision):
    model = uncompiled(tiny_model(head="parallel"))
    with dist.autocast(torch.device("cpu"), precision):
        expected = sample(model)
        assert torch.equal(sample(model, compile=True), expected)
        found = [sample(model, compile=True, cfg=cfg) for cfg in (1.0, 2.0)]
        assert torch.equal(found[1], sample(model, cfg=2.0)) and not torch.equal(*found)


def test_two_launches_a_step_at_any_depth():
    for depth in (1, 3):
        model = uncompiled(tiny_model(encoder_depth=depth, channel_depth=depth))
        sample(model, compile=True)
        assert CompiledSampler.of(model).launches == 8 * LAUNCHES_PER_STEP == 16


def test_graphs_are_kept_for_other_images_guidance_and_weights_at_the_same_address(monkeypatch):
    model = uncompiled(tiny_model())
    sample(model, compile=True)
    graphs = dict(CompiledSampler.of(model).graphs)
    with torch.no_grad():
        model.condition_proj.weight.mul_(-1)
    found = model.sample_tokens(2, num_iter=8, cfg=2.0, labels=[1, 2], seeds=[8, 9], compile=True)
    assert CompiledSampler.of(model).graphs == graphs and 8 < len(graphs) <= 16
    assert torch.equal(found, model.sample_tokens(2, num_iter=8, cfg=2.0, labels=[1, 2], seeds=[8, 9]))
    model.load_state_dict(tiny_model().state_dict(), assign=True)  # other addresses
    assert torch.equal(sample(model, compile=True), sample(tiny_model()))
    assert not set(map(id, CompiledSampler.of(model).graphs.values())) & set(map(id, graphs.values()))
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 3)
    model = uncompiled(tiny_model())
    assert torch.equal(sample(model, compile=True), sample(tiny_model()))
    assert len(CompiledSampler.of(model).graphs) == 3


def test_a_large_batch_is_not_replayed(monkeypatch):
    """Its blocks are compiled all the same, and only while the loop runs."""
    monkeypatch.setattr(compiled, "MOST_REPLAYED_SLOTS", 2 * 2 * (5 + 16) - 1)
    model, calls = tiny_model(), []
    CompiledSampler.of(model, compile=lambda f, dynamic: lambda x: calls.append(x) or f(x), capture=Replayed)
    assert torch.equal(sample(model, compile=True), sample(tiny_model()))
    assert CompiledSampler.of(model).launches == 0 and len(calls) >= 8 * (2 + 2)
    assert all(block._compiled_call_impl is None for block in model.encoder_blocks)


def test_nothing_is_captured_on_a_cpu():
    model = uncompiled(tiny_model(), capture=None)
    assert torch.equal(sample(model, compile=True), sample(model)) and CompiledSampler.of(model).launches == 0


def test_refused_combinations():
    with pytest.raises(ValueError, match="compile and reuse_features"):
        sample(tiny_model(), compile=True, reuse_features=2)


def test_the_state_dict_does_not_change():
    model = tiny_model()
    keys, modules = list(model.state_dict()), len(list(model.modules()))
    uncompiled(model)
    sample(model, compile=True, num_iter=2)
    assert list(model.state_dict()) == keys and len(list(model.modules())) == modules


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_equals_eager():
    model = tiny_model()
    expected = sample(model, num_iter=3)
    assert torch.equal(sample(model, num_iter=3, compile=True), expected)
    assert torch.equal(sample(model, num_iter=3, compile=True), expected)  # the second batch finds the graphs
