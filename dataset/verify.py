"""What main_cache.py says of a cache: what it holds, and whether it is what its record and its images say."""

from collections.abc import Iterator
from pathlib import Path

from dataset.folders import list_folder
from dataset.npz import VIEWS, has_flip, read_stamp, read_views, tree_files
from dataset.record import BAD_LIST, RECORD, digest_of, read_record, tree_differs
from dataset.shards import NAME, Shard
from dataset.source import UNKNOWN, unchanged
from util.log import get_logger

logger = get_logger()


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


def existing(cache: Path) -> dict | None:
    """The record of an existing cache. FileNotFoundError if the folder holds no cache."""
    if not cache.is_dir():
        raise FileNotFoundError(f"no folder {cache} (cached_path)")
    record = read_record(cache)
    if record is None and not any(cache.glob("*/*.npz")):
        lacks = f"it holds neither a {RECORD} nor <class>/<image>.npz"
        raise FileNotFoundError(f"{cache} (cached_path) is no cache: {lacks}")
    return record


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
