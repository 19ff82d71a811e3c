"""The demo: the whole pipeline on real handwritten digits, on a CPU. `make demo` runs it; --toy runs every stage at toy size.

Each stage is a command that a user would type, printed before it runs. A finished stage is stamped and not run again while its command and
the stages before it stay the same; an interrupted one continues where it was. At the end stands a table of stage, time and figure.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

from demo import digits
from util.cli import check_writable, make_parser
from util.files import replacing, write_json
from util.log import run_cli

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Size:
    """What differs between the demo and its toy version, which only shows that the stages fit together."""

    vae_steps: int = 800
    steps: int = 2200
    num_iter: int = 12
    per_class: int = 10


@dataclass
class Stage:
    name: str
    command: list[str] | None  # None: done in this process
    folder: Path  # what it writes; deleted if it stems from another command or other inputs
    # the stage's line in the table, read from the files it wrote; run once, when the stage is done
    figure: Callable[[], str]
    expected: str  # that line on a healthy run
    work: Callable[[], object] = lambda: None


def shown(command: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(
        [
            "torchrun" if part == "torch.distributed.run" else part
            for part in command
            if part not in (sys.executable, "-m")
        ]
    )


def run_stages(stages: Sequence[Stage], out: Path) -> list[tuple[str, float, str]]:
    """Run those that are not stamped; (name, seconds, figure) of each. ValueError if one fails.

    A stamp holds the stage's command and the moment when the stage before it finished: with either changed, the stage starts from nothing.
    """
    rows, before = [], 0.0
    for number, stage in enumerate(stages, 1):
        stamp = out / "stages" / f"{number}-{stage.name.replace(' ', '-')}.json"
        title = f"[{number}/{len(stages)}] {stage.name}"
        key = {
            "command": [
                part.replace(str(out), "OUT").replace(sys.executable, "python") for part in stage.command or []
            ],
            "after": before,
        }
        found = json.loads(stamp.read_text()) if stamp.exists() else {}
        same = {name: found.get(name) for name in key} == key
        if same and "finished" in found:
            print(f"{title}: done before ({found['seconds']:.0f} s): {found['figure']}", flush=True)
        else:
            if not same and stage.folder.is_dir():
                shutil.rmtree(stage.folder)
            write_json(stamp, key)
            print(f"\n{title}" + (f"\n    {shown(stage.command)}" if stage.command else ""), flush=True)
            started = time.perf_counter()
            stage.work()
            if stage.command:
                code = subprocess.run(
                    stage.command,
                    cwd=ROOT,
                    env={"OMP_NUM_THREADS": "1"} | os.environ if "torch.distributed.run" in stage.command else None,
                ).returncode
                if code:
                    raise ValueError(
                        f"stage {number} ({stage.name}) ended with exit code {code}; its message stands above. "
                        "The same command continues from here"
                    )
            found = key | {"seconds": time.perf_counter() - started, "figure": stage.figure(), "finished": time.time()}
            write_json(stamp, found)
            print(f"    {found['seconds']:.0f} s: {found['figure']}", flush=True)
        rows.append((stage.name, found["seconds"], found["figure"]))
        before = found["finished"]
    return rows


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log.jsonl, steps that were skipped left out."""
    lines = [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]
    return {key: np.array([line[key] for line in lines]) for key in ("step", "loss", "lr", "grad_norm")}


def draw_loss(log: dict[str, np.ndarray], path: Path) -> None:
    """loss.png: cross-entropy per dimension over steps, raw and smoothed, with ln 64 where every run begins."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    width = max(1, len(log["loss"]) // 50)
    axes.plot(log["step"], log["loss"], color="lightsteelblue", linewidth=0.7, label="each step")
    axes.plot(
        log["step"][width - 1 :],
        np.convolve(log["loss"], np.ones(width) / width, "valid"),
        color="navy",
        label=f"mean of {width}",
    )
    axes.axhline(np.log(64), color="gray", linestyle=":", label="ln 64: nothing learned yet")
    axes.set(
        xlabel="optimizer step", ylabel="cross-entropy per dimension (nats)", title="TokenBridge on handwritten digits"
    )
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)


def build_stages(out: Path, pictures: Path, size: Size) -> list[Stage]:
    """The pipeline. Figures are read from what the scripts wrote; pictures go to the folder `pictures`."""
    data, vae, cache, model = out / "digits", out / "vae", out / "cache", out / "model"
    reconstructions, samples = out / "reconstruction", out / "samples"
    common = ["--num_workers", "0", "--device", "cpu"]
    counts: dict[str, int] = {}

    def python(script: str, *flags: object) -> list[str]:
        return [sys.executable, script, *map(str, flags), *common]

    def score(files: Sequence[Path], labels: Sequence[int]) -> str:
        return f"{digits.accuracy(digits.fit_judge(data / 'train'), list(files), list(labels)):.1%}"

    def folder_score(root: Path) -> str:
        files = sorted(root.glob("*/*.png"))
        return score(files, [int(file.parent.name) for file in files])

    def digits_figure() -> str:
        return f"{counts['train']} + {counts['val']} real images; judge right on {folder_score(data / 'val')} of the held-out ones"

    def vae_figure() -> str:
        return f"held-out PSNR {torch.load(vae / 'vae.pth', weights_only=True)['psnr']:.2f} dB after {size.vae_steps} steps"

    def reconstruction_figure() -> str:
        shutil.copyfile(reconstructions / "grid.png", pictures / "reconstruction.png")
        alone, quantized = json.loads((reconstructions / "results.json").read_text())["rows"][:2]
        return (
            f"PSNR {alone['psnr']:.2f} dB VAE alone, {quantized['psnr']:.2f} dB with 6 bits; "
            f"judge right on {folder_score(reconstructions / 'images')} of the reconstructions"
        )

    def cache_figure() -> str:
        return f"{json.loads((cache / 'cache.json').read_text())['images']} latents"

    def loss_figure() -> str:
        log = read_log(model / "log.jsonl")
        draw_loss(log, pictures / "loss.png")
        return f"loss {log['loss'][0]:.2f} at the first step, {log['loss'][-100:].mean():.3f} over the last {min(100, len(log['loss']))}"

    def sample_figure() -> str:
        shutil.copyfile(samples / "grid.png", pictures / "samples.png")
        labels = json.loads((samples / "samples.json").read_text())["labels"]
        return f"judge takes {score([samples / f'{i:06d}.png' for i in range(len(labels))], labels)} of {len(labels)} samples for their class"

    return [
        Stage("digits", None, data, digits_figure, "99 %", work=lambda: counts.update(digits.write_image_folder(data))),
        Stage(
            "train VAE",
            python(
                "main_vae.py",
                "--data_path",
                data,
                "--img_size",
                32,
                "--no_flip",
                "--vae_embed_dim",
                4,
                "--width",
                32,
                "--ch_mult",
                "1,1,2,2",
                "--num_res_blocks",
                1,
                "--no_attention",
                "--kl_weight",
                1e-5,
                "--lr",
                1e-3,
                "--batch_size",
                16,
                "--max_steps",
                size.vae_steps,
                "--save_freq",
                200,
                "--log_freq",
                50,
                "--output_dir",
                vae,
                "--resume",
                vae,
            ),
            vae,
            vae_figure,
            "28 dB or more",
        ),
        Stage(
            "reconstruct",
            python(
                "reconstruction.py",
                "--vae_path",
                vae / "vae.pth",
                "--image_dir",
                data / "val",
                "--img_size",
                32,
                "--bits",
                6,
                "--range",
                5.0,
                "--no_rfid",
                "--save_images",
                "--grid_images",
                10,
                "--output_dir",
                reconstructions,
            ),
            reconstructions,
            reconstruction_figure,
            "97 % or more",
        ),
        Stage(
            "cache",
            python(
                "main_cache.py",
                "--vae_path",
                vae / "vae.pth",
                "--data_path",
                data,
                "--img_size",
                32,
                "--cached_path",
                cache,
            ),
            cache,
            cache_figure,
            "1617",
        ),
        Stage(
            "train TokenBridge",
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
                *python(
                    "main_tokenbridge.py",
                    "--model",
                    "tokenbridge_digits",
                    "--img_size",
                    32,
                    "--class_num",
                    10,
                    "--buffer_size",
                    8,
                    "--vae_path",
                    vae / "vae.pth",
                    "--use_cached",
                    "--cached_path",
                    cache,
                    "--no_flip",
                    "--batch_size",
                    32,
                    "--epochs",
                    1000,
                    "--max_steps",
                    size.steps,
                    "--lr",
                    1e-3,
                    "--min_lr",
                    2e-5,
                    "--warmup_epochs",
                    0,
                    "--ema_rate",
                    0.995,
                    "--grad_clip",
                    1,
                    "--attn_dropout",
                    0,
                    "--proj_dropout",
                    0,
                    "--mask_ratio_min",
                    0.3,
                    "--save_last_freq",
                    10,
                    "--log_freq",
                    100,
                    "--output_dir",
                    model,
                    "--resume",
                    model,
                )[1:],
            ],
            model,
            loss_figure,
            "4.6, then 3.1 to 3.3",
        ),
        Stage(
            "sample",
            python(
                "main_tokenbridge.py",
                "--sample",
                "--resume",
                model,
                "--vae_path",
                vae / "vae.pth",
                "--classes",
                "all",
                "--num_images",
                10 * size.per_class,
                "--cfg",
                2.0,
                "--temperature",
                0.9,
                "--num_iter",
                size.num_iter,
                "--seed",
                0,
                "--output_dir",
                samples,
            ),
            samples,
            sample_figure,
            "95 % or more",
        ),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages, print the table. ValueError if a stage fails."""
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", default="demo/out", help="where data, checkpoints and stamps go")
    parser.add_argument("--pictures", default="demo", help="where samples.png, reconstruction.png and loss.png go")
    parser.add_argument(
        "--toy",
        action="store_true",
        help="a few steps of everything: shows that the stages fit together, learns nothing",
    )
    args = parser.parse_args(argv)
    out = check_writable(args.output_dir, "--output_dir").resolve()
    pictures = check_writable(args.pictures, "--pictures")
    started = time.perf_counter()
    stages = build_stages(out, pictures, Size(vae_steps=4, steps=6, num_iter=2, per_class=1) if args.toy else Size())
    rows = run_stages(stages, out)
    print(f"\n{'stage':<18}{'time':>7}   figure")
    for stage, (name, seconds, figure) in zip(stages, rows, strict=True):
        print(f"{name:<18}{seconds:>5.0f} s   {figure}" + ("" if args.toy else f"   [expected: {stage.expected}]"))
    print(
        f"{'all':<18}{sum(row[1] for row in rows):>5.0f} s   of which {time.perf_counter() - started:.0f} s in this run"
    )
    print("pictures: " + ", ".join(str(pictures / name) for name in ("samples.png", "reconstruction.png", "loss.png")))


if __name__ == "__main__":
    sys.exit(run_cli(main))
