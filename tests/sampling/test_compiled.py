"""models/sampling/compiled.py: padding to buckets and one graph for all positions change no token; compiled for real in
a slow test."""

import shutil

import pytest
import torch

from models.sampling import compiled
from models.sampling.compiled import CompiledSampler, bucket, launches_per_step
from tests.helpers import tiny_model
from util import dist

LABELS = torch.tensor([3, 7])


def uncompiled(model):
    """The model with a sampler whose graphs are the functions themselves."""
    CompiledSampler.of(model, lambda function, device: function)
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
def test_the_static_shapes_change_no_token(options, head_start):
    """The graphs' functions run uncompiled: what is compiled below is this."""
    model = uncompiled(tiny_model(head_start=head_start))
    assert torch.equal(sample(model, compile=True, **options), sample(model, **options))


def test_a_large_batch_has_no_padding_and_no_graphs(monkeypatch):
    """Its blocks are compiled instead, and only while the loop runs."""
    monkeypatch.setattr(compiled, "MOST_REPLAYED_SLOTS", 79)  # two rows of 4 + 16 slots have 40, four have 80
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    model = uncompiled(tiny_model())
    assert torch.equal(sample(model, compile=True), sample(model))
    assert CompiledSampler.of(model).launches == 8 * (1 + 16)  # the head's
    assert all(block._compiled_call_impl is None for block in model.encoder_blocks)


def test_under_autocast_the_cache_has_the_type_of_keys_and_values(monkeypatch):
    """Equal without padding; the padded encoder sums in another order, and half precision shows it."""
    monkeypatch.setattr(compiled, "VISIBLE_BUCKETS", 16)
    model = uncompiled(tiny_model())
    with dist.autocast(torch.device("cpu"), "bf16"):
        found, expected = (sample(model, compile=compile, num_iter=1) for compile in (True, False))
    assert {cache.dtype for cache in CompiledSampler.of(model)._caches.values()} == {torch.bfloat16}
    assert (found == expected).float().mean() > 0.9


def test_launches_depend_on_steps_alone():
    """Depth plays no part."""
    for depth in (1, 3):
        model = uncompiled(tiny_model(encoder_depth=depth, channel_depth=depth))
        sample(model, compile=True)
        assert CompiledSampler.of(model).launches == 8 * launches_per_step(16) == 8 * 18


def test_few_shapes_serve_all_steps():
    """64 iterations: the backbone sees at most 5 lengths with and 5 without guidance, whatever the plan says."""
    seen = set()

    def graph(function, device):
        def recorded(*arguments):
            if function.__name__ == "backbone":
                seen.add(tuple(arguments[0].shape))
            return function(*arguments)

        return recorded

    model = tiny_model()
    CompiledSampler.of(model, graph)
    sample(model, compile=True, num_iter=64)
    assert 2 <= len(seen) <= 10 and all(shape[1] % 4 == 0 for shape in seen)


def test_buckets():
    sizes = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 9: 12, 12: 12, 13: 16, 17: 24, 25: 32, 100: 128}
    assert {n: bucket(n) for n in sizes} == sizes
    assert all(n <= bucket(n) <= 1.5 * n + 1 for n in range(1, 5000))


def test_refused_combinations():
    with pytest.raises(ValueError, match="compile and reuse_features"):
        sample(tiny_model(), compile=True, reuse_features=2)
    with pytest.raises(ValueError, match="needs the autoregressive head"):
        sample(tiny_model(head="parallel"), compile=True)


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
