"""Damaged and hostile files of every kind that is read: an error in words or a success, within 10 s and 1 GiB.

Each case copies a good file, spoils it (a bit, its end, or one value of what it holds) and runs the commands that read
it, in this process. The case follows from the kind of file and its number alone: `fuzz(place, kind, [17])` repeats one.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import main_cache
import main_tokenbridge
import main_vae
from evaluation.reference import load_reference_stats
from tests.helpers import argv_of, save_toy_vae, snapshot, write_image_folder
from tests.stand_ins import SMALL
from tools import export
from util.log import get_logger

SECONDS, MEMORY = 10, 2**30
DEEP = json.loads("[" * 300 + "]" * 300)
NUMBERS = (-1, 0, 3, 10**12, 2**70, 10**400, 1e300, -0.5)
VALUES = (*NUMBERS, None, True, "x", "", "../../x", [], {}, [1], [None], {"a": 1}, DEEP)
TENSORS = (torch.zeros(0), torch.zeros(3), torch.full((2, 2), float("nan")), torch.zeros(1).expand(10**6, 10**6))


class Hang(BaseException):
    """A command took more than SECONDS. No Exception, so that nothing catches it."""


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Truncated, or with another bit, or with other bytes somewhere."""
    at, kind = rng.randrange(len(content)), rng.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.choice((1, 8, 200))) + content[at + 1 :]
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def spoil_value(content: object, rng: random.Random, values: tuple = VALUES) -> object:
    """A copy of nested dicts and lists in which one value is another, absent, or under another key."""
    content = copy.deepcopy(content)
    parts = [content]
    while True:  # walk down at random; stop at random, or where nothing is below
        inner = parts[-1]
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        if not keys:
            return rng.choice(values)
        key = rng.choice(keys)
        if not isinstance(inner[key], (dict, list)) or not inner[key] or rng.random() < 0.25:
            break
        parts.append(inner[key])
    kind = rng.randrange(6)
    if kind == 0:
        del inner[key]
    elif kind == 1 and isinstance(inner, dict):
        inner["other"] = inner.pop(key)
    elif kind == 2 and isinstance(inner[key], torch.Tensor):
        tensor = inner[key]
        inner[key] = rng.choice((tensor.long(), tensor.double() * 1e300, tensor.flatten(), tensor[None]))
    else:
        inner[key] = rng.choice(values)
    return content


def spoil_torch(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        path.write_bytes(spoil_bytes(path.read_bytes(), rng))
    else:
        torch.save(spoil_value(torch.load(path, weights_only=True), rng, VALUES + TENSORS), path)


def spoil_json(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    if rng.random() < 0.2:
        path.write_bytes(rng.choice((spoil_bytes(content, rng), b"[" * 200_000, b"", b"null", b"5", b"\xff" + content)))
    else:
        path.write_text(json.dumps(spoil_value(json.loads(content), rng)))


def spoil_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines()
    at = rng.randrange(len(lines))
    line = json.dumps(spoil_value(json.loads(lines[at]), rng)).encode()
    lines[at] = rng.choice((line, line, line, spoil_bytes(lines[at], rng), b"[" * 200_000, b"\xff", b"5"))
    path.write_bytes(b"\n".join(lines))


def spoil_arrays(path: Path, rng: random.Random) -> None:
    if rng.random() < 0.4:
        path.write_bytes(spoil_bytes(path.read_bytes(), rng))
        return
    with np.load(path) as arrays:
        arrays = dict(arrays)
    name = rng.choice(list(arrays))
    flat = arrays[name].reshape(-1)
    other = (flat, flat[:0], np.array({}, dtype=object), np.array("x"), np.array([1j]), np.full(3, np.nan), None)
    arrays[name] = rng.choice(other)
    buffer = io.BytesIO()
    np.savez(buffer, **{key: value for key, value in arrays.items() if value is not None})
    path.write_bytes(buffer.getvalue())


def spoil_raw(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")  # of safetensors: most of the file's meaning
    spoiled = spoil_bytes(content[:head], rng) + content[head:] if rng.random() < 0.6 else spoil_bytes(content, rng)
    path.write_bytes(spoiled)


MODEL = dict(model="tokenbridge_digits", img_size=32, class_num=2, buffer_size=4, vae_path="vae.pth", data_path="data")
TRAIN = MODEL | dict(output_dir="out", batch_size=4, warmup_epochs=0, num_workers=0, device="cpu")
SAMPLE = dict(sample=True, vae_path="vae.pth", classes=0, num_images=1, num_iter=1, device="cpu", output_dir="out")
VAE = dict(data_path="data", img_size=32, vae_embed_dim=4, width=32, ch_mult="1,1", num_res_blocks=1, batch_size=4)
VAE |= dict(output_dir="out", num_workers=0, device="cpu")
Command = tuple[str, list[str]]


def sample(**flags: object) -> Command:
    return "main_tokenbridge", argv_of(**(SAMPLE | flags))


def train(**flags: object) -> Command:
    return "main_tokenbridge", argv_of(**(TRAIN | dict(max_steps=2) | flags))


def cache(flag: str) -> Command:
    return "main_cache", ["--cached_path", "case", f"--{flag}"]


FROM_CACHE = train(use_cached=True, cached_path="case", max_steps=1)
EXPORT = "tools.export", ["case", "--output_dir", "out"]
# kind -> good folder, file in it that is spoiled (one of several), how, and the commands that read the copy, "case"
KINDS: dict[str, tuple[str, tuple[str, ...], Callable, list[Command]]] = {
    "checkpoint": (
        *("run", ("checkpoint-last.pth",), spoil_torch),
        [("tools.inspect", ["case"]), sample(resume="case"), train(resume="case")],
    ),
    "vae": (
        *("vae", ("vae.pth", "vae.pth", "vae.latents.json"), spoil_torch),
        [("tools.inspect", ["case/vae.pth"]), sample(resume="run", vae_path="case/vae.pth")],
    ),
    "cache.json": ("cache", ("cache.json",), spoil_json, [cache("info"), cache("verify"), FROM_CACHE]),
    "shard": ("cache", ("shard-00000.safetensors",), spoil_raw, [cache("verify"), FROM_CACHE]),
    "export": (
        *("export", ("config.json", "vae.json", "model.safetensors", "vae.safetensors"), spoil_raw),
        [("tools.inspect", ["case"]), sample(resume="case", vae_path=None), EXPORT],
    ),
    "statistics": ("stats", ("stats.npz",), spoil_arrays, [("statistics", [])]),
    "vae_state": (
        "vae_run",
        ("vae_state.pth",),
        spoil_torch,
        [("main_vae", argv_of(**VAE, resume="case", max_steps=2))],
    ),
    "log": ("run", ("log.jsonl",), spoil_lines, [("tools.plot", ["case", "--output", "out/x.png"])]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a good file of each kind; the current folder during the tests."""
    root, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    write_image_folder(root / "data", per_class=2, size=(40, 36))
    save_toy_vae(root / "vae.pth")
    os.chdir(root)
    level = get_logger().level
    get_logger().setLevel("ERROR")
    main_tokenbridge.main(train(output_dir="run", max_steps=1)[1])
    main_vae.main(argv_of(**(VAE | dict(output_dir="vae_run", max_steps=1))))
    cached = dict(vae_path="vae.pth", data_path="data", img_size=32, cached_path="cache", num_workers=0, device="cpu")
    main_cache.main(argv_of(**cached))
    export.main(["run", "--output_dir", "export"])
    for folder in ("vae", "stats"):
        (root / folder).mkdir()
    shutil.copy("vae.pth", "vae/vae.pth")
    (root / "vae" / "vae.latents.json").write_text('{"channels": 4, "stride": 8, "scale_factor": 0.2, "shift": 0.0}')
    mean, covariance, about = np.zeros(SMALL), np.eye(SMALL), dict(img_size=32, crop="adm", num_images=5)
    arrays = dict(mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance, features=np.zeros((5, SMALL), np.float32))
    np.savez(root / "stats" / "stats.npz", **arrays, **about)
    yield root
    os.chdir(before)
    get_logger().setLevel(level)


def load_statistics(_: list[str]) -> None:
    """As --evaluate does, of few dimensions."""
    load_reference_stats("case/stats.npz", "--fid_stats", SMALL, SMALL)


def run(command: Command) -> str:
    """What went wrong, "" if the command ended well or with an error in words."""
    name, argv = command
    main = importlib.import_module(name).main if name != "statistics" else load_statistics

    def hang(*_: object) -> None:
        raise Hang

    previous = [signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process: the machine may be busy with others
    signal.alarm(10 * SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main(argv)
    except (ValueError, OSError) as error:
        return "" if str(error).strip() and "\n" not in str(error).strip() else f"not one line: {error!r:.200}"
    except Hang:
        return f"took more than {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous[0])
        signal.signal(signal.SIGALRM, previous[1])
        shutil.rmtree("out", ignore_errors=True)
    return ""


def fuzz(place: Path, kind: str, numbers: range) -> list[str]:
    """What went wrong in these cases of a kind."""
    folder, names, spoil, commands = KINDS[kind]
    problems = []
    for number in numbers:
        rng = random.Random(f"{kind} {number}")
        shutil.rmtree("case", ignore_errors=True)
        shutil.copytree(folder, "case")
        path = place / "case" / rng.choice(names)
        (spoil_json if path.suffix == ".json" else spoil)(path, rng)
        before, peak = snapshot(place), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for command in commands:
            problem = run(command)
            if snapshot(place) != before:
                problem = problem or "files were changed"
            if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 > MEMORY:
                problem = problem or "took more than 1 GiB"
            problems += [f"{kind} {number} {path.name}, {command[0]}: {problem}"] if problem else []
    shutil.rmtree("case")
    return problems


@pytest.mark.parametrize("kind", KINDS)
def test_some_damaged_files(place: Path, kind: str) -> None:
    assert fuzz(place, kind, range(3)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(place: Path, kind: str) -> None:
    problems = fuzz(place, kind, range(300))
    assert problems == [], "\n".join(problems)


def test_every_flipped_bit_of_a_shards_header_is_found(place: Path) -> None:
    content = (place / "cache" / "shard-00000.safetensors").read_bytes()
    head = 8 + int.from_bytes(content[:8], "little")
    shutil.copytree("cache", "case")
    for position in range(0, head, 7):
        (place / "case" / "shard-00000.safetensors").write_bytes(
            content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :]
        )
        with pytest.raises(ValueError, match=r"shard-00000"):
            main_cache.main(["--verify", "--cached_path", "case"])
    shutil.rmtree("case")
