"""What main_cache.py does with a cache folder: complete it, print what it holds, verify it."""

import re
from collections.abc import Iterable
from pathlib import Path

from dataset.encode import Counts, Encode, NpzFiles, ShardFiles, Source, encode_all, read_moments
from dataset.record import RECORD, CacheOptions, check_agreement, check_folders, own_shards, read_record
from dataset.shards import RecordSpec, Shard
from util import dist
from util.cli import check_writable
from util.files import folder_lock, remove_leftovers, replacing, write_json
from util.log import get_logger

logger = get_logger()
BAD_LIST = "bad_images.txt"
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
        own_shards(options.cache)
        if options.format == "npz":
            check_folders(options.cache, source.classes)
        if not options.overwrite:
            check_agreement(options, record)
    except (ValueError, OSError) as error:
        problem = error
    dist.agree(problem)


def prepare(options: CacheOptions, record: dict, files: NpzFiles | ShardFiles) -> None:
    """The cache's folders and its record; with --overwrite the old files are deleted before the old record is replaced.

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
            kept = "complete files of the right shape are kept, whatever VAE made them; --overwrite replaces them"
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
        raise ValueError(f"{source.root} (--data_path): not one of its {len(source)} images can be read")
    if bad and options.on_bad_image == "error":
        first = next(problem for n in sorted(counts.corrupt) if (problem := source[n][2]) is not None)
        listed = f"{len(bad)} of {len(source)} images are corrupt and listed in {cache / BAD_LIST}"
        raise ValueError(f"{listed}; all others are cached. First: {first}, or pass --on_bad_image skip")
    if not dist.is_main():
        return
    done = record | {"images": there, "corrupt": len(bad), "complete": True}
    if isinstance(files, ShardFiles):
        done["shards"] = files.listing()
    elif (others := sum(1 for _ in cache.rglob("*.npz")) - there) > 0:
        message = "%s holds %d latents of other images than those of %s; training would use them"
        logger.warning(message, cache, others, source.root)
    write_json(cache / RECORD, done)
    message = "%s is complete: %d images encoded, %d were there, %d corrupt"
    logger.info(message, cache, counts.encoded, counts.kept, len(bad))


def existing(cache: Path) -> dict | None:
    """The record of an existing cache. FileNotFoundError if the folder holds no cache."""
    if not cache.is_dir():
        raise FileNotFoundError(f"no folder {cache} (--cached_path)")
    record = read_record(cache)
    if record is None and not any(cache.glob("*/*.npz")):
        lacks = f"it holds neither a {RECORD} nor <class>/<image>.npz"
        raise FileNotFoundError(f"{cache} (--cached_path) is no cache: {lacks}")
    return record


def info(cache: Path) -> str:
    """What a cache is, a line for each fact."""
    record = existing(cache)
    states = {None: f"no {RECORD}, so a tree of .npz files as published", True: "complete", False: "NOT finished"}
    state = states[record and record["complete"]]
    sizes = [path.stat().st_size for path in cache.rglob("*") if path.suffix in (".npz", ".safetensors")]
    hidden = ("shards", "complete", "class_list", "image_list", "vae")
    about = {key: value for key, value in (record or {}).items() if key not in hidden}
    if isinstance(about.get("classes"), list):
        about["classes"] = len(about["classes"])
    if isinstance(about.get("quantizer"), dict):
        about["quantizer"] = {key: about["quantizer"][key] for key in ("kind", "bits", "min", "max")}
    each = sum(sizes) / max(about.get("images", len(sizes)), 1)
    about["files"] = f"{len(sizes)}, {sum(sizes) / 2**20:.1f} MiB, {each:.0f} bytes per image"
    return "\n".join([f"{cache}: {state}", *(f"  {key:<20} {value}" for key, value in about.items())])


def verify(cache: Path) -> str:
    """Read everything and compare it with its checksums; ValueError that names every damaged file (the first ten)."""
    record = existing(cache)
    if record is not None and record.get("format") == "shards":
        images, problems = verify_shards(cache, record)
    else:
        images, problems = verify_tree(cache)
    if problems:
        raise ValueError(f"{cache} (--cached_path): {len(problems)} problems. " + "; ".join(problems[:10]))
    return f"{cache}: {images} images, every checksum is right"


def verify_shards(cache: Path, record: dict) -> tuple[int, list[str]]:
    """Number of images and problems of the shards in a record, or of all that are there while it is not complete."""
    if not record["complete"]:
        logger.warning("%s is not finished; its finished shards are checked", cache)
    found = {path.name: None for path in sorted(cache.glob("shard-*.safetensors"))}
    images, problems = 0, []
    for name, sha256 in ({entry["name"]: entry["sha256"] for entry in record["shards"]} or found).items():
        try:
            shard = Shard(cache / name)
        except ValueError as error:
            problems.append(str(error))
            continue
        images += int(shard.present.sum())
        if sha256 not in (None, shard.sha256):
            problems.append(f"{shard.path}: its header and index are not those that {RECORD} lists")
        problems += [f"{shard.path}: the checksum of {path} is wrong" for path in shard.wrong_records()]
    if record["complete"] and not problems and images != record["images"]:
        problems.append(f"{cache / RECORD} says {record['images']} images, the shards hold {images}")
    return images, problems


def verify_tree(cache: Path) -> tuple[int, list[str]]:
    """Number of images and problems of a tree of .npz files."""
    problems, first_of = [], dict[tuple, Path]()  # shape -> path
    paths = sorted(cache.rglob("*.npz"))
    for path in paths:
        arrays = read_moments(path)
        if arrays is None:
            problems.append(f"{path} is truncated, damaged or not finite")
        else:
            first_of.setdefault(arrays.shape[1:], path)
    problems += [f"{path} has moments of {shape}, others have not" for shape, path in list(first_of.items())[1:]]
    return len(paths), problems
