"""Published checkpoints resume here, ours resume in the published code (docs/spec.md 7)."""

import argparse
import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine_tokenbridge import train_one_epoch
from main_tokenbridge import build_parser, main
from models import MODELS
from models.tokenbridge import TokenBridge
from tests.helpers import argv_of, assert_same, tiny_batch, tiny_model, tiny_vae
from tools import inspect
from training.guard import check_finite
from training.recipe import optimizer_settings, warn_of_other_recipe
from training.settings import TrainSettings
from training.state import TrainState, saved_hyper_parameters
from training.step import optimizer_step
from util import checkpoint, checkpoint_folder

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16", "fp16")
SAVED = dict(weight_decay=0.07, betas=(0.8, 0.9), eps=1e-6)  # no default, so that a default would be noticed


# ---- as the published script does it


def published_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Its parameter groups: first what is never decayed, then the rest, each in the order of the model."""
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        groups[0 if len(parameter.shape) == 1 or name.endswith(".bias") else 1]["params"].append(parameter)
    return groups


def published_optimizer(
    model: nn.Module, weight_decay: float = 0.02, betas: tuple = (0.9, 0.95), eps: float = 1e-8
) -> torch.optim.AdamW:
    """A plain AdamW: nothing is said of fused, foreach or capturable."""
    return torch.optim.AdamW(published_groups(model, weight_decay), lr=1e-3, betas=betas, eps=eps)


def published_file(path: Path, model: nn.Module, layout: str = "parameters", steps: int = 2) -> Path:
    """Train `steps` steps of fp16 with an enabled scaler and write the file as the published script does.

    layout of the EMA: "parameters" (nn.Parameter), "mar" (a whole state dict), "namespace" (with the arguments beside).
    """
    model = copy.deepcopy(model).train()
    optimizer, scaler = published_optimizer(model, **SAVED), torch.amp.GradScaler("cpu", enabled=True)
    ema = copy.deepcopy(list(model.parameters()))
    torch.manual_seed(0)  # masks and dropout
    for _ in range(steps):
        optimizer.zero_grad()
        latents, labels = tiny_batch(2, model.token_dim, model.grid_size, model.class_num)
        with torch.autocast("cpu", torch.float16):
            loss = model(latents, labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for average, parameter in zip(ema, model.parameters(), strict=True):
                average.mul_(0.9).add_(parameter, alpha=0.1)
    averages: dict[str, Tensor] = {name: ema[i] for i, (name, _) in enumerate(model.named_parameters())}
    assert all(value.requires_grad for value in averages.values())
    if layout == "mar":
        averages = model.state_dict() | averages
    content = {"model": model.state_dict(), "model_ema": averages, "optimizer": optimizer.state_dict()}
    content |= {"epoch": 0, "scaler": scaler.state_dict()}
    if layout == "namespace":
        flags = dict(lr=1e-3, weight_decay=SAVED["weight_decay"], warmup_epochs=100, batch_size=64, attn_dropout=0.1)
        content["args"] = argparse.Namespace(**flags, output_dir="out", distributed=True)
    torch.save(content, path)
    return path


def published_resume(path: Path, model: nn.Module) -> tuple[torch.optim.AdamW, dict[str, Tensor], torch.amp.GradScaler]:
    """Read a file as the published script does, into the model and (optimizer, EMA by name, scaler)."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(content["model"])
    ema = {name: content["model_ema"][name] for name, _ in model.named_parameters()}
    optimizer, scaler = published_optimizer(model), torch.amp.GradScaler("cpu", enabled=True)
    optimizer.load_state_dict(content["optimizer"])
    if "scaler" in content:
        scaler.load_state_dict(content["scaler"])
    return optimizer, ema, scaler


# ---- theirs here


def resumed(path: Path, precision: str) -> tuple[TrainState, dict]:
    """A training state that continues from the file with its hyper-parameters, and the content of the file."""
    _, content = checkpoint_folder.load_latest(str(path))
    model = tiny_model()
    checkpoint.load_state(model, content["model"], str(path))
    settings = TrainSettings(**saved_hyper_parameters(content, str(path)), ema_rate=0.9, precision=precision)
    state = TrainState(model, settings)
    state.load_state_dict(content, 2, str(path))
    return state, content


def one_epoch(state: TrainState, precision: str, spoilt: bool = False) -> None:
    """One step of 2 images; spoilt: its latents are NaN."""
    moments = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(state.step))
    batch = (moments * float("nan") if spoilt else moments, torch.tensor([1, 2]))
    schedule = dict(epochs=100, steps_per_epoch=1, lr=1e-3, lr_schedule="constant", warmup_epochs=0)
    train_one_epoch(state, tiny_vae(), [batch], TrainSettings(batch_size=2, precision=precision, **schedule), CPU)


@pytest.mark.parametrize(
    "layout, precision", [("parameters", "fp32"), ("mar", "bf16"), ("namespace", "fp16"), ("parameters", "fp16")]
)
def test_a_published_checkpoint_resumes(tmp_path: Path, precision: str, layout: str) -> None:
    """Its moments, EMA and scaler are read; a good step changes the weights, a NaN one nothing; it is saved again."""
    state, content = resumed(published_file(tmp_path / "checkpoint-last.pth", tiny_model(), layout), precision)
    groups, averages = state.optimizer.param_groups, state.ema.state_dict()
    assert content["optimizer"]["param_groups"][0]["fused"] is None and state.step == 2
    assert all(group["fused"] and group["foreach"] is None and not group["capturable"] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.0, SAVED["weight_decay"]]
    assert all(group["betas"] == SAVED["betas"] and group["eps"] == SAVED["eps"] for group in groups)
    assert not any(value.requires_grad for value in [*averages.values(), *content["model_ema"].values()])
    assert all(torch.equal(value, content["model_ema"][name]) for name, value in averages.items())
    if precision == "fp16":
        assert state.scaler.state_dict() == content["scaler"]

    def kept() -> list[dict]:
        moments = {i: entry["exp_avg"] for i, entry in state.optimizer.state_dict()["state"].items()}
        return copy.deepcopy([state.model.state_dict(), moments])

    (before, _), _ = kept(), one_epoch(state, precision)
    after = kept()
    check_finite(state.weights(), state.step, 0.0)
    changed = [name for name, p in state.model.named_parameters() if not torch.equal(p, before[name])]
    assert state.skipped.in_row == 0 and len(changed) > 0.9 * len(averages)
    one_epoch(state, precision, spoilt=True)
    assert state.skipped.in_row == 1
    assert_same(kept(), after)
    checkpoint.atomic_save(state.snapshot(1), tmp_path / "ours.pth")
    again = checkpoint.read_file(tmp_path / "ours.pth")
    assert_same(again["model"], after[0])
    assert ("scaler" in again) == (precision == "fp16") and list(again["model_ema"]) == list(averages)


def test_the_first_step_is_the_one_that_the_published_optimizer_takes(tmp_path: Path) -> None:
    """The same gradients in both: moments, step count, betas, eps and weight decay are the file's."""
    path = published_file(tmp_path / "checkpoint-last.pth", tiny_model())
    state, _ = resumed(path, "fp32")
    theirs = tiny_model()
    optimizer, _, _ = published_resume(path, theirs)
    generator = torch.Generator().manual_seed(1)
    for p, q in zip(state.model.parameters(), theirs.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
    for group in (*state.optimizer.param_groups, *optimizer.param_groups):
        group["lr"] = 1e-2
    optimizer_step(state, list(state.model.parameters()), 0.0)
    optimizer.step()
    for (name, p), q in zip(state.model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name


def test_an_optimizer_of_other_groups_is_refused(tmp_path: Path) -> None:
    path = published_file(tmp_path / "checkpoint-last.pth", tiny_model(), steps=1)
    content = torch.load(path, weights_only=True)
    state = TrainState(tiny_model(), TrainSettings(precision="fp32"))
    saved = content["optimizer"] | {"param_groups": content["optimizer"]["param_groups"][::-1]}
    with pytest.raises(ValueError, match=r"the optimizer state in a\.pth does not fit this model: its groups hold"):
        state.load_state_dict(content | {"optimizer": saved}, 2, "a.pth")
    with pytest.raises(ValueError, match=r"the optimizer state in a\.pth is not that of an AdamW"):
        saved_hyper_parameters({"optimizer": {}}, "a.pth")


# ---- ours there


@pytest.mark.parametrize("precision", PRECISIONS)
def test_our_checkpoint_resumes_in_the_published_code(tmp_path: Path, precision: str) -> None:
    state = TrainState(tiny_model(), TrainSettings(ema_rate=0.9, precision=precision))
    one_epoch(state, precision)
    checkpoint.atomic_save(state.snapshot(1) | {"config": {"args": {}}}, tmp_path / "checkpoint-last.pth")
    model = tiny_model()
    optimizer, ema, scaler = published_resume(tmp_path / "checkpoint-last.pth", model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), state.model.parameters(), strict=True))
    assert all(torch.equal(ema[name], value) for name, value in state.ema.shadow.items())
    assert all(group["fused"] is None and group["foreach"] is None for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.02]
    moments = {name: state.optimizer.state[p] for name, p in state.model.named_parameters()}
    assert all(
        torch.equal(optimizer.state[p]["exp_avg_sq"], moments[name]["exp_avg_sq"]) and optimizer.state[p]["step"] == 1
        for name, p in model.named_parameters()
    )
    assert scaler.get_scale() == (state.scaler.get_scale() if precision == "fp16" else 2.0**16)
    before = [p.detach().clone() for p in model.parameters()]
    latents, labels = tiny_batch(2)
    with torch.autocast("cpu", torch.float16):
        loss = model.train()(latents, labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert sum(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) > 0.9 * len(before)


# ---- hyper-parameters


@pytest.mark.parametrize(
    "values",
    [
        *(dict(betas=betas) for betas in (("a", 0.9), (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), None, 0.9)),
        *(dict(eps=-1.0), dict(eps="x"), dict(eps=math.inf), dict(weight_decay=math.nan), dict(weight_decay=-0.1)),
    ],
)
def test_hyper_parameters_without_sense_are_refused(values: dict) -> None:
    group = {"weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-6} | values
    words = r"the optimizer state in a\.pth is not that of an AdamW .*leave out its key .optimizer. to start a new one"
    with pytest.raises(ValueError, match=words):
        saved_hyper_parameters({"optimizer": {"param_groups": [group, group]}}, "a.pth")


def test_a_given_flag_wins_otherwise_the_checkpoint(messages: list[str]) -> None:
    content = {"optimizer": {"param_groups": [SAVED | {"weight_decay": 0.0}, SAVED]}}
    assert optimizer_settings(TrainSettings(), (), content, Path("a.pth")).optimizer == SAVED
    assert messages == [
        "weight_decay 0.07 as in a.pth; the default is 0.02",
        "AdamW's betas (0.8, 0.9) as in a.pth, instead of (0.9, 0.95)",
        "AdamW's eps 1e-06 as in a.pth, instead of 1e-08",
    ]
    messages.clear()
    used = optimizer_settings(TrainSettings(), ("weight_decay",), content, Path("a.pth")).optimizer
    assert used == SAVED | {"weight_decay": 0.02}
    assert messages[0] == "weight_decay: 0.02 from now on, was 0.07 in a.pth"
    messages.clear()
    defaults = {"weight_decay": 0.02, "betas": (0.9, 0.95), "eps": 1e-8}
    for nothing_to_say in (None, {"model": {}}, {"optimizer": {"param_groups": [defaults | {"betas": [0.9, 0.95]}]}}):
        used = optimizer_settings(TrainSettings(), (), nothing_to_say, Path("a.pth")).optimizer
        assert used == defaults and messages == []


@pytest.mark.parametrize("where", ["config", "namespace", "dict"])
def test_other_settings_are_named_in_one_line(messages: list[str], where: str) -> None:
    recorded = dict(lr=4e-4, blr=5e-5, warmup_epochs=100, epochs=400, attn_dropout=0.1, grad_clip=3.0, output_dir="a")
    content = {"config": {"config": {"args": recorded}}, "namespace": {"args": argparse.Namespace(**recorded)}}
    content = content.get(where, {"args": recorded})

    def warn(content: dict, lr: float, *flags: str) -> None:
        messages.clear()
        warn_of_other_recipe(vars(build_parser().parse_args(flags)), content, Path("a.pth"), lr)

    warn(content, 4e-4, "--epochs", "800", "--attn_dropout", "0.2", "--grad_clip", "1")
    # build_model names it for files with a config
    dropout = "" if where == "config" else "; attn_dropout 0.2, was 0.1"
    assert messages == [
        f"settings that differ from those of a.pth: epochs 800, was 400; grad_clip 1.0, was 3.0{dropout}"
    ]
    warn(content, 1e-4)
    assert messages == ["settings that differ from those of a.pth: peak learning rate 0.0001, was 0.0004 (lr, blr)"]
    warn({"config": {"args": {"lr": None, "blr": 5e-5}}, "data": {"global_batch": 2048}}, 4e-4)
    assert messages == []


# ---- the command


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenBridge, Path]:
    """A model of a size that is known by its shapes, and the file of a VAE for it."""
    vae = tiny_vae(embed_dim=4, ch_mult=(1, 1, 2, 2))
    path = tmp_path_factory.mktemp("vae") / "vae.pth"
    torch.save({"model": vae.state_dict(), "config": vae.config}, path)
    torch.manual_seed(0)
    sizes = dict(img_size=32, vae_stride=8, vae_embed_dim=4, class_num=3, buffer_size=4, channel_order=[0, 1, 2, 3])
    return MODELS["tokenbridge_digits"](**sizes), path


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_command_continues_a_published_training(
    digits: tuple, image_root: Path, tmp_path: Path, messages: list[str], precision: str
) -> None:
    model, vae_path = digits
    (tmp_path / "theirs").mkdir()
    published_file(tmp_path / "theirs" / "checkpoint-last.pth", model, "namespace")
    flags = dict(vae_path=vae_path, data_path=image_root, resume=tmp_path / "theirs", output_dir=tmp_path / "ours")
    flags |= dict(batch_size=4, warmup_epochs=0, lr=1e-3, num_workers=0, device="cpu", epochs=400, max_steps=4, seed=3)
    main(argv_of(**flags, precision=precision))
    content = checkpoint.read_file(tmp_path / "ours" / "checkpoint-last.pth")
    assert content["step"] == 4 and content["config"]["args"]["weight_decay"] == SAVED["weight_decay"]
    assert content["config"]["optimizer"] == SAVED
    assert content["optimizer"]["param_groups"][1]["weight_decay"] == SAVED["weight_decay"]
    assert content["optimizer"]["state"][0]["step"] == 3, "two of the file, one of ours"
    (differs,) = [line for line in messages if line.startswith("settings that differ from those of")]
    assert "warmup_epochs 0, was 100; batch_size 4, was 64" in differs and "peak" not in differs


def test_inspect_measures_the_distance_of_a_whole_state_dict(
    digits: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """MAR's layout: channel_mask holds -inf in both; the distance is that of the parameters, as in the other layout."""
    files = [published_file(tmp_path / f"{layout}.pth", digits[0], layout, 1) for layout in ("mar", "parameters")]
    facts = [inspect.describe(file) for file in files]
    assert facts[0]["EMA distance"] == facts[1]["EMA distance"] and 0 < facts[0]["EMA distance"] < 0.1
    inspect.main([str(tmp_path / "mar.pth")])
    assert f"EMA distance            {facts[0]['EMA distance']:.4g}" in capsys.readouterr().out.splitlines()
