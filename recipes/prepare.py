"""Write a data set once with its shorter side resized, so that every epoch decodes less.

    python recipes/prepare.py --output-dir data/imagenet-400                       # ILSVRC/imagenet-1k
    python recipes/prepare.py --dataset-name path/to/folder --output-dir data/small --size 256 --num-proc 16
    python recipes/prepare.py --output-dir data/imagenet-256 --size 256 --format raw   # pixels, ten times the disk
    python recipes/prepare.py --output-dir data/imagenet-400 --verify              # check what was written
    python recipes/prepare.py --smoke                                              # seconds, on digits

The result is a folder of Parquet files that ``recipes/imagenet.py --dataset-name data/imagenet-400`` reads; or, raw,
of Arrow files that are mapped into memory, with nothing to decode. It appears under its name when it is complete;
until then it is ``data/imagenet-400.incomplete``, where the same command goes on: it keeps every shard whose checksum
is right, and writes the others again.
"""

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image
from filelock import FileLock, Timeout

from pgt_hf.atomic import replacing
from pgt_hf.images import (
    DEFAULT_DATASET,
    DIGITS,
    BadImageError,
    ImageSourceArguments,
    class_names,
    read_image,
    shrink,
    write_arrow,
)
from pgt_hf.limits import Folder, Needs, OneOf, Seed, Whole
from pgt_hf.manifest import MANIFEST, compare_file, describe_file
from pgt_hf.programs import errors_in_one_line, parse, refuse_other_settings
from pgt_hf.trainer import StopOnSigterm

LOCK = ".lock"
ROW_GROUP, GROUP_BYTES = 100, 2**28  # images that are written at a time; Arrow's binary columns end at 2 GiB
SMOKE = {"dataset_name": DIGITS, "output_dir": "runs/prepared-digits", "size": 6, "images_per_shard": 200}
SOURCE = tuple(ImageSourceArguments.__dataclass_fields__)
WRITING = ("size", "format", "quality", "images_per_shard", "num_proc", "seed", *SOURCE)


@dataclass
class PrepareArguments(ImageSourceArguments):
    output_dir: Folder = field(default="data/prepared", metadata={"help": "The folder to write."})
    size: Annotated[int, Whole("[1, 65500]")] = field(
        default=400, metadata={"help": "Most pixels of the shorter side."}
    )
    format: Annotated[str, OneOf(("jpeg", "raw"))] = field(
        default="jpeg", metadata={"help": "'jpeg', or 'raw': pixels, which cost no decoding."}
    )
    quality: Annotated[int, Whole("[1, 95]"), Needs("format", ("jpeg",))] = field(
        default=90, metadata={"help": "JPEG quality of the images that are resized, 1 to 95."}
    )
    images_per_shard: Annotated[int, Whole("[1, 1e6]")] = field(default=1000, metadata={"help": "Images per file."})
    num_proc: Annotated[int, Whole("[1, 10000]")] = field(default=os.cpu_count() or 1, metadata={"help": "Processes."})
    seed: Seed = field(default=0, metadata={"help": "Draws a validation split where the data set has none."})
    NEEDS: ClassVar[dict[str, Needs]] = dict.fromkeys(WRITING, Needs("verify", (False,)))
    verify: bool = field(default=False, metadata={"help": "Only check what is in --output-dir."})
    smoke: bool = field(default=False, metadata={"help": f"Set {SMOKE}"})


def main() -> None:
    StopOnSigterm().listen()
    args, _ = parse(PrepareArguments, description=__doc__, defaults={"dataset_name": DEFAULT_DATASET}, smoke=SMOKE)
    with errors_in_one_line():
        if args.verify:
            check(Path(args.output_dir), "delete it and prepare it again")
        else:
            prepare(args, Path(args.output_dir))
    tell(Path(args.output_dir))


def prepare(args: PrepareArguments, output: Path) -> None:
    """Writes every shard that is missing or damaged, and gives the folder its name when all of them are right."""
    if output.exists() and not (output / MANIFEST).is_file():
        raise FileExistsError(f"output_dir must be a new folder, {str(output)!r} is there, without a {MANIFEST}")
    if output.resolve().is_relative_to(Path(str(args.dataset_name)).resolve()):
        raise ValueError(f"output_dir must be outside the data set, {args.dataset_name!r}, got {str(output)!r}")
    splits = args.load(args.seed)
    if splits["train"] is splits["validation"]:  # one split that serves as both is written once
        splits = {"validation": splits["validation"]}
    settings = {key: getattr(args, key) for key in ("size", "images_per_shard", "seed", *SOURCE)}
    rows = {key: split.num_rows for key, split in splits.items()}
    settings |= {"quality": None if args.format == "raw" else args.quality, "rows": rows}
    if output.exists():
        refuse_other_settings(output, read_json(output / MANIFEST), settings)
        check(output, "delete it and prepare it again")
    else:
        folder = output.with_name(output.name + ".incomplete")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / LOCK, timeout=0):
                write(splits, settings, folder, args.num_proc)
                check(folder, "start again, and what is damaged will be written again")
                folder.rename(output)
        except Timeout:
            raise BlockingIOError(f"{folder} is still being written by another run: wait until it has ended") from None
    for leftover in output.glob(".*"):
        if leftover.name == LOCK or leftover.suffix in (".json", ".partial"):
            leftover.unlink()


def write(splits: dict[str, Dataset], settings: dict[str, Any], folder: Path, num_proc: int) -> None:
    for path in folder.glob(".*.json"):
        if (found := read_record(path)) is not None:
            refuse_other_settings(folder, found["settings"], settings)
    shards, suffix = [], "parquet" if settings["quality"] else "arrow"
    for key, split in splits.items():
        count = -(-split.num_rows // settings["images_per_shard"])
        names = [f"{key}-{number:05}-of-{count:05}.{suffix}" for number in range(count)]
        rows = Dataset.from_dict({"shard": range(count), "name": names})
        source = split.cast_column("image", Image(decode=False))
        ensure = partial(ensure_shard, split=source, key=key, folder=folder, settings=settings)
        processes = min(num_proc, count)
        rows.map(ensure, num_proc=processes if processes > 1 else None, load_from_cache_file=False, desc=key)
        shards += [read_json(record(folder / name))["shard"] for name in names]
    write_json(folder / MANIFEST, settings | {"classes": class_names(next(iter(splits.values()))), "shards": shards})


def ensure_shard(
    row: dict[str, Any], split: Dataset, key: str, folder: Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """One file and the record of what is in it, unless both are there and agree."""
    path, raw = folder / row["name"], settings["quality"] is None
    found = read_record(record(path))
    if found is not None and compare_file(path, found["shard"], path.name) is None:
        return row
    start = row["shard"] * settings["images_per_shard"]
    rows = range(start, min(start + settings["images_per_shard"], split.num_rows))
    features = split.features.copy()
    features["image"] = Image()
    shard: dict[str, Any] = {"name": path.name, "split": key, "images": 0, "resized": 0, "bad": []}
    with replacing(path) as draft:
        groups = prepared(split, rows, features, settings, shard)
        (write_arrow if raw else write_parquet)(groups, features.arrow_schema, draft)
        write_json(record(path), {"settings": settings, "shard": shard | describe_file(draft)})
    return row


def prepared(
    split: Dataset, rows: range, features: Features, settings: dict[str, Any], shard: dict[str, Any]
) -> Iterator[pa.Table]:
    """The images of a shard, a table at a time; they are counted in ``shard``."""

    def table() -> pa.Table:
        made = Dataset.from_dict({"image": images, "label": labels}, features=features).data.table
        return made.cast(features.arrow_schema)

    images, labels, taken = [], [], 0
    for index in rows:
        example = split[index]
        try:
            before = read_image(example["image"])
            after = shrink(before, settings["size"], settings["quality"])
        except BadImageError as error:
            if settings["on_bad_image"] != "skip":
                raise BadImageError(
                    f"image {index} of {shard['split']}: {error}; --on-bad-image skip leaves it out"
                ) from error
            shard["bad"].append(index)
            continue
        shard["images"] += 1
        shard["resized"] += after is not before
        images.append({"bytes": after, "path": name_of(example["image"]["path"])})
        labels.append(example["label"])
        taken += len(after)
        if len(images) == ROW_GROUP or taken > GROUP_BYTES:
            yield table()
            images, labels, taken = [], [], 0
    if images:
        yield table()


def write_parquet(tables: Iterator[pa.Table], schema: pa.Schema, path: Path) -> None:
    """Small row groups, as the Hub's image sets have them: a stream reads one at a time, and none may be empty."""
    with pq.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table)


def check(folder: Path, advice: str) -> None:
    """Stops with what is wrong with a prepared folder, and with what to do about it."""
    if problems := verify(folder):
        raise ValueError(f"{folder} is not what its {MANIFEST} says: {advice}\n  " + "\n  ".join(problems))


def verify(folder: Path) -> list[str]:
    """What is wrong with a prepared folder, in words; nothing if it is what its manifest says."""
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it is no folder that this program has finished")
    manifest = read_json(folder / MANIFEST)
    known = {shard["name"]: shard for shard in manifest["shards"]}
    compared = (compare_file(folder / name, shard, name) for name, shard in known.items())
    problems = [found for found in compared if found is not None]
    tables = [file.name for file in folder.iterdir() if file.suffix in (".parquet", ".arrow")]
    of_datasets = "cache-"  # what its map or sort keep beside the data
    problems += [
        f"{name} does not belong here" for name in tables if name not in known and not name.startswith(of_datasets)
    ]
    for split, rows in manifest["rows"].items():
        found = sum(shard["images"] + len(shard["bad"]) for shard in manifest["shards"] if shard["split"] == split)
        if found != rows:
            problems.append(f"{split} has {found} images, bad ones included, and its source {rows}")
    return problems


def tell(folder: Path) -> None:
    manifest = read_json(folder / MANIFEST)
    for split in manifest["rows"]:
        shards = [shard for shard in manifest["shards"] if shard["split"] == split]
        images, resized, size = (sum(shard[key] for shard in shards) for key in ("images", "resized", "bytes"))
        bad = [index for shard in shards for index in shard["bad"]]
        print(f"{split:12}{images:>10,} images, {resized:,} resized, {size / 2**20:,.1f} MiB in {len(shards)} files")
        if bad:
            print(f"{'':12}{len(bad):>10,} left out, since they could not be decoded: {bad}")
    print(f"{folder} is complete, and every checksum is right")


def record(path: Path) -> Path:
    """Where a shard's entry in the manifest waits for the others; hidden, so that ``datasets`` does not read it."""
    return path.with_name(f".{path.name}.json")


def name_of(path: str | None) -> str | None:
    """The file's own name, without its place on this machine."""
    return None if path is None else path.replace("\\", "/").rsplit("/", 1)[-1]


def read_record(path: Path) -> dict[str, Any] | None:
    """A shard's record; None if it is missing or damaged, and the shard is to be written again."""
    try:
        found = read_json(path)
    except (FileNotFoundError, ValueError):
        return None
    return found if found.keys() == {"settings", "shard"} else None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        right = content.pop("checksum", None) in (None, checksum_of(content))
    except (AttributeError, TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"{path} is damaged: delete {path.parent} and prepare it again")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as draft:
        sealed = content | {"checksum": checksum_of(content)}
        draft.write_text(json.dumps(sealed, indent=2), encoding="utf-8")


def checksum_of(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


if __name__ == "__main__":
    main()
