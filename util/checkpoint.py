"""Checkpoint files: written in full or not at all, in the background; read without running code; loaded strictly.

Knows no model: what the files of this project hold is in checkpoints/published.py.
"""

import argparse
import hashlib
import os
import platform
import random
import re
import threading
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from util import dist
from util.files import file_sha256, replacing, second_name, set_aside, write_json
from util.json_reader import read_json
from util.log import first_line, get_logger
from util.options import ArgumentError, MissingFile

logger = get_logger()

LAST = "checkpoint-last.pth"
SAFE = "model.safetensors"
NUMBERED = "checkpoint-{:08d}.pth"  # by step; beside LAST with --keep_last 2 or more
NUMBER = re.compile(r"checkpoint-\d{8}\.pth")
LISTING = "checkpoints.json"  # which numbered ones the folder's run wrote: name -> `file_mark` when it was complete
WRAPPERS = ("module.", "_orig_mod.", "model.")  # before all keys of a wrapped module's state dict
MODEL = "the model (was it trained with the same model, img_size, quant_bits, buffer_size, class_num?)"
MARKED = 2**16  # bytes at the end of a file that `file_mark` reads: in a zip file, the checksums of its parts


def find_file(path: str | Path) -> Path:
    """A folder means its checkpoint-last.pth, or its model.safetensors if it has only that; a file stays as it is."""
    path = Path(path)
    if path.is_file():
        return path
    return path / SAFE if (path / SAFE).is_file() and not (path / LAST).is_file() else path / LAST


def read_file(path: str | Path, argument: str = "", mmap: bool = False, unchecked: Collection[str] = ()) -> dict:
    """The dict in a checkpoint file, on the CPU; code in the file is never run.

    Tensors are compared with the checksums that the file has, but for those under the keys `unchecked`. argument: whose
    value the path is. mmap: read tensors from the disk when they are used; the file must not be rewritten meanwhile.
    MissingFile (a FileNotFoundError) or ArgumentError (a ValueError), which name the file.
    """
    path = Path(path)
    if not path.is_file():
        advice = f"give a checkpoint file, or a folder with {LAST} or {SAFE}"
        raise MissingFile(argument, f"no checkpoint at {path}: {advice}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, argument)
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # published checkpoints keep their arguments in one
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except Exception as error:
        raise ArgumentError(argument, f"{path} {_why_unreadable(error)}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        message = f'{path} is not a checkpoint: it holds a {kind}, not a dict with weights under "model"'
        raise ArgumentError(argument, message)
    for name, tensor in _tensors(content):
        if problem := _unusable(tensor):
            raise ArgumentError(argument, f"{path}: the tensor {name} {problem}")
    if damaged := _damaged(path, content, unchecked):
        advice = "the file was changed or damaged after it was written; copy it again, or go back to an earlier one"
        raise ArgumentError(argument, f"{path}: the checksum of {damaged} is wrong: {advice}")
    return {key: _detached(value) for key, value in content.items()}


def _tensors(content: dict) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts and lists, with its name."""
    seen, left = set(), [("", content)]
    while left:
        name, value = left.pop()
        if isinstance(value, Tensor):
            yield name[1:], value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}", part) for key, part in parts]


def _unusable(tensor: Tensor) -> str:
    """What a tensor of a file has that no file of weights needs, and that later fails or takes all memory."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return f"is sparse, quantized or without values ({tensor.layout}, {tensor.device.type}); save it dense"
    kept = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > kept:
        return f"has the shape {tuple(tensor.shape)}, but only {kept} bytes are in the file; save it contiguous"
    return ""


def _damaged(path: Path, content: dict, unchecked: Collection[str]) -> str:
    """The name of a part of a zip file that does not match its CRC-32, "" if all do; torch.load compares none.

    What was read is compared, not the file: each storage's checksum must be one of those in the file's directory.
    """
    if not zipfile.is_zipfile(path):
        return ""  # torch.save's format before 1.6 has no checksums
    with zipfile.ZipFile(path) as archive:
        sums = {(part.file_size, part.CRC) for part in archive.infolist()}
        if not any(crc for _, crc in sums):
            return ""  # written with torch.serialization.set_crc32_options(False)
        for name in archive.namelist():
            if name.endswith(("/data.pkl", "/byteorder")):
                try:
                    archive.read(name)
                except zipfile.BadZipFile:
                    return name
    checked = {key: value for key, value in content.items() if key not in unchecked}
    storages = {tensor.untyped_storage().data_ptr(): (name, tensor) for name, tensor in _tensors(checked)}

    def crc(tensor: Tensor) -> tuple[int, int]:
        values = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        return len(values), zlib.crc32(values)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        names, tensors = [name for name, _ in storages.values()], [tensor for _, tensor in storages.values()]
        return next((name for name, crc32 in zip(names, pool.map(crc, tensors), strict=True) if crc32 not in sums), "")


def _why_unreadable(error: Exception) -> str:
    """Why torch.load refused a file."""
    code = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class|type) ([\w.]+)", str(error))
    if code:
        return (
            f"holds code ({code[1] or code[2]}), which is never run: weights need none; get it from its "
            "author as safetensors or a plain state dict"
        )
    reason = "" if "weights_only" in str(error) else f": {first_line(error)}"  # torch's advice is to load it unsafely
    return f"cannot be read as a checkpoint; it is truncated, or another kind of file{reason}"


def _detached(value: object) -> object:
    """A tensor, or a dict of tensors (one level), without autograd: a published EMA consists of parameters."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: item.detach() if isinstance(item, Tensor) else item for key, item in value.items()}
    return value


def _read_safetensors(path: Path, argument: str) -> dict:
    """As `read_file`, of the safetensors and JSON that tools.export writes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        message = f"{path} cannot be read as safetensors; it is truncated, or another kind of file: {error}"
        raise ArgumentError(argument, message) from error
    beside = path.with_name("config.json") if path.name == SAFE else path.with_suffix(".json")
    try:
        schema = {"config?": dict, "weights?": str, "step?": int, "sha256?": str}
        config = read_json(beside, schema) if beside.is_file() else {}
    except ValueError as error:
        message = f"{beside}, the description of {path}, is no JSON of tools.export: {error}"
        raise ArgumentError(argument, message) from error
    if config.get("sha256") not in (None, file_sha256(path)):
        reason = f"it is damaged, or was changed: then delete sha256 from {beside.name}"
        raise ArgumentError(argument, f"{path} has another SHA-256 than {beside.name} says; {reason}")
    return {"model": weights, "weights": "unnamed"} | {
        key: config[key] for key in ("config", "weights", "step") if key in config
    }


def numbered(folder: Path) -> list[Path]:
    """The checkpoints of single steps in the folder, oldest first."""
    return sorted(folder.glob("checkpoint-" + "[0-9]" * 8 + ".pth"))


def file_mark(path: Path) -> str:
    """Size and hash of the end of a file: other content, or a truncated file, has another mark. "" if unreadable."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - MARKED, 0))
            return f"{size}-{hashlib.sha256(file.read()).hexdigest()}"
    except OSError:
        return ""


def read_listing(folder: Path) -> dict[str, str]:
    """What LISTING says; nothing if there is none, or it cannot be read."""
    try:
        listed = read_json(folder / LISTING)
    except (OSError, ValueError):
        return {}
    return {name: mark for name, mark in listed.items() if isinstance(mark, str) and NUMBER.fullmatch(name)}


def load_latest(resume: str | Path, mmap: bool = False) -> tuple[Path, dict]:
    """As `read_file`; of a folder whose checkpoint-last.pth cannot be read, the newest numbered one that can.

    Files that are skipped are logged. ValueError or FileNotFoundError of the first candidate if none can be read.
    """
    first, older = find_file(resume), []
    if Path(resume).is_dir():
        listed = read_listing(Path(resume))  # others in the folder are another run's
        there = [path for path in numbered(Path(resume)) if not listed or path.name in listed]
        older = [path for path in reversed(there) if not (first.exists() and path.samefile(first))]
    failure: Exception | None = None
    for path in [first, *older]:
        try:
            content = read_file(path, "resume", mmap)
        except (ValueError, OSError) as error:
            failure = failure or error
            logger.warning("skipped: %s", error)
            continue
        if failure is not None:
            logger.warning("the checkpoint before it is taken instead: %s", path)
        return path, content
    raise failure


def plain_keys(state: dict) -> dict:
    """A state dict without what DistributedDataParallel, torch.compile and the like put before all of its keys."""
    prefix = ""
    while state and (
        wrapper := next((w for w in WRAPPERS if all(str(key).startswith(prefix + w) for key in state)), "")
    ):
        prefix += wrapper
    return {key[len(prefix) :]: value for key, value in state.items()} if prefix else state


def shape_of(value: object) -> tuple[int, ...] | str:
    """A tensor's shape, or words for what is no tensor."""
    return tuple(value.shape) if isinstance(value, Tensor) else f"no tensor but {type(value).__name__}"


def _shape_in_words(value: object) -> str:
    """`shape_of`, and dtype if it is no floating one."""
    other = isinstance(value, Tensor) and not value.is_floating_point()
    return f"{shape_of(value)}" + (f" {value.dtype}" if other else "")


def check_shapes(
    own: Mapping[str, Tensor], state: Mapping[str, object], source: str, what: str = MODEL, others: bool = False
) -> None:
    """ValueError, which names `source` and the first keys, unless `state` has the keys and shapes of `own`.

    others: it may have other keys too.
    """
    missing = [key for key in own if key not in state]
    unknown = [str(key) for key in state if key not in own and not others]
    shapes = {key: (_shape_in_words(state[key]), _shape_in_words(own[key])) for key in own if key in state}
    wrong = [f"{key}: file {file}, here {here}" for key, (file, here) in shapes.items() if file != here]
    problems = [f"lacks {len(missing)} keys ({', '.join(missing[:3])})"] if missing else []
    problems += [f"has {len(unknown)} unknown keys ({', '.join(unknown[:3])})"] if unknown else []
    problems += [f"has {len(wrong)} weights of another shape ({'; '.join(wrong[:3])})"] if wrong else []
    if problems:
        raise ValueError(f"{source} does not fit {what}: {' and '.join(problems)}")


def load_state(module: nn.Module, state: dict, source: str, what: str = MODEL, others: bool = False) -> None:
    """Strict load_state_dict whose ValueError names the file and the first keys that do not fit.

    NaN and infinite values are refused, except infinite ones where the module has them. Weights of another precision
    are converted; float32 buffers that a half-precision file holds rounded stay as the module computed them.
    """
    own = module.state_dict()
    check_shapes(own, state, source, what, others)

    def is_finite(value: Tensor, here: Tensor) -> bool:
        value = value.to(here.dtype)
        return not (value.isnan().any() or (value.isinf() & here.isfinite().to(value.device)).any())

    not_finite = [key for key, here in own.items() if not is_finite(state[key], here)]
    if not_finite:
        raise ValueError(f"{source} holds NaN or infinite weights, first: {', '.join(not_finite[:3])}")
    rounded = [
        key
        for key, buffer in module.named_buffers()
        if key in own
        and state[key].dtype in (torch.float16, torch.bfloat16)
        and torch.allclose(state[key].float(), buffer.float(), rtol=0, atol=0.02)  # others are loaded, rounded
    ]
    if rounded:
        logger.info("%s is in half precision: %s are computed, not read", source, ", ".join(rounded))
    module.load_state_dict({key: own[key] if key in rounded else state[key] for key in own}, strict=True)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and float32 values, in their order."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().reshape(-1))
    return digest.hexdigest()


def atomic_save(content: object, path: str | Path) -> None:
    """torch.save to a temporary file beside `path`, fsync, rename: a kill leaves the old file or the new one."""
    with replacing(path, sync=True) as file:
        torch.save(content, file)


class CheckpointWriter:
    """Writes checkpoints of one folder in a background thread, one at a time: `save` waits for the file before it.

    keep_last: with 1, checkpoint-last.pth alone; with more, so many checkpoint-<step>.pth too, the newest of which
    checkpoint-last.pth is another name for. Only those are counted, replaced and deleted that this run wrote and that
    are as it wrote them, which checkpoints.json records; it is the run of the folder's checkpoint-last.pth. Another
    run's file of the same step is renamed. An error in the thread is raised by the next `save` or `close`.
    """

    def __init__(self, folder: Path, keep_last: int = 1):
        self.folder, self.keep_last = folder, keep_last
        self.written: dict[str, str] = {}  # name -> mark of this run's numbered checkpoints, in the order of writing
        if keep_last > 1 and (folder / LAST).exists():
            self.written = read_listing(folder)
            for path in numbered(folder)[-1:]:  # if a kill came before it was listed
                unlisted = path.name not in self.written and zipfile.is_zipfile(path)
                if unlisted and file_mark(path) == file_mark(folder / LAST):
                    self.written[path.name] = file_mark(path)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, content: dict) -> None:
        """Begin to write `content`; its tensors are on the CPU and used by nobody else, and it has a "step"."""
        self.close()
        self._thread = threading.Thread(target=self._run, args=(content,), name="checkpoint writer")
        self._thread.start()

    def close(self) -> None:
        """Wait until the file is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what kept a file from the disk, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, content: dict) -> None:
        try:
            self._write(content)
        except Exception as error:  # raised in the main thread
            self._error = error

    def _write(self, content: dict) -> None:
        last = self.folder / LAST
        atomic_save(content, last)
        if self.keep_last > 1:
            self._keep(last, self.folder / NUMBERED.format(content["step"]))
        logger.info("wrote %s at step %d", last, content["step"])

    def _keep(self, last: Path, path: Path) -> None:
        """Let `path` be another name of `last`, and delete the oldest of this run's good ones that are too many."""
        if path.name not in self.written and path.exists():
            logger.warning("%s is another run's: it is now %s", path, set_aside(path).name)
        second_name(last, path)
        self.written.pop(path.name, None)
        self.written[path.name] = file_mark(path)
        good = [name for name, mark in self.written.items() if file_mark(self.folder / name) == mark]
        for name in good[: -self.keep_last]:
            (self.folder / name).unlink()
        self.written = {name: mark for name, mark in self.written.items() if (self.folder / name).exists()}
        write_json(self.folder / LISTING, self.written)


def versions() -> dict[str, str]:
    """The versions that the last bits of a run's numbers depend on."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state(device: torch.device) -> dict:
    """The states of this process's global generators: torch's (CPU and device), numpy's, Python's; weights_only reads
    it.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "device": dist.device_random_state(device),
        "numpy": [name, keys.tolist(), *rest],
        "python": list(random.getstate()),
    }


def set_random_state(state: dict, device: torch.device) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    dist.set_device_random_state(device, state["device"])
    np.random.set_state(tuple(state["numpy"]))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
