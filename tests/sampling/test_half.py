"""models/sampling/half.py: half-precision copies of the weights while sampling change no token and leave no trace."""

import copy
from contextlib import nullcontext

import pytest
import torch

from models.layers import addcmul
from models.sampling.half import HalfWeights
from models.tokenbridge import TokenBridge
from tests.helpers import tiny_config, tiny_model
from tools.bench.counting import OpCounter, no_fake_gpu, on_fake_gpu
from util import dist


def sample(model: TokenBridge, precision: str = "bf16", **options: object) -> torch.Tensor:
    with dist.autocast(torch.device("cpu"), precision):
        return model.sample_tokens(2, **(dict(num_iter=4, cfg=3.0, labels=[3, 7], seeds=[1, 2]) | options))


@pytest.mark.parametrize("options", [{}, dict(order="confidence", reuse_guidance=2), dict(reuse_features=2)], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_tokens_are_those_of_autocast(precision: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().requires_grad_(False)
    found, state = sample(model, precision, **options), {name: p.clone() for name, p in model.state_dict().items()}
    assert not torch.equal(found, sample(model, "fp32", **options))
    monkeypatch.setattr(HalfWeights, "used", lambda self: nullcontext())
    assert torch.equal(found, sample(model, precision, **options))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_copies_follow_the_weights_at_the_same_addresses() -> None:
    model = tiny_model()
    first, half = sample(model), HalfWeights.of(model, torch.bfloat16)
    addresses = [p.data_ptr() for p in half.copies]
    with torch.no_grad():
        model.condition_proj.weight.mul_(-1)
    changed = sample(model)
    assert not torch.equal(first, changed) and HalfWeights.of(model, torch.bfloat16) is half
    assert [p.data_ptr() for p in half.copies] == addresses
    model.load_state_dict(tiny_model().state_dict(), assign=True)  # other parameters in the same layers
    assert torch.equal(sample(model), first) and HalfWeights.of(model, torch.bfloat16) is not half
    twin = copy.deepcopy(model)
    assert torch.equal(sample(twin), first) and list(twin.state_dict()) == list(model.state_dict())


def test_the_weights_come_back_after_an_error() -> None:
    model = tiny_model()
    parameters = dict(model.named_parameters())
    with pytest.raises(KeyError), HalfWeights.of(model, torch.float16).used():
        assert model.z_proj.weight.dtype == torch.float16 and model.z_proj_ln.weight.dtype == torch.float32
        raise KeyError
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.skipif(bool(no_fake_gpu()), reason=no_fake_gpu())
@pytest.mark.slow
@pytest.mark.parametrize("trainable", [True, False])
def test_no_weight_is_cast_in_the_loop_and_no_modulation_is_copied(trainable: bool) -> None:
    """On a fake GPU with its autocast: kernels that a step launches, whether or not the weights require a gradient."""
    config = tiny_config()
    with on_fake_gpu("bf16"):
        model = TokenBridge(**config).eval().requires_grad_(trainable)
        counter = OpCounter()
        counter.armed = False
        model.z_proj.register_forward_pre_hook(lambda *_: setattr(counter, "armed", True))
        with counter:
            model.sample_tokens(2, 4, 3.0, labels=[3, 7], seeds=[1, 2])
    layers, blocks = config["channel_depth"], config["encoder_depth"] + config["decoder_depth"]
    # inputs of a block's first two linears; in the head also queries, keys, queries again, and of each position the
    # input of its logits and these in float32; a few more of a step are of no block. The first step has two passes.
    most = 4 * (2 * blocks + 16 * (5 * layers + 2) + 8) + 2 * blocks + 8
    assert counter.by_name["_to_copy"] <= most and counter.launches <= 4 * (16 * (22 * layers + 14) + 13 * blocks + 40)
    assert counter.syncs == {}


def test_addcmul_reads_every_type_as_it_is() -> None:
    x, a, b = torch.randn(3, 4), torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    expected = torch.addcmul(x, a.float(), b.float())
    for precision in ("fp32", "bf16"):
        with dist.autocast(torch.device("cpu"), precision):
            assert torch.equal(addcmul(x, a, b), expected)
