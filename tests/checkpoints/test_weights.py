"""Checkpoint files of every layout give the same model: published, float16, an EMA by itself, a bare state dict,
safetensors; hf:// addresses apart.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import generation
import models
from checkpoints.published import generator_state, one_layout, structure_from_shapes
from main_tokenbridge import main
from models.tokenbridge import TokenBridge
from tests.helpers import Explosive, fill_golden, golden_json, tiny_config, tiny_vae
from util.checkpoint import find_file, load_state, read_file

SHAPES = {name: golden_json(f"manifest_tokenbridge_{name}") for name in ("base", "large", "huge")}


def tiny(**changes: object) -> TokenBridge:
    return fill_golden(TokenBridge(**tiny_config(**changes))).eval()


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# ---- told from shapes


@pytest.mark.parametrize("name", SHAPES)
def test_published_sizes_are_known_by_their_shapes(name: str) -> None:
    """From the published manifests alone: no weights are made, and building the result on the meta device gives those
    shapes again.
    """
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in SHAPES[name].items()}
        found, arguments = structure_from_shapes(state, "file")
        model = TokenBridge(**arguments)
    assert found == f"tokenbridge_{name}" and model.head_start == "official"
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == SHAPES[name]
    assert (model.class_num, model.buffer_size, model.config.img_size, model.config.quant_levels) == (1000, 64, 256, 64)


def test_sizes_that_no_model_has(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"x\.pth is of no known size: encoder \d+ x \d blocks.*known are tokenbridge_base"
    ):
        structure_from_shapes(tiny().state_dict(), "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth does not describe a TokenBridge model.*is the file a VAE's"):
        structure_from_shapes(tiny_vae().state_dict(), "x.pth")


# ------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture
def known_size(monkeypatch: pytest.MonkeyPatch) -> TokenBridge:
    """The golden tiny model, registered as `tokenbridge_tiny`, so that files without a config are recognised."""
    sizes = {
        key: value
        for key, value in tiny_config().items()
        if "embed_dim" in key and key != "vae_embed_dim" or "depth" in key or "heads" in key
    }
    monkeypatch.setitem(models.MODELS, "tokenbridge_tiny", models.partial(TokenBridge, **sizes))
    return tiny(head_start="official")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in state.items()}


def ema_of(model: TokenBridge) -> dict[str, Tensor]:
    return {name: p.detach() * 1.5 for name, p in model.named_parameters()}


LAYOUTS: dict[str, tuple[Callable[[TokenBridge], dict], float]] = {
    "published": (
        lambda m: {"model": m.state_dict(), "model_ema": ema_of(m), "optimizer": {}, "epoch": 799, "scaler": {}},
        0,
    ),
    "float16": (lambda m: {"model": half(m.state_dict()), "model_ema": half(ema_of(m))}, 2e-3),
    "EMA alone": (lambda m: {"model_ema": ema_of(m)}, 0),
    "EMA alone, float16": (lambda m: {"model_ema": half(ema_of(m))}, 2e-3),
    "bare": (lambda m: m.state_dict() | ema_of(m), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_ema(tmp_path: Path, known_size: TokenBridge, layout: str) -> None:
    make, tolerance = LAYOUTS[layout]
    saved(tmp_path / "checkpoint-last.pth", make(known_size))
    vae = tiny_vae()
    saved(tmp_path / "vae.pth", {"model": vae.state_dict(), "config": vae.config})
    pipeline = generation.load(tmp_path)
    model = pipeline.model
    assert model.head_start == "official" and not model.training
    for name, value in model.named_parameters():
        assert value.dtype == torch.float32
        assert torch.allclose(value, ema_of(known_size)[name], rtol=tolerance, atol=1e-7), name
    for table in ("boundaries", "reconstruction_values"):
        assert torch.equal(getattr(model, table), getattr(known_size, table)), (
            "tables must stay float32 whatever the file's precision"
        )
    assert len(pipeline.generate([1], num_iter=2)) == 1


def test_one_set_of_weights_is_not_taken_for_the_other(known_size: TokenBridge) -> None:
    content = one_layout({"model_ema": ema_of(known_size)}, "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds one set of weights, ema: model is not there"):
        generator_state(content, known_size, "model", "x.pth")
    with pytest.raises(ValueError, match=r'x\.pth has no weights under the key "model"; found state_dict'):
        one_layout({"state_dict": {}}, "x.pth")
    with pytest.raises(ValueError, match='x.pth has no model_ema; give weights "model"'):
        generator_state({"model": known_size.state_dict()}, known_size, "ema", "x.pth")


def test_published_weights_and_flags(tmp_path: Path, known_size: TokenBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """--evaluate and --sample know the size of a file without config; a flag that says otherwise is refused with both
    values.
    """
    saved(tmp_path / "checkpoint-last.pth", LAYOUTS["published"][0](known_size))
    vae = tiny_vae()
    saved(tmp_path / "vae.pth", {"model": vae.state_dict(), "config": vae.config})
    common = [
        "--sample",
        "--resume",
        str(tmp_path),
        "--vae_path",
        str(tmp_path / "vae.pth"),
        "--classes",
        "1",
        "--num_images",
        "1",
        "--num_iter",
        "2",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    for flag, value, words in (
        ("--model", "tokenbridge_huge", "model is tokenbridge_tiny"),
        ("--quant_bits", "6", "quant_bits is 4"),
        ("--class_num", "1000", "class_num is 10"),
        ("--img_size", "256", "img_size is 64"),
    ):
        with pytest.raises(
            ValueError,
            match=f"{flag[2:]} {value} contradicts .*checkpoint-last.pth: from the shapes of its weights, {words}; "
            f".*{flag}",
        ):
            main([*common, flag, value])
        assert not (tmp_path / "out").exists()
    main(common)
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["labels"] == [1]


def test_training_is_not_continued_from_one_set_of_weights(
    tmp_path: Path, known_size: TokenBridge, image_root: Path
) -> None:
    saved(tmp_path / "ema.pth", {"model_ema": ema_of(known_size)})
    with pytest.raises(ValueError, match=r"ema\.pth holds one set of weights only.*\(--resume\)"):
        main(
            [
                "--resume",
                str(tmp_path / "ema.pth"),
                "--data_path",
                str(image_root),
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )


# ------------------------------------------------------------------------------------------------------- reading


def test_code_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "evil.pth", {"model": Explosive(tmp_path / "ran")})
    for mmap in (False, True):
        with pytest.raises(ValueError, match=r"evil\.pth holds code \([\w.]*getattr\), which is never run"):
            read_file(path, "resume", mmap)
    assert not (tmp_path / "ran").exists()


def test_mapped_and_read_are_equal(tmp_path: Path) -> None:
    model = tiny()
    for name, old in (("new.pth", False), ("old.pth", True)):
        torch.save({"model": model.state_dict()}, tmp_path / name, _use_new_zipfile_serialization=not old)
        for mmap in (False, True):
            content = read_file(tmp_path / name, mmap=mmap)
            assert all(torch.equal(value, content["model"][key]) for key, value in model.state_dict().items())


def test_folders(tmp_path: Path) -> None:
    assert find_file(tmp_path) == tmp_path / "checkpoint-last.pth"
    (tmp_path / "model.safetensors").touch()
    assert find_file(tmp_path) == tmp_path / "model.safetensors"
    (tmp_path / "checkpoint-last.pth").touch()
    assert find_file(tmp_path) == tmp_path / "checkpoint-last.pth"
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        read_file(tmp_path / "model.safetensors")


def test_load_state_leaves_the_module_alone_when_it_refuses() -> None:
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()} | {
        "mask_token": torch.full((1, 1, model.mask_token.shape[-1]), float("nan"))
    }
    with pytest.raises(ValueError, match="x.pth holds NaN or infinite weights, first: mask_token"):
        load_state(model, state, "x.pth")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_hub_addresses_are_not_for_load() -> None:
    with pytest.raises(ValueError, match=r"checkpoints\.download\.local_path\('hf://a/b'\) fetches it"):
        generation.load("hf://a/b")
