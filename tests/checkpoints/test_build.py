"""checkpoints/: files of every layout give the same model; which run is continued; options that contradict a file."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import generation
import models
from checkpoints.build import StructureOptions, build_model
from checkpoints.content import continues_run_in, read_checkpoint
from checkpoints.published import generator_state, one_layout, structure_from_shapes
from models.tokenbridge import TokenBridge
from tests.helpers import fill_golden, golden_json, tiny_config, tiny_vae
from util.checkpoint import LAST, SAFE
from util.options import ArgumentError

SHAPES = {name: golden_json(f"manifest_tokenbridge_{name}") for name in ("base", "large", "huge")}


def tiny(**changes: object) -> TokenBridge:
    return fill_golden(TokenBridge(**tiny_config(**changes))).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes_are_known_by_their_shapes(name: str) -> None:
    """From the published manifests alone: building the result on the meta device gives those shapes."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in SHAPES[name].items()}
        found, arguments = structure_from_shapes(state, "file")
        model = TokenBridge(**arguments)
    c = model.config
    assert found == f"tokenbridge_{name}" and model.head_start == "official"
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]
    assert (c.class_num, c.buffer_size, c.img_size, c.quant_levels) == (1000, 64, 256, 64)


def test_sizes_that_no_model_has() -> None:
    for module, words in (
        (tiny(), r"x\.pth is of no known size: encoder \d+ x \d blocks.*known are tokenbridge_base"),
        (tiny_vae(), r"x\.pth does not describe a TokenBridge model: it lacks 'class_emb.weight'"),
    ):
        with pytest.raises(ValueError, match=words):
            structure_from_shapes(module.state_dict(), "x.pth")


@pytest.fixture
def known_size(monkeypatch: pytest.MonkeyPatch) -> TokenBridge:
    """The golden tiny model, registered as `tokenbridge_tiny`, so that files without a config are recognised."""
    names = ("embed_dim", "depth", "heads")
    sizes = {k: v for k, v in tiny_config().items() if k != "vae_embed_dim" and any(name in k for name in names)}
    monkeypatch.setitem(models.MODELS, "tokenbridge_tiny", models.partial(TokenBridge, **sizes))
    return tiny(head_start="official")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in state.items()}


def ema_of(model: TokenBridge) -> dict[str, Tensor]:
    return {name: p.detach() * 1.5 for name, p in model.named_parameters()}


def wrapped(state: object) -> object:
    """The keys that DistributedDataParallel around a compiled module gives a state dict."""
    return {f"module._orig_mod.{key}": value for key, value in state.items()} if isinstance(state, dict) else state


def published(model: TokenBridge) -> dict:
    """The content of a published file."""
    return {"model": model.state_dict(), "model_ema": ema_of(model), "optimizer": {}, "epoch": 799, "scaler": {}}


LAYOUTS: dict[str, tuple[Callable[[TokenBridge], dict], float]] = {
    "published": (published, 0),
    "float16": (lambda m: {"model": half(m.state_dict()), "model_ema": half(ema_of(m))}, 2e-3),
    "EMA alone": (lambda m: {"model_ema": ema_of(m)}, 0),
    "EMA alone, float16": (lambda m: {"model_ema": half(ema_of(m))}, 2e-3),
    "bare": (lambda m: m.state_dict() | ema_of(m), 0),
    "state_dict": (lambda m: {"state_dict": m.state_dict() | ema_of(m), "epoch": 3}, 0),
    "wrapped": (lambda m: {key: wrapped(state) for key, state in published(m).items()}, 0),
    "bare safetensors": (lambda m: m.state_dict() | ema_of(m), 0),
    "bare and wrapped": (lambda m: wrapped(m.state_dict() | ema_of(m)), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_ema(tmp_path: Path, known_size: TokenBridge, layout: str) -> None:
    make, tolerance = LAYOUTS[layout]
    if layout == "bare safetensors":
        save_file(make(known_size), tmp_path / SAFE)
    else:
        torch.save(make(known_size), tmp_path / LAST)
    vae = tiny_vae()
    torch.save({"model": vae.state_dict(), "config": vae.config}, tmp_path / "vae.pth")
    pipeline = generation.load(tmp_path)
    model = pipeline.model
    assert model.head_start == "official" and not model.training
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.allclose(value, ema_of(known_size)[name], rtol=tolerance, atol=1e-7), name
    for table in ("boundaries", "reconstruction_values"):  # float32 whatever the file's precision
        assert torch.equal(getattr(model, table), getattr(known_size, table))
    assert len(pipeline.generate([1], num_iter=2)) == 1


def test_one_set_of_weights_is_not_taken_for_the_other(known_size: TokenBridge) -> None:
    content = one_layout({"model_ema": ema_of(known_size)}, "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds one set of weights, ema: model is not there"):
        generator_state(content, known_size, "model", "x.pth")
    with pytest.raises(ValueError, match=r'x\.pth has no weights under the key "model"; found state_dict'):
        one_layout({"state_dict": {}}, "x.pth")
    with pytest.raises(ValueError, match='x.pth has no model_ema; give weights "model"'):
        generator_state({"model": known_size.state_dict()}, known_size, "ema", "x.pth")


@pytest.mark.parametrize(
    ("option", "value", "actual"),
    [
        ("model", "tokenbridge_huge", "tokenbridge_tiny"),
        ("quant_bits", 6, 4),
        ("class_num", 1000, 10),
        ("img_size", 256, 64),
        ("buffer_size", 64, 5),
    ],
)
def test_options_and_published_weights(known_size: TokenBridge, option: str, value: object, actual: object) -> None:
    """The size of a file without config is inferred; a given option that contradicts it is refused with both values."""
    content, vae = published(known_size), tiny_vae()
    options = StructureOptions(**{option: value})
    with pytest.raises(ArgumentError, match=f"{option} {value} contradicts x.pth: .*{option} is {actual}") as caught:
        build_model(options, {option}, vae, content, Path("x.pth"))
    assert caught.value.argument == option
    model, used = build_model(options, set(), vae, content, Path("x.pth"))
    assert getattr(used, option) == actual and used.vae_stride == 16
    assert model.config == known_size.config.changed(**{k: getattr(model.config, k) for k in BEHAVIOUR})


BEHAVIOUR = ("attn_dropout", "proj_dropout", "label_drop_prob")  # not in the shapes: the options' values


def checkpoint_of(model: TokenBridge, name: str = "tokenbridge_tiny") -> dict:
    """A checkpoint of training."""
    vae = tiny_vae()
    config = {"model_name": name, "model": model.config.to_dict(), "vae": vae.config, "args": {"quantizer": "uniform"}}
    config["vae_fingerprint"] = vae.latent_fingerprint()
    return {"model": model.state_dict(), "config": config, "step": 3}


def test_a_config_fixes_the_structure_and_training_may_change_the_behaviour(messages: list[str]) -> None:
    content, source = checkpoint_of(tiny()), Path("x.pth")
    options = StructureOptions(proj_dropout=0.3, quant_bits=5)
    model, used = build_model(options, {"proj_dropout"}, tiny_vae(), content, source)
    assert model.config == tiny().config.changed(proj_dropout=0.3)
    assert (used.model, used.quant_bits, used.quantizer, used.proj_dropout) == ("tokenbridge_tiny", 4, "uniform", 0.3)
    assert "proj_dropout: 0.3 from now on, was 0.0" in messages
    for given, trains in (({"quant_bits"}, True), ({"proj_dropout"}, False), ({"quantizer"}, True)):
        with pytest.raises(ArgumentError, match=f"{next(iter(given))} .* contradicts x.pth, which was trained with"):
            build_model(options, given, tiny_vae(), content, source, trains=trains)
    other = tiny_vae()
    torch.nn.init.constant_(other.quant_conv.bias, 0.1)
    with pytest.raises(ArgumentError, match="is not the VAE that x.pth was trained with: other encoder weights"):
        build_model(options, set(), other, content, source)


def test_a_fresh_model_takes_what_its_vae_suggests_unless_given() -> None:
    vae = tiny_vae()
    vae.set_description(dataclasses.replace(vae.description, quant_bits=5, quant_min=-2.0, quant_max=2.0))
    sizes = dict(model="tokenbridge_digits", img_size=64, class_num=3, buffer_size=4, quantizer="uniform")
    model, used = build_model(StructureOptions(**sizes), {"quant_bits"}, vae)
    assert (used.quant_bits, used.quant_min, used.vae_stride) == (6, -2.0, 16) and model.config.head_start == "trained"
    steps = model.reconstruction_values.diff()
    assert torch.allclose(steps, steps[0].expand_as(steps), atol=1e-5)  # the levels of --quantizer uniform


def test_which_run_is_continued(tmp_path: Path, messages: list[str]) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        folder.mkdir()
        assert read_checkpoint(str(folder), str(folder), trains=True) == (None, None)
        assert messages[-1] == f"no {LAST} in {folder}: training starts from random weights"
        torch.save(checkpoint_of(tiny()), folder / LAST)
    for resume in (out, out / LAST, f"{out}/../out"):
        assert continues_run_in(out, resume) and read_checkpoint(str(resume), str(out), trains=True)[1]["step"] == 3
    for resume in ("", other, other / LAST, tmp_path / "absent"):
        assert not continues_run_in(out, resume)
        with pytest.raises(ArgumentError, match=f"already holds a {LAST}: continue it with --resume {out}"):
            read_checkpoint(str(resume), str(out), trains=True)
    assert read_checkpoint(str(other), str(tmp_path / "new"), trains=True)[0] == other / LAST


def test_training_is_not_continued_from_one_set_of_weights(tmp_path: Path, known_size: TokenBridge) -> None:
    torch.save({"model_ema": ema_of(known_size)}, tmp_path / "ema.pth")
    with pytest.raises(ArgumentError, match=r"ema\.pth holds one set of weights only") as caught:
        read_checkpoint(str(tmp_path / "ema.pth"), str(tmp_path / "out"), trains=True)
    assert caught.value.argument == "resume"
    assert read_checkpoint(str(tmp_path / "ema.pth"), "", trains=False)[1]["weights"] == "ema"


@pytest.mark.parametrize("arguments", [("hf://alone",), ("nowhere", "hf://alone")])
def test_hub_addresses_that_are_none(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="hf://alone is no address on the hub"):
        generation.load(*arguments)
