"""What main_cache.py does with a cache folder: complete it, print what it holds, verify it."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dataset.cache_files import Counts, NpzFiles, ShardFiles
from dataset.encode import Encode, encode_all
from dataset.encoder_inputs import Source
from dataset.folders import LeftOut, list_folder, scan
from dataset.images import CONTROL, printable
from dataset.npz import VIEWS, has_flip, read_stamp, read_views
from dataset.record import (
    RECORD,
    CacheOptions,
    check_agreement,
    check_folders,
    digest_of,
    npz_list,
    own_shards,
    read_record,
    tree_differs,
)
from dataset.shards import NAME, TRAVERSAL, RecordSpec, Shard
from dataset.source import UNKNOWN, unchanged
from util import dist
from util.cli import check_writable
from util.files import remove_leftovers, replacing, write_json
from util.locks import folder_lock
from util.log import get_logger
from util.options import ArgumentError

logger = get_logger()
BAD_LIST = "bad_images.txt"
LONGEST_FILE_NAME = 255  # bytes, on the file systems in use
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


def existing(cache: Path) -> dict | None:
    """The record of an existing cache. FileNotFoundError if the folder holds no cache."""
    if not cache.is_dir():
        raise FileNotFoundError(f"no folder {cache} (cached_path)")
    record = read_record(cache)
    if record is None and not any(cache.glob("*/*.npz")):
        lacks = f"it holds neither a {RECORD} nor <class>/<image>.npz"
        raise FileNotFoundError(f"{cache} (cached_path) is no cache: {lacks}")
    return record


def info(cache: Path) -> str:
    """What a cache is, a line for each fact."""
    record = existing(cache)
    states = {None: f"no {RECORD}, so a tree of .npz files as published", True: "complete", False: "NOT finished"}
    state = states[record and record["complete"]]
    sizes = [path.stat().st_size for path in (*cache.glob("*.safetensors"), *tree_files(cache))]
    hidden = ("shards", "complete", "class_list", "image_list", "vae")
    about = {key: value for key, value in (record or {}).items() if key not in hidden}
    if isinstance(about.get("classes"), list):
        about["classes"] = len(about["classes"])
    if isinstance(about.get("quantizer"), dict):
        about["quantizer"] = {key: about["quantizer"][key] for key in ("kind", "bits", "min", "max")}
    each = sum(sizes) / max(about.get("images", len(sizes)), 1)
    about["files"] = f"{len(sizes)}, {sum(sizes) / 2**20:.1f} MiB, {each:.0f} bytes per image"
    return "\n".join([f"{cache}: {state}", *(f"  {key:<20} {value}" for key, value in about.items())])


def verify(cache: Path, data: Path | None = None) -> str:
    """Read everything and compare it with its checksums and with the record: images, classes, names.

    data: the folder of the images, which are compared with what was recorded of them. ValueError that names everything
    that is wrong (the first ten).
    """
    record = existing(cache)
    shards = record is not None and record.get("format") == "shards"
    if record is not None and not record["complete"]:
        logger.warning("%s is not finished; what is there is checked", cache)
    images, problems = verify_shards(cache, record) if shards else verify_tree(cache, record)
    if not images and not problems:
        problems = ["it holds no latents"]
    if data is not None and not problems:
        problems = compare_images(cache, record, data)
    if problems:
        raise ValueError(f"{cache} (cached_path): {len(problems)} problems. " + "; ".join(problems[:10]))
    also = "" if data is None else f", and {data} holds the images that it is of"
    return f"{cache}: {images} images, every checksum is right{also}"


def open_shards(cache: Path, record: dict) -> Iterator[Shard | ValueError]:
    """The shards in a record, or all that are there while it is not complete; the error of a damaged one."""
    found = {path.name: None for path in sorted(cache.glob("shard-*")) if NAME.fullmatch(path.name)}
    for name, sha256 in ({entry["name"]: entry["sha256"] for entry in record["shards"]} or found).items():
        try:
            shard = Shard(cache / name)
        except ValueError as error:
            yield error
            continue
        differs = sha256 not in (None, shard.sha256)
        yield ValueError(f"{shard.path}: its header and index are not those that {RECORD} lists") if differs else shard


def verify_shards(cache: Path, record: dict) -> tuple[int, list[str]]:
    """Number of images and problems of the shards in a record."""
    images, problems, paths, classes = 0, [], [], record["classes"]
    for shard in open_shards(cache, record):
        if isinstance(shard, ValueError):
            problems.append(str(shard))
            continue
        images += int(shard.present.sum())
        problems += [f"{shard.path}: the checksum of {path} is wrong" for path in shard.wrong_records()]
        paths += shard.paths
        named = zip(shard.paths, shard.labels.tolist(), strict=True)
        wrong = [p for p, label in named if label >= 0 and classes[label : label + 1] != [p.partition("/")[0]]]
        problems += [f"{shard.path}: {len(wrong)} labels are not those of {RECORD}, first: {wrong[0]}"] if wrong else []
    if record["complete"] and not problems:
        if images != record["images"]:
            problems.append(f"{cache / RECORD} says {record['images']} images, the shards hold {images}")
        elif digest_of(paths) != record.get("image_list", digest_of(paths)):
            problems.append(f"the shards hold other images than {cache / RECORD} says")
    return images, problems


def tree_files(cache: Path) -> list[Path]:
    """The .npz files below the class folders that training lists, sorted."""
    folders, _ = scan(cache, (".npz",), LeftOut())
    return [Path(*file) for files in folders.values() for file in files]


def verify_tree(cache: Path, record: dict | None) -> tuple[int, list[str]]:
    """Number of images and problems of a tree of .npz files."""
    problems, first_of = [], dict[tuple, Path]()  # shape -> path
    paths = tree_files(cache)
    names = VIEWS if record is not None or any(map(has_flip, paths[:1])) else VIEWS[:1]
    for path in paths:
        try:
            first_of.setdefault(read_views(path, names).shape[1:], path)
        except ValueError as error:
            problems.append(f"the latents of {path} {error}")
    problems += [f"{path} has moments of {shape}, others have not" for shape, path in list(first_of.items())[1:]]
    if record is not None and record["complete"]:
        problems += tree_differs(record, [path.relative_to(cache).as_posix() for path in paths])
    return len(paths), problems


def compare_images(cache: Path, record: dict | None, data: Path) -> list[str]:
    """The images of a data folder that are not cached, that changed since, or that are no longer there."""
    if record is not None and record.get("format") == "shards":
        shards = (shard for shard in open_shards(cache, record) if isinstance(shard, Shard))
        cached = {path: stamp for shard in shards for path, stamp in zip(shard.paths, shard.sources, strict=True)}
    else:
        cached = {str(p.relative_to(cache)).removesuffix(".npz"): read_stamp(p) for p in tree_files(cache)}
        bad = cache / BAD_LIST
        cached |= dict.fromkeys(bad.read_text(errors="surrogateescape").splitlines() if bad.exists() else (), UNKNOWN)
    folder = list_folder(data)
    files = dict(zip(folder.paths, (file for file, _ in folder.samples), strict=True))
    unknown = sum(not stamp.any() for stamp in cached.values())
    if unknown:
        logger.warning("of %d images no size and time is recorded: only their names are compared", unknown)
    problems = [f"{path} is not in {data}" for path in cached if path not in files]
    problems += [f"{file} is not cached" for path, file in files.items() if path not in cached]
    known = ((file, cached[path]) for path, file in files.items() if path in cached)
    return problems + [f"{file} changed since it was cached" for file, stamp in known if not unchanged(file, stamp)]
