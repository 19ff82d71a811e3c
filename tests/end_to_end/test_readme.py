"""Every command of README.md and docs/*.md is run as it stands there, on toy data: taken from the markdown, read by
shell rules, started in this process.

What is not as on a reader's machine: DIR holds a few pictures, the models of all names are tiny, the published
weights are stand-ins in the published layout, Inception's features are a few colours, AlexNet is random, training
and sampling are cut to a step or two, torchrun and the launchers start one process, which is this one (tests of two,
and of the launchers themselves, are elsewhere), `make` only says what it would do, and demo.app does not wait for a
visitor.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import alexnet

import main_tokenbridge
import models
from checkpoints import download
from checkpoints.download import PUBLISHED
from demo import app
from demo.server import Server
from evaluation import evaluator
from models.tokenbridge import TokenBridge
from tests.helpers import REPO, photographs, tiny_vae, write_image_folder
from tests.stand_ins import Colours, FewColours, small_reference
from tools import fid_stats

FIRST = (REPO / "README.md", REPO / "docs" / "own_data.md")  # what they write, others read
DOCUMENTS = {path: path.read_text() for path in (*FIRST, *sorted((REPO / "docs").glob("*.md")))}
README = DOCUMENTS[REPO / "README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)  # (language, content)
# What makes a command small; appended, so that the last word is this one's. None: run as it stands.
TOY = {
    "main_vae.py": "--width 32 --norm_groups 8 --num_res_blocks 1 --max_steps 1 --batch_size 4 --num_workers 0 "
    "--device cpu",
    "main_cache.py": "--num_workers 0 --device cpu",
    "reconstruction.py": "--num_images 2 --num_workers 0 --device cpu --no_rfid",
    "main_tokenbridge.py": "--device cpu",
    "tools.reproduce": "--dry_run",
    "dataset.latent_statistics": "--num_images 4 --decoded_images 2 --device cpu --num_workers 0",
    "train": "--max_steps 1 --batch_size 2 --num_workers 0 --log_freq 1",
    "sample": "--num_iter 2",
    "evaluate": "--num_iter 1 --num_images 12 --eval_bsz 4",
}


def commands(block: str) -> list[str]:
    """The block's commands, continuation lines joined, comments left out, words one space apart."""
    lines = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


BLOCKS = {
    path: [code for language, code in BLOCK.findall(text) if language == "bash"] for path, text in DOCUMENTS.items()
}
COMMANDS: dict[str, str] = {}  # command -> the document that has it first
for _path, _blocks in BLOCKS.items():
    for _block in _blocks:
        for _command in commands(_block):
            COMMANDS.setdefault(_command, _path.name)


def tiny(width: int, **sizes: int) -> partial:
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_embed_dim": width, f"{part}_depth": 1, f"{part}_num_heads": 2}
    return partial(TokenBridge, **sizes, channel_embed_dim=32, channel_depth=1, channel_heads=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the documents suppose it: data, published weights, a VAE, a cache in the published layout, a demo
    that has run.
    """
    root = tmp_path_factory.mktemp("readme")
    for split in ("train", "val"):
        write_image_folder(root / "DIR", per_class=4, size=(80, 72), split=split)
    for i in range(10):  # 12 classes, as --class_num 12 says
        shutil.copytree(root / "DIR" / "train" / "china", root / "DIR" / "train" / f"other{i}")
    Image.fromarray(photographs()[0][:90, :90]).save(root / "photo.png")
    mask = np.zeros((90, 90), np.uint8)
    mask[:45] = 255
    Image.fromarray(mask).save(root / "mask.png")
    kl16 = tiny_vae()
    (root / "pretrained_models" / "vae").mkdir(parents=True)
    torch.save({"model": kl16.state_dict(), "config": kl16.config}, root / "pretrained_models" / "vae" / "kl16.ckpt")
    shutil.copy(root / "pretrained_models" / "vae" / "kl16.ckpt", root / "VAE")
    features = {key: value for key, value in alexnet().state_dict().items() if key.startswith("features")}
    torch.save(features, root / "alexnet-owt-7be5be79.pth")
    (root / "OLD" / "china").mkdir(parents=True)
    moments = np.ones((32, 16, 16), np.float32)
    np.savez(root / "OLD" / "china" / "00.png.npz", moments=moments, moments_flip=moments)
    for name, model in (("large", tiny(48)(class_num=1000)), ("huge", tiny(64)(class_num=1000))):
        folder = root / "pretrained_models" / "tokenbridge" / f"tokenbridge_{name}"
        folder.mkdir(parents=True)
        weights = {"model": model.state_dict(), "model_ema": dict(model.named_parameters())}
        torch.save(weights | {"optimizer": {}, "epoch": 799, "scaler": {}}, folder / "checkpoint-last.pth")
    digits = tiny(32)(img_size=64, class_num=10, buffer_size=4)
    (root / "demo" / "out" / "model").mkdir(parents=True)
    (root / "demo" / "out" / "vae").mkdir()
    torch.save({"model": kl16.state_dict(), "config": kl16.config}, root / "demo" / "out" / "vae" / "vae.pth")
    config = {"model_name": "tokenbridge_digits", "model": digits.config.to_dict(), "args": {}}
    config |= {"vae": kl16.config, "vae_fingerprint": kl16.latent_fingerprint()}
    content = {"model": digits.state_dict(), "model_ema": dict(digits.named_parameters()), "config": config}
    torch.save(content, root / "demo" / "out" / "model" / "checkpoint-last.pth")
    lines = [{"step": step, "loss": 3.2, "lr": 1e-3, "grad_norm": 0.5} for step in range(1, 40)]
    (root / "demo" / "out" / "model" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copy(REPO / "demo" / "expected_loss.json", root / "demo")
    shutil.copytree(root / "DIR", root / "demo" / "out" / "digits")
    (root / "fid_stats").mkdir()
    statistics = dict(mu=np.zeros(2048, np.float32), sigma=np.eye(2048, dtype=np.float32))
    np.savez(root / "fid_stats" / "adm_in256_stats.npz", **statistics)
    (root / "fid_stats" / "VIRTUAL_imagenet256_labeled.npz").touch()
    return root


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """run(command) does what a shell would in that folder; AssertionError or the command's own error if it fails."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("RANK_OF_NODE", "0")
    monkeypatch.setenv("ADDRESS", "127.0.0.1")
    for name, width in {"base": 40, "large": 48, "huge": 64, "digits": 32}.items():
        monkeypatch.setitem(models.MODELS, f"tokenbridge_{name}", tiny(width))
    monkeypatch.setattr(evaluator, "InceptionFeatures", FewColours)
    monkeypatch.setattr(evaluator, "load_references", lambda *_, **__: small_reference())
    monkeypatch.setattr(fid_stats, "InceptionFeatures", Colours)

    def toy(module: str, argv: list[str]) -> list[str]:
        flags = TOY.get(f"{module}.py" if f"{module}.py" in TOY else module, "")
        if module == "main_tokenbridge":
            evaluates = "--evaluate" in argv or "_eval" in " ".join(argv)
            what = "evaluate" if evaluates else "sample" if "--sample" in argv else "train"
            flags += f" {TOY[what]}"
        if module == "main_cache" and ("--verify" in argv or "--info" in argv):
            flags = ""
        return argv + shlex.split(flags)

    def start(command: str) -> None:
        words = [os.path.expandvars(word) for word in shlex.split(command)]
        program, words = words[0], words[1:]
        if program == "source":
            assert words == [".venv/bin/activate"]
        elif program == "make":
            result = subprocess.run(["make", "-n", *words], cwd=REPO, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
        elif program in ("pip", "uv", "conda"):
            assert (REPO / words[-1]).is_file() and words[-2] in ("-r", "-f"), command
        elif program == "sbatch" or program.startswith("scripts/"):
            script, out, *flags = words if program == "sbatch" else [program, *words]
            assert (REPO / script).is_file() and subprocess.run(["bash", "-n", script], cwd=REPO).returncode == 0
            main_tokenbridge.main(toy("main_tokenbridge", ["--output_dir", out, "--resume", out, *flags]))
        else:
            assert program in ("python", "torchrun"), f"a program that this test does not know: {program}"
            while program == "torchrun" and words[0].startswith("--"):
                assert "=" in words[0]
                words = words[1:]
            module, words = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
            file = REPO / module.replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), module
            importlib.import_module(f"{module}.__main__" if file.is_dir() else module).main(toy(module, words))

    return start


def test_there_are_commands_and_shells_can_read_them() -> None:
    names = "README cache demos evaluation logs own_data published reproduce sampling training"
    assert len(COMMANDS) > 35 and {f"{name}.md" for name in names.split()} <= set(COMMANDS.values())
    for path, blocks in BLOCKS.items():
        for block in blocks:
            result = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
            assert result.returncode == 0, f"{path.name}: {result.stderr}"


def test_no_command_hides() -> None:
    """Code stands in fences at the line's start whose language is said; none is indented, where test_every_command_runs
    would miss it.
    """
    for path, text in DOCUMENTS.items():
        assert {language for language, _ in BLOCK.findall(text)} <= {"bash", "python", "text"}, path.name
        assert len(re.findall("```", text)) == 2 * len(BLOCK.findall(text)), path.name
        hidden = re.search(r"^\s+(?:\$ )?(?:python|torchrun|make|bash|sbatch) ", BLOCK.sub("", text), flags=re.M)
        assert not hidden, path.name


def test_published_commands_are_in_it() -> None:
    """docs/spec.md 10: the official commands, word by word but for the folders."""
    joined = " ".join(COMMANDS)
    for words in (
        "python reconstruction.py --bits 6 --range 5.0 --image_dir",
        "--eval_bsz 256 --num_images 50000 --num_iter 256 --cfg 3.1 --quant_bits 6",
        "--cfg 3.45 --quant_bits 6 --cfg_schedule linear --temperature 0.91",
        "--quant_bits 6 --quant_min -5.0 --quant_max 5.0 --epochs 400",
    ):
        assert words in joined


@pytest.mark.slow
def test_every_command_runs(run: Callable[[str], None], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's, then the other documents', each once: what one writes another reads.

    Downloads and the page are stand-ins.
    """
    served = []
    monkeypatch.setattr(app, "serve", lambda server: served.append(server.host))
    monkeypatch.setattr(app, "Server", lambda host, _: Server(host, 0))  # the usual port may be in use
    monkeypatch.setattr(download, "fetch_all", lambda names, *_: served.append(names))
    failed = []
    for command, document in COMMANDS.items():
        try:
            run(command)
        except (Exception, SystemExit) as error:  # all of them are wanted, not the first
            failed.append(f"{document}: {command[:90]}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)
    assert sorted(map(str, served)) == sorted(["127.0.0.1", "['stats', 'adm_batch']", *[str([*PUBLISHED])] * 2])
    written = """
        OUT/vae/vae.pth OUT/cache/cache.json OUT/model/checkpoint-last.pth OUT/pictures/grid.png
        OUT/export/model.safetensors OUT/imagenet/grid.png OUT/edit/grid.png OUT/mix/grid.png OUT/large/eval.jsonl
        OUT/huge/eval.jsonl OUT/train/checkpoint-last.pth OUT/guidance/sweep.png OUT/steps/steps/grid.png
        OUT/bits/rate_distortion.png demo/out/model/curves.png quantization_results/results.json
        OUT/node/checkpoint-last.pth OUT/train/curves.png OUT/eval/eval_sweep.csv fid_stats/mine_64.npz
        NEW/cache.json VAE.latents.json
    """
    assert not [name for name in written.split() if not (place / name).is_file()]


def anchors(text: str) -> set[str]:
    """What the headings are called in links, as GitHub does it."""
    return {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in BLOCK.sub("", text).splitlines()
        if line.startswith("#")
    }


def test_links_lead_somewhere() -> None:
    for path, text in DOCUMENTS.items():
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
            found = path.parent / target if target else path
            assert found.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(found.read_text()), f"{path.name}: {target}#{anchor}"


def test_files_that_they_name_exist() -> None:
    """Sources and documents by their names, paths below the folders of the repository, and modules; CI's too."""
    code = ("checkpoints", "dataset", "demo", "evaluation", "generation", "models", "tools", "training", "util")
    folders = "|".join([*code, "tests", "scripts", "containers", "docs", "configs", "assets"])
    sources = {path.name for folder in (*code, "scripts", "tests") for path in (REPO / folder).rglob("*.*")}
    sources |= {path.name for path in REPO.glob("*.py")}
    others = [REPO / name for name in (".ci/run", "Makefile", "pyproject.toml")]
    for path, text in (DOCUMENTS | {path: path.read_text() for path in others}).items():
        for name in re.findall(r"(?<![\w./-])[\w-]+\.(?:py|sh)\b", text):
            assert name in sources, f"{path.name}: {name}"
        for name in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", text):
            assert (REPO / name).exists() or re.match(r"demo/(out|\w+\.png)", name), f"{path.name}: {name}"
        for name in re.findall(r"(?:python -m |`)((?:tools|demo)\.\w+)", text):
            file = REPO / name.replace(".", "/")
            assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), f"{path.name}: {name}"


def test_flags_that_they_name_exist() -> None:
    """Every --flag is one of some script's parser, or torchrun's, docker's, pip's, scripts/gpu_check.sh's."""
    known = {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    known |= {"--shm", "--wheels", "--dest", "--no"}  # docker's --shm-size, pip's --no-deps
    for flags in json.loads((REPO / "tests" / "flags.json").read_text()).values():
        known |= {flag for name, value in flags.items() for flag in (value if isinstance(value, dict) else (name,))}
    for path, text in DOCUMENTS.items():
        # the misspelt one, as an example of what is refused
        text = text.replace("`--quant_bit 6` should not be ignored", "")
        assert {flag for flag in re.findall(r"(?<![\w-])--[a-z]\w*", text)} <= known, path.name


def test_the_python_example(run: Callable[[str], None], place: Path) -> None:
    """The README's python block, with two steps instead of 64."""
    code = re.search(r"^```python\n(.*?)^```", README, flags=re.M | re.S)[1]
    found: dict = {}
    exec(code.replace("num_iter=64", "num_iter=2"), found)
    assert [image.size for image in found["images"]] == [(256, 256)] * 2
