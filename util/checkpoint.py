"""Checkpoint files: read without running code, loaded strictly, written in full or not at all.

Knows no model: what the files of this project hold is in checkpoints/published.py.
"""

import argparse
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from util.files import file_sha256, replacing
from util.json_reader import read_json
from util.log import first_line, get_logger
from util.options import ArgumentError, MissingFile

logger = get_logger()

LAST = "checkpoint-last.pth"
SAFE = "model.safetensors"
WRAPPERS = ("module.", "_orig_mod.", "model.")  # before all keys of a wrapped module's state dict
MODEL = "the model (was it trained with the same model, img_size, quant_bits, buffer_size, class_num?)"


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
        # published checkpoints keep their arguments in a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
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
