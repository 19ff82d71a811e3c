"""The demo: the whole pipeline on real handwritten digits, on a CPU. `make demo` runs it; --toy: at toy size.

Each stage is a command that a user would type, printed before it runs. Rerunning skips finished stages, as long as
their commands and the stages before them stay the same, and resumes the interrupted one. It ends with a table of stage,
time and result.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from demo import digits
from tools.plot import read_columns, smooth
from util.cli import check_writable, make_parser, run_cli
from util.files import folder_lock, record_own, refuse_others, replacing, write_json
from util.presets import load_preset
from util.start import INTERRUPTED

ROOT = Path(__file__).resolve().parent.parent
DEMO = dict(vae_steps=800, steps=2200, num_iter=12, samples=100)
TOY = dict(vae_steps=4, steps=6, num_iter=2, samples=10)  # shows only that the stages fit together

STAMP = ".made-by-demo.json"  # in the folders that the demo made, and may delete
PICTURES = ("reconstruction.png", "loss.png", "samples.png")

ON_CPU = " --num_workers 0 --device cpu"
TRAINING = "main_tokenbridge.py --preset digits --use_cached" + ON_CPU
# Name -> command, with {out} and the sizes above filled in.
COMMANDS = {
    "digits": "",  # done in this process
    "train VAE": "main_vae.py --data_path {out}/digits --img_size 32 --no_flip --vae_embed_dim 4 --width 32"
    " --ch_mult 1,1,2,2 --num_res_blocks 1 --no_attention --kl_weight 1e-5 --lr 1e-3 --batch_size 16"
    " --max_steps {vae_steps} --save_freq 200 --log_freq 50 --output_dir {out}/vae --resume {out}/vae" + ON_CPU,
    "reconstruct": "reconstruction.py --vae_path {out}/vae/vae.pth --image_dir {out}/digits/val --img_size 32 --bits 6"
    " --range 5.0 --no_rfid --save_images --grid_images 10 --output_dir {out}/reconstruction" + ON_CPU,
    "cache": "main_cache.py --vae_path {out}/vae/vae.pth --data_path {out}/digits --img_size 32"
    " --cached_path {out}/cache" + ON_CPU,
    "train TokenBridge": "-m torch.distributed.run --standalone --nproc_per_node=2 " + TRAINING + " --max_steps {steps}"
    " --vae_path {out}/vae/vae.pth --cached_path {out}/cache --output_dir {out}/model --resume {out}/model",
    "sample": "main_tokenbridge.py --sample --resume {out}/model --vae_path {out}/vae/vae.pth --classes all --seed 0"
    " --num_images {samples} --cfg 2.0 --temperature 0.9 --num_iter {num_iter} --output_dir {out}/samples" + ON_CPU,
}


@dataclass
class Stage:
    """A step of the pipeline: a command, or `work` in this process."""

    name: str
    command: list[str] | None
    folder: Path  # what it writes; deleted if another command or other inputs made it
    result: Callable[
        [], str
    ]  # its line in the table, read from the files it wrote; called once, when the stage is done
    expected: str  # that line on a healthy run
    work: Callable[[], object] = lambda: None


def read_stage(number: int, stage: Stage, out: Path, before: float) -> tuple[Path, dict, dict]:
    """A stage's file, the key that it must have for the stage to go on where it is, and what it has."""
    record = out / "stages" / f"{number}-{stage.name.replace(' ', '-')}.json"
    command = [part.replace(str(out), "OUT").replace(sys.executable, "python") for part in stage.command or []]
    try:
        found = json.loads(record.read_text()) if record.exists() else {}
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error}): delete it, and the stage runs again") from error
    found = found if isinstance(found, dict) else {}
    numbers = [found.get(name, 0.0) for name in ("seconds", "finished")]
    if "result" in found and not ({"seconds", "finished"} <= found.keys() and all(type(x) is float for x in numbers)):
        raise ValueError(f"{record} is damaged: delete it, and the stage runs again")
    return record, {"command": command, "after": before}, found


def agrees(key: dict, found: dict) -> bool:
    """Whether a stage was begun with this command, after the same stages."""
    return all(found.get(name) == value for name, value in key.items())


def check_folders(stages: Sequence[Stage], out: Path) -> None:
    """ValueError, before any work, if a stage would write to a folder that it did not make (it has no STAMP)."""
    before, unchanged = 0.0, True
    for number, stage in enumerate(stages, 1):
        _, key, found = read_stage(number, stage, out, before)
        unchanged = unchanged and agrees(key, found) and "result" in found
        before = found.get("finished", 0.0)
        made_here = (stage.folder / STAMP).is_file() and not stage.folder.is_symlink()
        if not unchanged and os.path.lexists(stage.folder) and not made_here:
            what = f"was not made by this demo (it has no {STAMP}), which would replace it"
            raise ValueError(f"{stage.folder} {what}: choose another --output_dir, or move that folder away")


def run_stages(stages: Sequence[Stage], out: Path) -> list[dict]:
    """Run the stages that are not finished; "seconds", "result" and "skipped" of each. ValueError if one fails.

    A file per stage holds its command and the time when the stage before it finished: if either changed, the stage
    starts from nothing. Only folders with a STAMP, which this writes, are deleted or written to.
    """
    check_folders(stages, out)
    rows, before = [], 0.0
    for number, stage in enumerate(stages, 1):
        record, key, found = read_stage(number, stage, out, before)
        same = agrees(key, found)
        skipped = same and "result" in found  # (records of earlier versions have none)
        title = f"[{number}/{len(stages)}] {stage.name}"
        if skipped:
            print(f"{title}: finished before ({found['seconds']:.0f} s): {found['result']}", flush=True)
        else:
            if not same and stage.folder.is_dir():
                shutil.rmtree(stage.folder)
            write_json(stage.folder / STAMP, {"made by": "python -m demo.run", "stage": stage.name})
            write_json(record, key)
            started = time.perf_counter()
            run_stage(stage, title)
            found = key | {"seconds": time.perf_counter() - started, "result": stage.result(), "finished": time.time()}
            write_json(record, found)
            print(f"    {found['seconds']:.0f} s: {found['result']}", flush=True)
        rows.append(found | {"skipped": skipped})
        before = found["finished"]
    return rows


def run_stage(stage: Stage, title: str) -> None:
    """Print and run one stage. ValueError if its command fails."""
    command = stage.command or []
    typed = ["torchrun" if part == "torch.distributed.run" else part for part in command]
    print(f"\n{title}\n    " + shlex.join(part for part in typed if part not in (sys.executable, "-m")), flush=True)
    stage.work()
    if command:
        environment = {"OMP_NUM_THREADS": "1"} | os.environ if "torch.distributed.run" in command else None
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the terminal sends it to both
            with contextlib.suppress(subprocess.TimeoutExpired):
                if process.wait(20) == INTERRUPTED:  # and has said so
                    sys.exit(INTERRUPTED)
            process.terminate()
            raise
        if code:
            raise ValueError(
                f"{title} failed with exit code {code}, see its message above; rerun to continue from here"
            )


def draw_loss(log: dict, path: Path) -> None:
    """loss.png: cross-entropy per dimension over steps, raw and smoothed, and the chance level of 64 levels."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, width = figure.subplots(), max(1, len(log["loss"]) // 50)
    axes.plot(log["step"], log["loss"], color="lightsteelblue", linewidth=0.7, label="each step")
    axes.plot(log["step"], smooth(log["loss"], width), color="navy", label=f"mean of {width}")
    axes.axhline(math.log(64), color="gray", linestyle=":", label="chance level, ln 64")
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per dimension (nats)")
    axes.set(title="TokenBridge on handwritten digits")
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


class Results:
    """The stages' lines in the table, from the files that they wrote; pictures are copied to the folder `pictures`."""

    def __init__(self, out: Path, pictures: Path):
        self.out, self.pictures = out, pictures

    def accuracy(self, files: Sequence[Path], labels: Sequence[int]) -> str:
        """Class accuracy of image files, as text."""
        return f"{digits.accuracy(digits.fit_classifier(self.out / 'digits' / 'train'), files, labels):.1%}"

    def folder_accuracy(self, root: Path) -> str:
        """Class accuracy of root/<digit>/*.png, as text."""
        files = sorted(root.glob("*/*.png"))
        return self.accuracy(files, [int(file.parent.name) for file in files])

    def digits(self) -> str:
        """Numbers of real images, and how well the classifier knows them."""
        train, val = (sum(1 for _ in (self.out / "digits" / part).glob("*/*.png")) for part in ("train", "val"))
        held_out = self.folder_accuracy(self.out / "digits" / "val")
        return f"{train} + {val} real images; class accuracy of the held-out ones (SVM): {held_out}"

    def train_vae(self) -> str:
        """Held-out PSNR."""
        return f"held-out PSNR {torch.load(self.out / 'vae' / 'vae.pth', weights_only=True)['psnr']:.2f} dB"

    def reconstruct(self) -> str:
        """PSNR without and with the quantizer, and class accuracy."""
        folder = self.out / "reconstruction"
        shutil.copyfile(folder / "grid.png", self.pictures / "reconstruction.png")
        vae, quantized = (row["psnr"] for row in json.loads((folder / "results.json").read_text())["rows"][:2])
        accuracy = self.folder_accuracy(folder / "images")
        return (
            f"PSNR {vae:.2f} dB (VAE), {quantized:.2f} dB (6 bits); class accuracy of reconstructions (SVM): {accuracy}"
        )

    def cache(self) -> str:
        """Number of cached latents."""
        return f"{json.loads((self.out / 'cache' / 'cache.json').read_text())['images']} latents"

    def train_tokenbridge(self) -> str:
        """Loss at the beginning and at the end."""
        log = read_columns(self.out / "model")
        draw_loss(log, self.pictures / "loss.png")
        last = log["loss"][-100:]
        return f"loss {log['loss'][0]:.2f} at the first step, {last.mean():.3f} over the last {len(last)}"

    def sample(self) -> str:
        """Class accuracy of the generated images."""
        folder = self.out / "samples"
        shutil.copyfile(folder / "grid.png", self.pictures / "samples.png")
        labels = json.loads((folder / "samples.json").read_text())["labels"]
        accuracy = self.accuracy([folder / f"{i:06d}.png" for i in range(len(labels))], labels)
        return f"class accuracy of {len(labels)} generated digits (SVM): {accuracy}"


def build_stages(out: Path, pictures: Path, sizes: dict[str, int]) -> list[Stage]:
    """The pipeline; sizes: DEMO or TOY."""
    results, figures = Results(out, pictures), load_preset("digits").expected
    loss = f"{figures['loss of the first step']}, then {figures['mean loss of the last 100 steps']}"
    accuracy = figures["class accuracy of 100 generated digits (SVM)"]
    table = (  # name, folder, result, expected
        ("digits", "digits", results.digits, "99 %"),
        ("train VAE", "vae", results.train_vae, "28 dB or more"),
        ("reconstruct", "reconstruction", results.reconstruct, "97 % or more"),
        ("cache", "cache", results.cache, "1617"),
        ("train TokenBridge", "model", results.train_tokenbridge, loss),
        ("sample", "samples", results.sample, accuracy),
    )
    stages = []
    for name, folder, result, expected in table:
        words = COMMANDS[name].split()
        command = [sys.executable, *(word.format(out=out, **sizes) for word in words)] if words else None
        stages.append(Stage(name, command, out / folder, result, expected))
    stages[0].work = lambda: digits.write_image_folder(out / "digits")
    return stages


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages, print the table. ValueError if a stage fails."""
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", default="demo/out", help="where data, checkpoints and records of stages go")
    parser.add_argument("--pictures", default="demo", help="where samples.png, reconstruction.png and loss.png go")
    parser.add_argument(
        "--toy", action="store_true", help="a few steps of everything: shows that the stages fit, learns nothing"
    )
    args = parser.parse_args(argv)
    out = check_writable(args.output_dir, "--output_dir").resolve()
    pictures = check_writable(args.pictures, "--pictures")
    stages, own = build_stages(out, pictures, TOY if args.toy else DEMO), out / ".pictures.json"
    with folder_lock(out, "--output_dir"):
        check_folders(stages, out)
        refuse_others([pictures / name for name in PICTURES], own, "--pictures")
        try:
            rows = run_stages(stages, out)
        finally:
            record_own([pictures / name for name in PICTURES], own)
    print(f"\n{'stage':<18}{'time':>7}   result")
    for stage, row in zip(stages, rows, strict=True):
        expected = "" if args.toy else f"   [expected: {stage.expected}]"
        print(f"{stage.name:<18}{row['seconds']:>5.0f} s   {row['result']}{expected}")
    new = [row["seconds"] for row in rows if not row["skipped"]]
    total = f"{'total':<18}{sum(row['seconds'] for row in rows):>5.0f} s   {len(rows)} stages"
    print(total + (f", {len(new)} of them in this run ({sum(new):.0f} s)" if len(new) < len(rows) else ""))
    print("pictures: " + ", ".join(str(pictures / name) for name in ("samples.png", "reconstruction.png", "loss.png")))


if __name__ == "__main__":
    sys.exit(run_cli(main))
