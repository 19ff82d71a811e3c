"""Filling a cache folder: what it may hold before, the encoding, its record afterwards."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.cache_files import Counts, NpzFiles, ShardFiles
from dataset.encode import Encode, encode_all
from dataset.encoder_inputs import Source
from dataset.images import CONTROL, printable
from dataset.npz import tree_files
from dataset.record import BAD_LIST, LARGEST, RECORD, CacheOptions, npz_list, read_record
from dataset.shards import NAME, TRAVERSAL, RecordSpec, is_ours
from util import dist
from util.cli import check_writable
from util.files import remove_leftovers, replacing, write_json
from util.json_reader import read_json
from util.locks import folder_lock
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()
LONGEST_FILE_NAME = 255  # bytes, on the file systems in use
# What two runs into one cache must agree on: the key in cache.json, and its name in messages.
AGREE = {key: key for key in ("format", "img_size", "precision", "mode", "dtype", "crops", "seed", "shard_size")} | {
    "latent_fingerprint": "vae_path (encoder weights)",
    "flips": "no_flip",
    "scale_factor": "scale factor of vae_path",
    "shift": "shift of vae_path",
    "quantizer": "quantizer, quant_bits, quant_min, quant_max",
    "class_list": "class folders of data_path",
    "image_list": "images of data_path",
}
LEFT_BEFORE = re.compile(r"\.shard-\d{5,}\.safetensors\.(tmp|partial)")  # by kills of earlier versions


def fill(
    options: CacheOptions, record: dict, source: Source, encode: Encode, spec: RecordSpec, **loading: int | bool
) -> None:
    """Complete the cache: check, encode what is missing, write the record. Raises on all processes together.

    loading: num_workers and pin_memory of `encode_all`.
    """
    cache, problem = options.cache, None
    try:
        check_writable(cache, "--cached_path")
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)
    with dist.on_main(folder_lock(cache, "--cached_path")):
        check(options, record, source)
        if options.format == "npz":
            files = NpzFiles(cache, source, spec, options.batch_size)
        else:
            files = ShardFiles(cache, source, spec, options.batch_size, options.shard_size)
        try:
            prepare(options, record, files)
            counts = encode_all(files, encode, **loading)
        finally:
            files.pool.shutdown()
        finish(options, record, files, counts)


def check(options: CacheOptions, record: dict, source: Source) -> None:
    """ValueError, on all processes, if the folder holds what does not fit, or what is not ours to replace."""
    problem = None
    try:
        check_names(source, options.format)
        own_shards(options.cache)
        if options.format == "npz":
            check_folders(options.cache, source.classes)
            if options.overwrite and not (options.cache / RECORD).exists():
                refuse_foreign_npz(options.cache, source.paths)
        if not options.overwrite:
            check_agreement(options, record)
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)


def check_names(source: Source, form: str) -> None:
    """ValueError, before any work, naming the first image whose name the cache could not keep."""
    for path, file in zip(source.paths, source.files, strict=True):
        reason = ""
        if CONTROL.search(path):
            reason = "its name has a line break or another control character"
        elif TRAVERSAL.search(os.fsencode(path)):
            reason = "its path reads as an absolute one, or as one with .., on another system"
        elif form == "npz" and len(os.fsencode(f"{os.path.basename(path)}.npz")) > LONGEST_FILE_NAME:
            reason = "its name is too long with .npz after it, as format npz needs; format shards takes it"
        if reason:
            raise ArgumentError("data_path", f"{printable(file)} cannot be cached: {reason}; rename it")


def check_agreement(options: CacheOptions, record: dict) -> None:
    """ValueError naming the setting if the cache was begun with another one, or holds files without a record."""
    cache, found = options.cache, read_record(options.cached_path)
    if found is None:
        if options.format == "shards":
            check_no_record(cache)
        return
    published = dict(format="npz", mode="moments", dtype="float32", flips=True, crops=1, shift=record.get("shift"))
    found = published | found
    keys = [key for key in AGREE if key in record and (key in found or key not in ("class_list", "scale_factor"))]
    if options.mode != "indices":
        keys = [key for key in keys if key not in ("scale_factor", "shift")]  # moments are kept unscaled
    differing = [key for key in keys if found.get(key) != record[key]]
    if "class_list" in differing:
        differing = [key for key in differing if key != "image_list"]
    if differing:
        what = [f"{AGREE[key]} was {str(found.get(key))[:16]}, now {str(record[key])[:16]}" for key in differing]
        raise ValueError(
            f"{cache / RECORD} (cached_path) says that its latents were made with other settings: {'; '.join(what)}. "
            "Choose another folder, or replace them (overwrite)"
        )
    if options.format == "shards" and found.get("batch_size") != options.batch_size:
        message = "batch_size was %s, is %s: new latents may differ from those of one run in the last bits"
        logger.warning(message, found.get("batch_size"), options.batch_size)


def check_no_record(cache: Path) -> None:
    """ValueError if a folder without cache.json holds files that shards would be mixed with."""
    if any(cache.glob("*/*.npz")):
        raise ValueError(
            f"{cache} (cached_path) holds .npz latents without a {RECORD}, as the published scripts write them. "
            f"Train from it as it is, continue it with --format npz, or turn it into shards with --convert {cache} NEW"
        )
    if any(NAME.fullmatch(path.name) for path in cache.glob("shard-*")):
        unknown = f"holds shards but no {RECORD}, which says what made them"
        raise ValueError(f"{cache} (cached_path) {unknown}; choose another folder, or replace them (overwrite)")


def check_folders(cache: Path, classes: Sequence[str]) -> None:
    """ValueError if the cache has folders that are no class of the data, which training would count as classes."""
    folders = cache.iterdir() if cache.is_dir() else ()
    foreign = sorted(
        entry.name for entry in folders if entry.is_dir() and entry.name[0] != "." and entry.name not in classes
    )
    if foreign:
        what = f"holds {len(foreign)} folders that are no class of the images (data_path), first: {foreign[0]}"
        advice = "training would count them as classes. Choose another folder, or remove them"
        raise ValueError(f"{cache} (cached_path) {what}; {advice}")


def own_shards(cache: Path) -> list[Path]:
    """The files of a cache folder that are shards of this format: the mark in their header says so, or cache.json.

    ValueError for a file of another kind where a shard, or cache.json, would replace it.
    """
    path = cache / RECORD
    try:
        record = read_json(path, object, LARGEST) if path.exists() else {}
    except (OSError, ValueError):
        record = {}  # ours, damaged: nothing else is said about such a file
    if not isinstance(record, dict) or record and not record.keys() & {"complete", "latent_fingerprint", "img_size"}:
        raise ValueError(f"{path} (cached_path) is not a record of main_cache.py; choose another folder, or move it")
    shards = record.get("shards")
    listed = {entry.get("name") for entry in (shards if isinstance(shards, list) else ()) if isinstance(entry, dict)}
    found = sorted(path for path in cache.glob("shard-*") if NAME.fullmatch(path.name))
    for shard in found:
        if shard.name not in listed and not is_ours(shard):
            what = "is no shard of main_cache.py, which would replace it"
            raise ValueError(f"{shard} (cached_path) {what}; choose another folder, or move the file")
    return found


def refuse_foreign_npz(cache: Path, paths: Iterable[str]) -> None:
    """ValueError for latents that overwrite would delete in a folder whose record does not say who wrote them."""
    foreign = [f"{path}.npz" for path in paths if os.path.lexists(cache / f"{path}.npz")]
    if foreign:
        what = f"holds {len(foreign)} latents ({printable(foreign[0])}, ...) but no {RECORD} that says who made them"
        raise ValueError(f"{cache} (cached_path) {what}: overwrite does not delete them, do so yourself")


def prepare(options: CacheOptions, record: dict, files: NpzFiles | ShardFiles) -> None:
    """The cache's folders and its record; with overwrite the old files are deleted before the old record is replaced.

    npz: every class gets a folder, also one without readable images, so that training numbers classes like the data.
    """
    cache, source, npz = files.cache, files.source, isinstance(files, NpzFiles)
    if options.overwrite and npz:
        delete(cache / f"{path}.npz" for path in source.paths[dist.rank() :: dist.world_size()])
    if dist.is_main():
        remove_leftovers(cache)
        delete(path for path in cache.glob(".shard-*") if LEFT_BEFORE.fullmatch(path.name))
        delete(own_shards(cache) if options.overwrite else ())
    dist.barrier()
    if dist.is_main():
        for name in source.classes if npz else ():
            (cache / name).mkdir(exist_ok=True)
        if npz and not (cache / RECORD).exists() and any(cache.glob("*/*.npz")):
            kept = "complete files of the right shape are kept, whatever VAE made them; delete them to encode all"
            logger.warning("%s holds latents but no %s: %s", cache, RECORD, kept)
        write_json(cache / RECORD, record)
    dist.barrier()


def delete(paths: Iterable[Path]) -> None:
    """Remove files, which may be absent."""
    for path in paths:
        path.unlink(missing_ok=True)


def finish(options: CacheOptions, record: dict, files: NpzFiles | ShardFiles, counts: Counts) -> None:
    """Write bad_images.txt and the final record. ValueError if none could be read, or one, with on_bad_image error."""
    cache, source, there = files.cache, files.source, counts.encoded + counts.kept
    bad = [source.paths[number] for number in sorted(counts.corrupt)]
    if dist.is_main() and bad:
        with replacing(cache / BAD_LIST) as file:
            file.write("".join(f"{path}\n" for path in bad).encode(errors="surrogateescape"))
    elif dist.is_main():
        delete([cache / BAD_LIST])
    if there == 0:
        raise ValueError(f"{source.root} (data_path): not one of its {len(source)} images can be read")
    if bad and options.on_bad_image == "error":
        first = next(problem for n in sorted(counts.corrupt) if (problem := source[n][2]) is not None)
        listed = f"{len(bad)} of {len(source)} images are corrupt and listed in {cache / BAD_LIST}"
        raise ValueError(f"{listed}; all others are cached. First: {first}, or skip such images (on_bad_image)")
    if not dist.is_main():
        return
    done = record | {"images": there, "corrupt": len(bad), "complete": True}
    if isinstance(files, ShardFiles):
        done["shards"] = files.listing()
    else:
        done["image_list"] = npz_list(path for number, path in enumerate(source.paths) if number not in counts.corrupt)
        if (others := len(tree_files(cache)) - there) > 0:
            message = "%s holds %d latents of other images than those of %s; training refuses it until they are removed"
            logger.warning(message, cache, others, source.root)
    write_json(cache / RECORD, done)
    if counts.unstamped:
        message = "%d latents are of an earlier version, which did not record their images' size and time: it is not "
        logger.warning(message + "known whether these changed since; overwrite encodes all of them", counts.unstamped)
    changed = f"; {counts.changed} images had changed since they were cached" if counts.changed else ""
    message = "%s is complete: %d images encoded, %d were there, %d corrupt%s"
    logger.info(message, cache, counts.encoded, counts.kept, len(bad), changed)
