"""tools.inspect tells what a checkpoint holds; tools.export and its way back lose nothing."""

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from torch import nn

import generation
from checkpoints.folder import lowered
from models.latent_space import LatentSpace, VaeDescription
from models.vae_loading import VAE_CLASSES
from tests.helpers import tiny_model, tiny_vae
from tests.hub import Hub
from tools import export, inspect
from util.checkpoint import LAST, fingerprint, read_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the golden tiny model, its EMA 1 % larger, and its VAE. Read only."""
    path, model, vae = tmp_path_factory.mktemp("model"), tiny_model(), tiny_vae()
    torch.save({"model": vae.state_dict(), "config": vae.config}, path / "vae.pth")
    args = {"ema_rate": 0.9, "lr": 1e-3, "vae_path": str(path / "vae.pth"), "data_path": "/home/me/secret"}
    config = dict(model_name="tokenbridge_tiny", model=model.config.to_dict(), classes=list("abcdefghij"), args=args)
    config |= dict(vae=vae.config, vae_fingerprint=vae.latent_fingerprint())
    ema = {name: p.detach() * 1.01 for name, p in model.named_parameters()}
    content = dict(model=model.state_dict(), model_ema=ema, optimizer={"state": {}}, step=700, epoch=6, config=config)
    torch.save(content, path / LAST)
    return path


# ------------------------------------------------------------------------------------------------------- inspect


def test_what_inspect_says(folder: Path, capsys: pytest.CaptureFixture) -> None:
    inspect.main([str(folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    model = tiny_model()
    assert facts["model"] == "tokenbridge_tiny" and facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["EMA distance"] == pytest.approx(0.01, rel=1e-5)
    assert facts["step"] == 700 and facts["quantizer"] == "4 bits, -5 to 5"
    assert facts["not finite"] == [] and facts["quantizer tables off by"] == 0
    assert facts["verdict"] == ["nothing wrong was found"] and facts["class names"] == list("abcdefghij")
    inspect.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["step", "700"] for line in lines)
    assert any(line.startswith("EMA distance") and "0.01" in line for line in lines)
    assert any("class 0 = 'a', class 1 = 'b'" in line and line.endswith("and 2 more") for line in lines)
    inspect.main([str(folder / "vae.pth"), "--json"])
    assert json.loads(capsys.readouterr().out)["fingerprint"] == tiny_vae().latent_fingerprint()


class PatchVAE(nn.Module, LatentSpace):
    """A VAE class of another kind than AutoencoderKL, as docs/adding.md describes it."""

    def __init__(self, channels: int, **latents: object):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 2 * channels, 4, 4), nn.ConvTranspose2d(channels, 3, 4, 4)
        self.set_description(VaeDescription(channels, 4, **latents))

    @property
    def config(self) -> dict:
        return {"class": "PatchVAE", "channels": self.embed_dim} | self.latent_config


def test_inspect_of_a_registered_vae(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VAE_CLASSES, "PatchVAE", PatchVAE)
    vae = PatchVAE(6, scale_factor=0.5)
    torch.save({"model": vae.state_dict(), "config": vae.config}, tmp_path / "vae.pth")
    inspect.main([str(tmp_path / "vae.pth"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["latent channels"], facts["stride"], facts["scale"]) == ("VAE", 6, 4, 0.5)
    assert facts["fingerprint"] == vae.latent_fingerprint()


def changed(folder: Path, path: Path, **changes: object) -> Path:
    content = torch.load(folder / "checkpoint-last.pth", weights_only=True) | changes
    torch.save({key: value for key, value in content.items() if value is not None}, path)
    return path


def test_what_inspect_warns_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tiny_model()
    same = {name: p.detach() for name, p in model.named_parameters()}
    inspect.main([str(changed(folder, tmp_path / "a.pth", model_ema=same, step=5))])
    said = capsys.readouterr().out
    assert "the EMA equals the weights" in said
    assert "still holds 59 % of the random initial weights after 5 steps" in said
    warmed = torch.load(folder / "checkpoint-last.pth", weights_only=True)["config"]
    warmed["args"] |= {"ema_rate": 0.9999, "ema_warmup": True}
    inspect.main([str(changed(folder, tmp_path / "w.pth", step=5, config=warmed))])
    assert "still holds" not in capsys.readouterr().out
    broken = model.state_dict() | {"mask_token": torch.full_like(model.mask_token, float("nan"))}
    with pytest.raises(ValueError, match=r"b\.pth holds NaN or infinite weights"):
        inspect.main([str(changed(folder, tmp_path / "b.pth", model=broken))])
    assert "not finite: NaN or infinite values in mask_token" in capsys.readouterr().out
    other = model.state_dict() | {"reconstruction_values": model.reconstruction_values + 0.5}
    inspect.main([str(changed(folder, tmp_path / "c.pth", model=other))])
    assert "differ from the Gaussian ones by 0.5: another quantizer?" in capsys.readouterr().out
    torch.save({"hello": 1}, tmp_path / "d.pth")
    with pytest.raises(ValueError, match=r'd\.pth has no weights under the key "model"; found hello'):
        inspect.main([str(tmp_path / "d.pth")])


# ------------------------------------------------------------------------------------------------------- export


def pictures(path: Path) -> np.ndarray:
    return pictures_of(generation.load(path))


def pictures_of(pipeline: generation.Pipeline) -> np.ndarray:
    return np.stack(pipeline.generate([1, 2], num_iter=3, cfg=2.0, seed=1))


def test_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    export.main([str(folder), "--output_dir", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(export.NAMES)
    assert np.array_equal(pictures(tmp_path / "out"), pictures(folder)), "the EMA's pictures, from its own VAE"
    described = (tmp_path / "out" / "config.json").read_text()
    assert "secret" not in described and str(folder) not in described, "paths of this machine do not leave it"
    card = (tmp_path / "out" / "README.md").read_text()
    words = ("tokenbridge_tiny", "700 optimizer steps", "quality | not measured", "4 bits each")
    assert all(part in card for part in words)
    inspect.main([str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out)["EMA"] == "these weights are the EMA"
    export.main([str(tmp_path / "out"), "--output_dir", str(tmp_path / "back")])
    before, after = read_file(folder / LAST), read_file(tmp_path / "back" / LAST)
    assert all(torch.equal(value, after["model_ema"][name]) for name, value in before["model_ema"].items())
    assert after["step"] == 700
    assert np.array_equal(pictures(tmp_path / "back"), pictures(folder))


def test_half_precision_export(folder: Path, tmp_path: Path) -> None:
    export.main([str(folder), "--output_dir", str(tmp_path / "half"), "--dtype", "float16", "--weights", "model"])
    found = read_file(tmp_path / "half" / "model.safetensors")["model"]
    model = tiny_model()
    assert found["mask_token"].dtype == torch.float16
    assert torch.equal(found["reconstruction_values"], model.reconstruction_values)
    loaded = generation.load(tmp_path / "half", weights="model").model
    assert loaded.mask_token.dtype == torch.float32
    assert torch.allclose(loaded.mask_token, model.mask_token, rtol=1e-3, atol=1e-7)
    with pytest.raises(ValueError, match="holds one set of weights, model: ema is not there"):
        generation.load(tmp_path / "half")
    huge = {"mask_token": torch.full((1, 1, 4), 1e6), "boundaries": torch.zeros(3)}
    with pytest.raises(ValueError, match="dtype float16 cannot hold the weights mask_token"):
        lowered(huge, torch.float16)


def test_what_export_refuses(folder: Path, tmp_path: Path) -> None:
    export.main([str(folder), "--output_dir", str(tmp_path / "out")])
    before, new = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}, tmp_path / "new"
    for source, out, more, words in (
        (folder, tmp_path / "out", (), r"already holds model\.safetensors"),
        (folder, folder, (), r"already holds checkpoint-last\.pth"),
        (folder, new, ("--push", "me"), r"push takes OWNER/REPOSITORY, got .me. \(--push\)"),
        (tmp_path / "out", new, ("--dtype", "float16"), "is an export already"),
        (tmp_path / "nowhere", new, (), "no checkpoint at"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            export.main([str(source), "--output_dir", str(out), *more])
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before and not new.exists()
    for name in ("model.safetensors", "vae.safetensors"):
        path = tmp_path / "out" / name
        path.write_bytes(before[path][:-1] + bytes([before[path][-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"{name} has another SHA-256 than .*json says"):
            generation.load(tmp_path / "out")
        path.write_bytes(before[path])
    (tmp_path / "out" / "config.json").write_text("{")
    words = r"config\.json, the description of .*model\.safetensors, is no JSON of tools\.export"
    with pytest.raises(ValueError, match=words):
        generation.load(tmp_path / "out")


def test_push_uploads_the_five_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with Hub("me/digits", {}) as hub:
        hub.token = "secret"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        # read when the package is imported; below 1.0 results are parsed with it
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(OSError, match=r"cannot push to me/digits \(--push\).*the folder .*out is complete"):
            export.main([str(folder), "--output_dir", str(tmp_path / "out"), "--push", "me/digits"])
        monkeypatch.setenv("HF_TOKEN", "secret")
        (tmp_path / "out" / "private.txt").write_text("not for the hub")
        print(export.push(tmp_path / "out", "me/digits"))
        uploaded = [line["value"] for line in hub.uploads if line["key"] == "file"]
        sent = {file["path"]: base64.b64decode(file["content"]) for file in uploaded}
        assert sent == {name: (tmp_path / "out" / name).read_bytes() for name in export.NAMES}
    assert "/me/digits/commit/" in capsys.readouterr().out


def test_a_pipeline_goes_to_the_hub_and_back(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub("me/digits", {}) as hub:
        hub.token = "secret"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", hub.url)  # read when the package is imported
            assert "/me/digits/commit/" in generation.load(folder).push_to_hub("me/digits", token="secret")
        sent = [line["value"] for line in hub.uploads if line["key"] == "file"]
        hub.files = {file["path"]: base64.b64decode(file["content"]) for file in sent}
        assert hub.files.keys() == set(export.NAMES)
        expected = pictures(folder)
        for pipeline in (
            generation.Pipeline.from_pretrained("me/digits"),
            generation.Pipeline.from_pretrained("me/digits", revision="main"),
            generation.load("hf://me/digits@main"),
        ):
            assert np.array_equal(pictures_of(pipeline), expected)
            assert pipeline.class_names == list("abcdefghij")
    pipeline.save_pretrained(tmp_path / "saved")
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == hub.files
    assert generation.Pipeline.from_pretrained(tmp_path / "saved").class_names == pipeline.class_names
    with pytest.raises(ValueError, match=r"saved already holds model\.safetensors"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert len([*(tmp_path / "saved").iterdir()]) == 5, "config.json is still there"


def test_a_pipeline_without_a_file_is_exported_and_becomes_a_checkpoint(tmp_path: Path) -> None:
    """It does not know whether its weights are an EMA."""
    generation.Pipeline(tiny_model(), tiny_vae()).save_pretrained(tmp_path / "saved")
    export.main([str(tmp_path / "saved"), "--output_dir", str(tmp_path / "back")])
    content = read_file(tmp_path / "back" / LAST)
    assert torch.equal(content["model"]["mask_token"], tiny_model().mask_token) and "model_ema" not in content


def test_the_model_card(folder: Path, tmp_path: Path) -> None:
    """Valid metadata, the classes, and the best scores of these weights; not those of others."""
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    key = {"weights_sha256": fingerprint(generation.load(run).model.state_dict())}
    about = {"num_images": 50000, "cfg": 3.0, "fid_stats": "/home/me/secret/stats.npz"}
    records = [
        key | about | {"fid": 2.5, "inception_score": 250.123},
        key | about | {"fid": 1.875, "inception_score": 301.25},
        key | about | {"fid": 1.0, "weights_sha256": "0" * 64},
        {"fid": 0.5, "step": 700},
    ]
    (run / "eval.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"fid": 0.1')
    export.main([str(run), "--output_dir", str(tmp_path / "out")])
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "tokenbridge")
    assert "| quality | FID 1.875, IS 301.2 (num_images 50000, cfg 3.0, fid_stats stats.npz) |" in card.text
    assert "10 classes: a, b, c, d, e, f, g, h, i, j |" in card.text and "from_pretrained(" in card.text
    assert "| licence | MIT" in card.text and "/home" not in card.text
